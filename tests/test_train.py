"""The loop: schedule, accumulation, clipping, optimizer, what is refused, and that a run can be continued exactly.

The model is tiny and, where the loop alone is meant, the method is a stand-in whose gradients are known.
"""

import copy
import inspect
import math
from functools import cache
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from compare import distance, flat, relative
from tiny import needs, random_params, tiny_config
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from lfu import lora
from lfu import train as train_module
from lfu.data.batches import Batch, Example, collate, shuffled
from lfu.lora import Lora
from lfu.methods import METHODS, bind
from lfu.model import Config, Params
from lfu.schedule import Settings, generator_for, learning_rate, total_steps, validate_settings
from lfu.train import Method, Metrics, StepMetrics, adamw, clip, global_norm, lfu_gradient, sft_gradient, train

CONFIG = tiny_config("qwen3_untied")
GSM8K_ROWS = 7473
Log = list[StepMetrics]
UNCLIPPED = Settings(max_grad_norm=math.inf)

EXACT = 1e-13
"""Relative error in float64. Measured: at most 4e-15."""


@cache
def base(dtype: torch.dtype = torch.float64) -> Params:
    return random_params(CONFIG, seed=1, dtype=dtype)


def new_task(dtype: torch.dtype = torch.float64, *, rank: int = 2, targets: tuple[str, ...] = lora.TARGETS) -> Lora:
    generator = torch.Generator().manual_seed(7)
    task = lora.init(CONFIG, rank, generator=generator, targets=targets)
    return tree_map(lambda tensor: 0.3 * torch.randn(tensor.shape, generator=generator, dtype=dtype), task)


def rows(count: int) -> list[Example]:
    """Rows of 3 to 9 tokens, numbered from 1. The first token of row i is i, so that a batch tells its rows."""
    generator = torch.Generator().manual_seed(3)
    examples = []
    for row in range(1, count + 1):
        length = int(torch.randint(3, 10, (), generator=generator))
        prompt = int(torch.randint(1, length - 1, (), generator=generator))
        tail = torch.randint(CONFIG.vocab_size, (length - 1,), generator=generator).tolist()
        examples.append(Example([row, *tail], prompt, row))
    return examples


def noise(
    config: Config, base: Params, task: Lora, batch: Batch, generator: torch.Generator, size: float = 1.0
) -> tuple[Lora, Metrics]:
    """A method whose gradient is random and depends on its generator alone."""
    gradient = tree_map(lambda t: size * torch.randn(t.shape, generator=generator, dtype=t.dtype), task)
    return gradient, {"rows": batch.tokens[:, 0].double().mean()}


def gradients_of(
    method: Method, settings: Settings, examples: list[Example], *, steps: int
) -> tuple[list[Tensor], Log]:
    """What the optimizer is given in the first steps, and the metrics. The task stays where it is."""
    task, seen = new_task(), []
    optimizer = torch.optim.SGD(tree_leaves(task), lr=0.0)
    optimizer.register_step_pre_hook(lambda *_: seen.append(torch.cat([t.grad.flatten() for t in tree_leaves(task)])))
    run = train(CONFIG, base(), task, optimizer, examples, method, settings._replace(learning_rate=0.0))
    return seen, list(islice(run, steps))


# --- the schedule ---------------------------------------------------------------------------------


def test_the_defaults_are_the_published_settings() -> None:
    assert Settings() == Settings(
        epochs=3, batch_size=16, micro_batch_size=4, learning_rate=1e-4, warmup=0.1, weight_decay=0.0, max_grad_norm=1.0
    )
    group = adamw(new_task(), Settings()).param_groups[0]
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.999), 1e-8, 0.0)
    assert METHODS["sft"].published == {}
    every_block = {"layers": None, "norm": "mean"}
    for aux, lam in (("lora", 5.0), ("reps", 0.1)):
        assert METHODS[f"released-{aux}"].published == {"alpha": 0.1, "lam": lam}
        assert METHODS[f"lfu-{aux}"].published == METHODS[f"released-{aux}"].published | every_block


def test_the_schedule_of_the_published_gsm8k_run() -> None:
    steps = total_steps(GSM8K_ROWS, Settings())
    rates = [learning_rate(step, steps, Settings()) for step in range(steps)]
    assert steps == 1404
    assert rates[0] == 0.0
    assert rates.index(max(rates)) == 141
    assert rates[141] == 1e-4
    assert rates[-1] > 0.0


RUNS = [(1404, 0.1), (10, 0.1), (7, 0.0), (9, 0.5), (3, 1.0), (1, 0.1)]
"""(steps, warm-up) of a few runs."""
SCHEDULED = 1e-12
"""Relative error of a learning rate. Measured: 4e-14, at the foot of the cosine."""


def schedule_error(steps: int, warmup: float) -> float:
    """The largest relative distance of a learning rate from that of transformers' schedule."""
    settings = Settings(warmup=warmup)
    rates = rates_of_transformers(steps, warmup)
    return max(relative(learning_rate(step, steps, settings), rate) for step, rate in enumerate(rates))


@cache
def rates_of_transformers(steps: int, warmup: float) -> list[float]:
    from transformers import get_cosine_schedule_with_warmup

    optimizer = torch.optim.SGD([torch.zeros(1)], lr=Settings().learning_rate)
    schedule, rates = get_cosine_schedule_with_warmup(optimizer, math.ceil(warmup * steps), steps), []
    for _ in range(steps):
        rates += schedule.get_last_lr()
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize(("steps", "warmup"), RUNS)
def test_the_schedule_is_that_of_transformers(steps: int, warmup: float) -> None:
    assert schedule_error(steps, warmup) < SCHEDULED


def test_the_first_update_leaves_the_weights_unchanged_and_the_second_does_not() -> None:
    task = new_task()
    start = flat(task).clone()
    optimizer = adamw(task, Settings())
    run = train(CONFIG, base(), task, optimizer, rows(40), noise, Settings())
    assert next(run).learning_rate == 0.0
    assert torch.equal(flat(task), start)
    assert next(run).learning_rate > 0.0
    assert (flat(task) != start).all()


def rows_taken() -> tuple[list[int], Log]:
    """The rows that two epochs over ten rows take, four a step, and what the loop logs."""
    taken: list[int] = []

    def method(config: Config, base: Params, task: Lora, batch: Batch, generator: torch.Generator) -> Any:
        taken.extend(batch.tokens[:, 0].tolist())
        return noise(config, base, task, batch, generator)

    settings = Settings(epochs=2, batch_size=4, micro_batch_size=3)
    _, log = gradients_of(method, settings, rows(10), steps=100)
    return taken, log


def every_row_once_an_epoch() -> bool:
    taken, _ = rows_taken()
    return sorted(taken[:10]) == sorted(taken[10:]) == list(range(1, 11))


def the_order_is_another_each_epoch() -> bool:
    taken, _ = rows_taken()
    return taken[:10] != taken[10:]


def test_every_epoch_takes_every_row_once_and_keeps_the_last_partial_step() -> None:
    taken, log = rows_taken()
    assert every_row_once_an_epoch()
    assert the_order_is_another_each_epoch()
    assert [entry.step for entry in log] == [1, 2, 3, 4, 5, 6]
    assert [entry.epoch for entry in log] == [1, 1, 1, 2, 2, 2]
    lengths = {example.line_number: len(example.tokens) for example in rows(10)}
    assert log[2].tokens == sum(lengths[row] for row in taken[8:10])


# --- accumulation ---------------------------------------------------------------------------------


def accumulation_error(size: int) -> float:
    """How far an SFT step in micro-batches is from one over the whole batch: gradient, loss and norm."""
    examples, method = rows(16), bind("sft", CONFIG, scale=2.0)[0]
    whole, metrics = sft_gradient(CONFIG, base(), new_task(), collate(examples), scale=2.0)
    (gradient,), (entry,) = gradients_of(method, UNCLIPPED._replace(micro_batch_size=size), examples, steps=1)
    return max(
        distance(gradient, whole),
        relative(entry.losses["sft"], float(metrics["sft"])),
        relative(entry.gradient_norm, float(global_norm(whole))),
    )


@pytest.mark.parametrize("size", [16, 4, 3, 1])
def test_the_sft_step_does_not_depend_on_the_micro_batches(size: int) -> None:
    assert accumulation_error(size) < EXACT


def weighted_sum_error(name: str) -> float:
    """How far the LfU step is from the sum by hand.

    Rows sorted by length, four at a time, each with its own fresh component and weighted by its tokens.
    """
    examples, task, settings = rows(16), new_task(), UNCLIPPED._replace(seed=9)
    (gradient,), (entry,) = gradients_of(bind(name, CONFIG, scale=2.0, lam=0.2)[0], settings, examples, steps=1)

    order = sorted(shuffled(16, settings.seed, 0), key=lambda row: len(examples[row].tokens))
    total = sum(example.num_loss_tokens for example in examples)
    expected, consistency = torch.zeros_like(gradient), 0.0
    for index in range(4):
        part = [examples[row] for row in order[4 * index : 4 * index + 4]]
        aux: Any = torch.zeros(CONFIG.num_hidden_layers, CONFIG.hidden_size, dtype=torch.float64)
        if name == "lfu-lora":
            seed = np.random.SeedSequence([settings.seed, 0, index]).generate_state(1, np.uint64)[0]
            generator = torch.Generator().manual_seed(int(seed))
            aux = tree_map(Tensor.double, lora.init(CONFIG, 2, generator=generator))
        g, metrics = lfu_gradient(CONFIG, base(), task, aux, collate(part), scale=2.0, alpha=0.1, lam=0.2)
        share = sum(example.num_loss_tokens for example in part) / total
        expected += share * flat(g)
        consistency += share * float(metrics["consistency"])
    return max(distance(gradient, expected), relative(entry.losses["consistency"], consistency))


@pytest.mark.parametrize("name", ["lfu-lora", "lfu-reps"])
def test_the_lfu_step_is_the_weighted_sum_over_its_micro_batches(name: str) -> None:
    assert weighted_sum_error(name) < EXACT


def test_the_lfu_step_depends_on_the_micro_batches() -> None:
    method = bind("lfu-reps", CONFIG, scale=2.0, lam=5.0)[0]
    (by_four,), _ = gradients_of(method, UNCLIPPED, rows(16), steps=1)
    (by_one,), _ = gradients_of(method, UNCLIPPED._replace(micro_batch_size=1), rows(16), steps=1)
    assert distance(by_one, by_four) > 1e-2


# --- clipping -------------------------------------------------------------------------------------


def clipping_error() -> float:
    """How far a clipped step is from the whole one shortened: clipped by micro-batch or by tensor, it would turn."""
    examples = rows(16)

    def method(config: Config, base: Params, task: Lora, batch: Batch, generator: torch.Generator) -> Any:
        return noise(config, base, task, batch, generator, size=float(batch.tokens[0, 0]))  # of very unequal lengths

    (whole,), (entry,) = gradients_of(method, UNCLIPPED, examples, steps=1)
    (clipped,), (clipped_entry,) = gradients_of(method, Settings(max_grad_norm=0.5), examples, steps=1)
    length = float(whole.norm())
    reported = [relative(log.gradient_norm, length) for log in (entry, clipped_entry)]
    return max(distance(clipped, whole * 0.5 / length), *reported)


def test_the_accumulated_gradient_is_clipped_to_the_global_norm() -> None:
    assert clipping_error() < EXACT


def a_short_gradient_is_left_alone() -> bool:
    gradient = new_task()
    length = float(global_norm(gradient))
    return all(torch.equal(flat(clip(gradient, length, limit)), flat(gradient)) for limit in (length, 2 * length))


def test_clipping_is_to_the_limit_and_leaves_a_short_gradient_alone() -> None:
    assert a_short_gradient_is_left_alone()
    gradient = new_task()
    length = float(global_norm(gradient))
    assert float(global_norm(clip(gradient, length, length / 3))) == pytest.approx(length / 3, rel=EXACT)


# --- the optimizer --------------------------------------------------------------------------------


def adamw_error(weight_decay: float) -> float:
    """How far ten updates, one after the other, are from AdamW's as written by hand."""
    settings = Settings(epochs=5, batch_size=4, learning_rate=0.02, weight_decay=weight_decay, max_grad_norm=3.0)
    task, seen = new_task(), []
    w = flat(task).clone()
    optimizer = adamw(task, settings)
    optimizer.register_step_pre_hook(lambda *_: seen.append(torch.cat([t.grad.flatten() for t in tree_leaves(task)])))
    m, v, errors = torch.zeros_like(w), torch.zeros_like(w), []
    for t, entry in enumerate(train(CONFIG, base(), task, optimizer, rows(8), noise, settings), 1):
        g, rate = seen[-1], entry.learning_rate
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        w = w - rate * weight_decay * w - rate * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        errors.append(distance(task, w))
    assert t == 10
    assert distance(new_task(), w) > 1e-2
    return max(errors)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_updates_are_adamws_as_written_by_hand(weight_decay: float) -> None:
    assert adamw_error(weight_decay) < EXACT


# --- what is not finite ---------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stops_the_run_before_the_update(where: str, value: float) -> None:
    def method(config: Config, base: Params, task: Lora, batch: Batch, generator: torch.Generator) -> Any:
        gradient, metrics = noise(config, base, task, batch, generator)
        if 7 in batch.tokens[:, 0]:
            if where == "loss":
                return gradient, {"sft": torch.tensor(value)}
            gradient[-1]["q_proj"].B[0, 0] = value
        return gradient, metrics

    settings = Settings(batch_size=2, micro_batch_size=1, warmup=0.0)
    task, examples = new_task(), rows(8)
    optimizer = adamw(task, settings)
    states = [flat(task).clone()]
    with pytest.raises(FloatingPointError, match=r"not finite.*\[7\]"):
        for _ in train(CONFIG, base(), task, optimizer, examples, method, settings):
            states.append(flat(task).clone())
    assert torch.equal(flat(task), states[-1])
    assert {int(state["step"]) for state in optimizer.state.values()} == {len(states) - 1} - {0}


def test_a_real_overflow_is_noticed() -> None:
    huge = base()._replace(lm_head=base().lm_head * 1e308)
    task = new_task()
    run = train(CONFIG, huge, task, adamw(task, Settings()), rows(4), bind("sft", CONFIG, scale=2.0)[0], Settings())
    with pytest.raises(FloatingPointError, match=r"Step 1: .*not finite.*sft nan"):
        next(run)


# --- randomness and continuing --------------------------------------------------------------------


def draw(seed: int, step: int, index: int, **other: Any) -> int:
    generator = generator_for(Settings(seed=seed, **other), step, index, torch.device("cpu"))
    return int(torch.randint(2**62, (), generator=generator))


def draws_by_place() -> dict[tuple[int, int, int], int]:
    """What is drawn for a few (seed, step, micro-batch)."""
    return {(s, t, i): draw(s, t, i) for s in (0, 1, 42) for t in (0, 1, 2) for i in (0, 1, 2)}


def all_draws_differ() -> bool:
    return len(set(draws_by_place().values())) == len(draws_by_place())


def test_what_a_micro_batch_draws_depends_on_seed_step_and_index_alone() -> None:
    assert all_draws_differ()
    draws = draws_by_place()
    torch.manual_seed(5)
    for (seed, step, index), value in draws.items():
        assert draw(seed, step, index, epochs=7, batch_size=2, learning_rate=1.0) == value


@pytest.mark.parametrize("name", METHODS)
def test_a_continued_run_is_the_run_that_was_never_interrupted(name: str) -> None:
    """Ten steps in one go, and five, then five more from copies of the task and of what else is kept: bit-equal."""
    settings = Settings(epochs=2, batch_size=4, micro_batch_size=2, learning_rate=1e-2)
    examples = rows(20)

    def start(task: Lora, first: int = 0, **carried: Tensor) -> tuple[torch.optim.Optimizer, Any, Any]:
        optimizer, method = (
            adamw(task, settings),
            bind(name, CONFIG, scale=2.0, examples=examples, settings=settings, **needs(name, CONFIG, torch.float32))[
                0
            ],
        )
        method.state.update(carried)
        run = train(CONFIG, base(torch.float32), task, optimizer, examples, method, settings, first)
        return optimizer, run, method

    whole = new_task(torch.float32)
    log = list(start(whole)[1])
    assert len(log) == 10

    half = new_task(torch.float32)
    optimizer, run, method = start(half)
    first_half = list(islice(run, 5))
    saved_task, saved_state = tree_map(Tensor.clone, half), copy.deepcopy(optimizer.state_dict())
    assert not torch.equal(flat(half), flat(whole))

    optimizer, run, _ = start(saved_task, first=5, **method.state)
    optimizer.load_state_dict(saved_state)
    assert first_half + list(run) == log
    assert torch.equal(flat(saved_task), flat(whole))


# --- methods --------------------------------------------------------------------------------------


REPORTED = {
    "sft": set(),
    "neftune": set(),
    "gem-linear": {"gem"},
    "gem-logsigmoid": {"gem"},
    "sam": {"ascent_norm"},
    "l1": {"penalty"},
    "l2": {"penalty"},
    "anchored": {"divergence"},
}
"""What a method reports beside its SFT loss, where that is not what LfU reports."""


@pytest.mark.parametrize("name", METHODS)
def test_all_methods_have_one_signature(name: str) -> None:
    parameters = inspect.signature(METHODS[name].gradient).parameters.values()
    positional = [parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    assert positional == ["config", "base", "task", "batch", "generator"]
    method, task = bind(name, CONFIG, scale=2.0, examples=rows(5), **needs(name, CONFIG))[0], new_task()
    gradient, metrics = method(CONFIG, base(), task, collate(rows(3)), torch.Generator().manual_seed(0))
    assert [list(layer) for layer in gradient] == [list(layer) for layer in task]
    assert [g.shape for g in tree_leaves(gradient)] == [t.shape for t in tree_leaves(task)]
    assert set(metrics) - {"sft"} == REPORTED.get(name, {"consistency", "ascent_norm"})


@pytest.fixture
def handed_over(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The auxiliary components that methods hand to `lfu_gradient`."""
    seen: list[Any] = []

    def watched(config: Config, base: Params, task: Lora, aux: Any, batch: Batch, **settings: Any) -> Any:
        seen.append(aux)
        return lfu_gradient(config, base, task, aux, batch, **settings)

    monkeypatch.setattr(train_module, "lfu_gradient", watched)
    return seen


@pytest.mark.parametrize("targets", [lora.TARGETS, ("q_proj", "down_proj")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_auxiliary_lora_is_made_like_the_tasks(
    handed_over: list[Any], dtype: torch.dtype, targets: tuple[str, ...]
) -> None:
    stream = torch.promote_types(dtype, torch.float32)
    task = new_task(stream, rank=3, targets=targets)
    method = bind("lfu-lora", CONFIG, scale=2.0)[0]
    for seed in (0, 1):
        method(CONFIG, base(dtype), task, collate(rows(2)), torch.Generator().manual_seed(seed))
    first, second = handed_over
    assert [list(layer) for layer in first] == [list(targets)] * CONFIG.num_hidden_layers
    assert [leaf.shape for leaf in tree_leaves(first)] == [leaf.shape for leaf in tree_leaves(task)]
    assert {leaf.dtype for leaf in tree_leaves(first)} == {stream}
    for layer, other in zip(first, second):
        for name, (A, B) in layer.items():
            assert not B.any()
            assert A.abs().max() <= 1 / math.sqrt(A.shape[1])
            assert (A != other[name].A).all()  # fresh every time


def test_the_auxiliary_vectors_are_zero_one_for_each_block(handed_over: list[Any]) -> None:
    bind("lfu-reps", CONFIG, scale=2.0)[0](CONFIG, base(), new_task(), collate(rows(2)), torch.Generator())
    (vectors,) = handed_over
    assert vectors.shape == (CONFIG.num_hidden_layers, CONFIG.hidden_size)
    assert vectors.dtype == torch.float64
    assert not vectors.any()


def test_bind_says_what_the_settings_were_resolved_to() -> None:
    method, resolved = bind("lfu-lora", CONFIG, scale=2.0, lam=500.0, alpha=None)
    assert resolved == {"alpha": 0.1, "lam": 500.0, "norm": "mean", "layers": [1, 2]}
    assert method.hyper == {"scale": 2.0, **resolved}
    assert method.run == {"remat": False}
    assert bind("sft", CONFIG, scale=2.0, alpha=None)[1] == {}


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("lfu", {}, "no method 'lfu'; there are sft, lfu-lora, lfu-reps"),
        ("sft", {"alpha": 0.1}, "sft has no alpha"),
        ("released-lora", {"norm": "sum", "layers": [1]}, "released-lora has no layers or norm"),
        ("released-reps", {}, "released-reps draws a second batch .*: give bind the examples"),
        ("lfu-lora", {"alpha": -0.1}, "alpha must be at least 0"),
        ("lfu-reps", {"lam": -0.1}, "lambda must be at least 0"),
        ("lfu-reps", {"norm": "max"}, "'max'"),
        ("lfu-lora", {"layers": [3]}, "block numbers from 1 to 2"),
    ],
)
def test_methods_that_do_not_exist_or_mean_nothing_are_refused(name: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bind(name, CONFIG, scale=2.0, **given)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"epochs": 0}, "epochs must be more than 0"),
        ({"batch_size": 0}, "batch-size must be more than 0"),
        ({"micro_batch_size": -1}, "micro-batch-size must be more than 0"),
        ({"max_grad_norm": 0.0}, "max-grad-norm must be more than 0"),
        ({"learning_rate": -1e-4}, "learning-rate must be at least 0"),
        ({"learning_rate": math.nan}, "learning-rate must be at least 0"),
        ({"weight_decay": -0.1}, "weight-decay must be at least 0"),
        ({"seed": -1}, "seed must be from 0"),
        ({"warmup": 1.5}, "warmup is a share"),
        ({"warmup": -0.1}, "warmup is a share"),
    ],
)
def test_settings_that_no_run_can_have_are_refused(changed: dict[str, Any], message: str) -> None:
    validate_settings(Settings())
    with pytest.raises(ValueError, match=message):
        validate_settings(Settings(**changed))


def test_there_must_be_rows_to_train_on() -> None:
    task = new_task()
    with pytest.raises(ValueError, match="no rows to train on"):
        next(train(CONFIG, base(), task, adamw(task, Settings()), [], noise, Settings()))

"""The released variants compute what the authors' code computes: shown with transformers and peft, module by module.

The reference here is written from the facts that `lfu/baselines/released.py` states, in the shape of the original: a
PEFT model whose parameters are moved in place and whose MLPs are wrapped. It is told the same second rows. Every
deliberate error in it must be seen.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from compare import distance, flat
from peft import LoraConfig, get_peft_model
from tiny import random_lora, random_params, reference_config, tiny_config
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lfu.data.batches import Batch, Example, collate
from lfu.lora import to_peft_tensors
from lfu.methods import bind
from lfu.model import Params, named_tensors
from lfu.schedule import Settings

CONFIG = tiny_config("qwen2")  # has biases, which are to be added once
SCALE, RANK, EOS = 2.0, 2, 2
SETTINGS = Settings(learning_rate=0.05)
TASK = random_lora(CONFIG, RANK, seed=7)

CLOSE = 1e-5
"""Relative error. The norms of transformers are float32 in a float64 model too. Measured: at most 7e-7."""


class Result(NamedTuple):
    gradient: Tensor
    sft: float
    consistency: float


def rows() -> list[Example]:
    """20 rows of 5 to 22 tokens that end in EOS: padded to a multiple of 8, two batches are of one length or of two."""
    generator = torch.Generator().manual_seed(3)
    examples = []
    for row in range(20):
        length, prompt = (int(torch.randint(*span, (), generator=generator)) for span in ((5, 23), (1, 4)))
        tokens = torch.randint(3, CONFIG.vocab_size, (length - 1,), generator=generator).tolist()
        examples.append(Example([*tokens, EOS], prompt, row))
    return examples


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def second_rows(seed: int) -> list[Example]:
    """The rows that the method draws with this seed."""
    return [rows()[row] for row in torch.randperm(20, generator=generator(seed))[:4]]


@cache
def base() -> Params:
    return random_params(CONFIG, seed=1)


# --- the reference --------------------------------------------------------------------------------


def peft_model() -> nn.Module:
    model = AutoModelForCausalLM.from_config(reference_config(CONFIG), attn_implementation="eager", dtype=torch.float64)
    model.load_state_dict(named_tensors(CONFIG, base()))
    targets = list(TASK[0])
    wrapped = get_peft_model(
        model, LoraConfig(r=RANK, lora_alpha=RANK * SCALE, target_modules=targets), autocast_adapter_dtype=False
    )
    values = {name.replace(".weight", ".default.weight"): value for name, value in to_peft_tensors(TASK).items()}
    missing = wrapped.load_state_dict(values, strict=False)
    assert not missing.unexpected_keys
    return wrapped.double()


def loss_and_states(model: nn.Module, tokens: Tensor, labels: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    outputs = model(input_ids=tokens, labels=labels, output_hidden_states=True, use_cache=False)
    return outputs.loss, outputs.hidden_states


def mean_squared(moving: tuple[Tensor, ...], fixed: tuple[Tensor, ...], labels: Tensor, wrong: str) -> Tensor:
    chosen = labels != -100
    if wrong == "shifted mask":
        chosen = F.pad(chosen[:, 1:], (0, 1))
    if wrong == "K states":
        moving, fixed = moving[1:], fixed[1:]
    distances = [F.mse_loss(m[chosen], f[chosen].detach()) for m, f in zip(moving, fixed, strict=True)]
    return sum(distances) / len(distances)


def gradients_of(model: nn.Module, loss: Tensor) -> Tensor:
    """In the order of the leaves of TASK."""
    trainable = {name.replace(".default", ""): p for name, p in model.named_parameters() if p.requires_grad}
    ordered = [trainable[name] for name in to_peft_tensors(TASK)]
    found = torch.autograd.grad(loss, ordered, allow_unused=True, materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in found])


def reference_lora(batch: Batch, other: Batch, alpha: float, lam: float, wrong: str = "") -> Result:
    model = peft_model()
    parameters = [p for p in model.parameters() if p.requires_grad]
    if wrong == "first batch":
        other = batch
    ascent = torch.autograd.grad(loss_and_states(model, *other)[0], parameters)
    length = torch.stack([g.norm() for g in ascent]).norm()
    sft, clean = loss_and_states(model, *batch)
    g_sft = gradients_of(model, sft)
    with torch.no_grad():
        for name, parameter, g in zip((n for n, p in model.named_parameters() if p.requires_grad), parameters, ascent):
            if not (wrong == "only B moves" and "lora_A" in name):
                parameter += alpha * g / length
    # Differentiated before the parameters are put back.
    consistency = mean_squared(loss_and_states(model, *batch)[1], clean, batch.labels, wrong)
    return Result(g_sft + lam * gradients_of(model, consistency), sft.item(), consistency.item())


class Turned(nn.Module):
    """An MLP whose output is turned towards a direction, its length kept."""

    def __init__(self, mlp: nn.Module, direction: Tensor, alpha: float, wrong: str) -> None:
        super().__init__()
        self.mlp, self.direction, self.alpha, self.wrong = mlp, direction, alpha, wrong

    def forward(self, x: Tensor) -> Tensor:
        m = self.mlp(x)
        length = m.norm(dim=-1, keepdim=True)
        if self.wrong == "added, not turned":
            return m + self.alpha * length * F.normalize(self.direction, dim=-1)
        return F.normalize(F.normalize(m, dim=-1) + self.alpha * F.normalize(self.direction, dim=-1), dim=-1) * length


@contextmanager
def steered(model: nn.Module, vectors: list[Tensor], alpha: float, wrong: str) -> Iterator[None]:
    layers = model.get_base_model().model.layers
    plain = [layer.mlp for layer in layers]
    for layer, vector in zip(layers, vectors):
        layer.mlp = Turned(layer.mlp, vector, alpha, wrong)
    yield
    for layer, mlp in zip(layers, plain):
        layer.mlp = mlp


def reference_reps(
    batch: Batch, other: Batch, vectors: list[Tensor], alpha: float, lam: float, wrong: str = ""
) -> tuple[Result, list[Tensor]]:
    """The result, and the gradient by which the vectors would raise the second batch's loss."""
    model = peft_model()
    if wrong == "first batch":
        other = batch
    with steered(model, vectors, alpha, wrong):
        raised, undesirable = loss_and_states(model, *other)
        ascent = list(torch.autograd.grad(raised, vectors, retain_graph=True))
    length = batch.tokens.shape[1]
    if wrong == "first state repeated":
        undesirable = tuple(p if p.shape[1] == length else p[:, :1].expand(-1, length, -1) for p in undesirable)
    undesirable = tuple(p if p.shape[1] == length else p[:, -1:].expand(-1, length, -1) for p in undesirable)
    sft, clean = loss_and_states(model, *batch)
    consistency = mean_squared(clean, undesirable, batch.labels, wrong)
    return Result(gradients_of(model, sft + lam * consistency), sft.item(), consistency.item()), ascent


def by_eights(examples: list[Example]) -> Batch:
    """Padded to a multiple of eight with EOS."""
    width = max(len(example.tokens) for example in examples)
    width += (8 - width % 8) % 8
    tokens = [example.tokens + [EOS] * (width - len(example.tokens)) for example in examples]
    labels = [
        [-100] * e.prompt_length + e.tokens[e.prompt_length :] + [-100] * (width - len(e.tokens)) for e in examples
    ]
    return Batch(torch.tensor(tokens), torch.tensor(labels))


# --- LfU (LoRA) -----------------------------------------------------------------------------------

HOW = {"alpha": 0.1, "lam": 0.5}


def ours(name: str, seed: int) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    method, _ = bind(name, CONFIG, scale=SCALE, examples=rows(), settings=SETTINGS, **HOW)
    gradient, metrics = method(CONFIG, base(), TASK, collate(rows()[:4]), generator(seed))
    return flat(gradient), metrics, method.state


@pytest.mark.parametrize("seed", [0, 1])
def test_released_lora_is_the_reference(seed: int) -> None:
    gradient, metrics, _ = ours("released-lora", seed)
    expected = reference_lora(collate(rows()[:4]), collate(second_rows(seed)), **HOW)
    assert distance(gradient, expected.gradient) < CLOSE
    assert float(metrics["sft"]) == pytest.approx(expected.sft, rel=CLOSE)
    assert float(metrics["consistency"]) == pytest.approx(expected.consistency, rel=CLOSE)


@pytest.mark.parametrize("wrong", ["first batch", "only B moves", "shifted mask", "K states"])
def test_the_comparison_sees_an_error_in_lora(wrong: str) -> None:
    expected = reference_lora(collate(rows()[:4]), collate(second_rows(0)), **HOW, wrong=wrong)
    assert distance(ours("released-lora", 0)[0], expected.gradient) > 100 * CLOSE


# --- LfU (RepS) -----------------------------------------------------------------------------------


def drawn_state(seed: int) -> tuple[list[Example], list[Tensor]]:
    """What the first call draws: the second rows, then the vectors."""
    source = generator(seed)
    order = torch.randperm(20, generator=source)[:4]
    vectors = torch.randn(CONFIG.num_hidden_layers, CONFIG.hidden_size, generator=source, dtype=torch.float64)
    return [rows()[row] for row in order], [vector.clone().requires_grad_() for vector in vectors]


def widths(seed: int) -> tuple[int, int]:
    return by_eights(rows()[:4]).tokens.shape[1], by_eights(second_rows(seed)).tokens.shape[1]


SEEDS = (0, 1, 2, 3)


def test_the_seeds_cover_batches_of_one_length_and_of_two() -> None:
    assert len({first == second for first, second in map(widths, SEEDS)}) == 2


@pytest.mark.parametrize("seed", SEEDS)
def test_released_reps_is_the_reference(seed: int) -> None:
    gradient, metrics, _ = ours("released-reps", seed)
    others, vectors = drawn_state(seed)
    expected, ascent = reference_reps(by_eights(rows()[:4]), by_eights(others), vectors, **HOW)
    assert distance(gradient, expected.gradient) < CLOSE
    assert float(metrics["sft"]) == pytest.approx(expected.sft, rel=CLOSE)
    assert float(metrics["consistency"]) == pytest.approx(expected.consistency, rel=CLOSE)
    assert float(metrics["ascent_norm"]) == pytest.approx(float(torch.stack(ascent).norm()), rel=CLOSE)


@pytest.mark.parametrize(
    "wrong", ["first batch", "added, not turned", "first state repeated", "shifted mask", "K states"]
)
def test_the_comparison_sees_an_error_in_reps(wrong: str) -> None:
    seed = next(seed for seed in SEEDS if len(set(widths(seed))) == 2)
    others, vectors = drawn_state(seed)
    expected, _ = reference_reps(by_eights(rows()[:4]), by_eights(others), vectors, **HOW, wrong=wrong)
    assert distance(ours("released-reps", seed)[0], expected.gradient) > 100 * CLOSE


def test_the_vectors_take_adams_step_up_every_fourth_call_from_that_calls_gradient() -> None:
    method, _ = bind("released-reps", CONFIG, scale=SCALE, examples=rows(), settings=SETTINGS, **HOW)
    start = torch.stack(drawn_state(0)[1]).detach()
    expected = [vector.clone().requires_grad_() for vector in start]
    optimizer = torch.optim.Adam(expected, lr=SETTINGS.learning_rate)
    for call in range(8):
        _, ascent = reference_reps(by_eights(rows()[:4]), by_eights(second_rows(call)), expected, **HOW)
        method(CONFIG, base(), TASK, collate(rows()[:4]), generator(call))
        if call % 4 == 3:
            for vector, g in zip(expected, ascent):
                vector.grad = -g
            optimizer.step()
        # Measured: 1e-7. Adam's first steps are nearly the signs of the gradient.
        found = method.state["vectors"]
        assert distance(found, torch.stack(expected).detach()) < 1e-6
        assert torch.equal(found, start) == (call < 3)

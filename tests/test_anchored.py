"""Anchored Learning: its gradient, against an oracle written apart and its slope; its stages, resumed anywhere."""

import copy
import json
import shutil
from collections import deque
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import MINI, cut_to, lfu, read_lines, refusal, sums, write_rows
from compare import distance, flat
from gradients import oracle
from gradients.cases import EXACT, Case, case
from gradients.decoders import plain
from gradients.finite import FINITE, slope_error
from safetensors.torch import load_file
from tiny import random_lora
from torch import Tensor
from torch.utils._pytree import tree_map

from lfu import lora
from lfu.baselines.anchored import answer_logits, log_anchor, take_snapshot, to_lora, train_in_stages
from lfu.checkpoints import checkpoints
from lfu.data.batches import Example
from lfu.io.config import read_config
from lfu.lora import Lora
from lfu.methods import BoundMethod, bind
from lfu.schedule import Settings
from lfu.train import adamw
from lfu.train import train as train_once

SCALE, FAR_SCALE = 2.0, 0.5
ALPHA = 0.3


def reference() -> tuple[Lora, float]:
    """Of another rank and scale than the student's."""
    return random_lora(case().config, 3, seed=21), FAR_SCALE


def snapshot() -> Lora:
    return random_lora(case().config, 2, seed=22)


def gradient(*, start: Lora | None = None, task: Lora | None = None, batch: Any = None, **changed: Any) -> Tensor:
    """lfu's, flat; the student is the case's, its snapshot `start`, or itself."""
    given: Case = case()
    options = {"anchor_alpha": ALPHA, "reference": reference()} | changed
    method = bind("anchored", given.config, scale=SCALE, **options)[0]
    method.state.update(take_snapshot(start) if start is not None else {})
    student, batch = task or given.task, batch or given.batch
    return flat(method(given.config, given.base, student, batch, torch.Generator())[0])


# --- the oracle -----------------------------------------------------------------------------------


def predictions(task: Lora, scale: float) -> list[Tensor]:
    """The logits [V] that the plain decoder predicts each answer token with."""
    given, found = case(), []
    for tokens, prompt in given.rows:
        logits = plain(given.config, given.base)(tokens, [(task, scale)], None)[1]
        found += [logits[t] for t in oracle.predicting((tokens, prompt))]
    return found


def anchors(start: Lora, alpha: float, space: str) -> list[Tensor]:
    """The anchor's probabilities [V] at each answer token."""
    pairs = zip(predictions(start, SCALE), predictions(*reference()))
    if space == "logits":
        return [((1 - alpha) * near + alpha * far).softmax(-1) for near, far in pairs]
    return [(1 - alpha) * near.softmax(-1) + alpha * far.softmax(-1) for near, far in pairs]


def divergence(targets: list[Tensor], task: Lora) -> Tensor:
    """Mean over the answer tokens of Σ a·(ln a - ln p)."""
    terms = [(a * (a.log() - z.log_softmax(-1))).sum() for a, z in zip(targets, predictions(task, SCALE))]
    return torch.stack(terms).mean()


def by_hand(targets: list[Tensor]) -> Tensor:
    task = oracle.requiring_gradients(case().task)
    return torch.cat([g.flatten() for g in torch.autograd.grad(divergence(targets, task), oracle.leaves(task))])


def anchored_error(space: str = "logits", alpha: float = ALPHA) -> float:
    """Relative distance from three models and plain autograd."""
    found = gradient(start=snapshot(), space=space, anchor_alpha=alpha)
    return distance(found, by_hand(anchors(snapshot(), alpha, space)))


def anchored_slope_error(space: str = "logits") -> float:
    loss = partial(divergence, anchors(snapshot(), ALPHA, space))
    return slope_error(loss, case().task, gradient(start=snapshot(), space=space))


@pytest.mark.parametrize("space", ["logits", "probabilities"])
def test_the_gradient_is_the_oracles(space: str) -> None:
    assert anchored_error(space) < EXACT
    assert anchored_slope_error(space) < FINITE


def test_the_anchor_is_said_to_be_where_it_is() -> None:
    """The reported divergence, and that mixing logits is not mixing probabilities."""
    given = case()
    for space in ("logits", "probabilities"):
        method = bind("anchored", given.config, scale=SCALE, space=space, anchor_alpha=ALPHA, reference=reference())[0]
        method.state.update(take_snapshot(snapshot()))
        metrics = method(given.config, given.base, given.task, given.batch, torch.Generator())[1]
        expected = divergence(anchors(snapshot(), ALPHA, space), given.task)
        assert float(metrics["divergence"]) == pytest.approx(float(expected), rel=EXACT)
    spaces = [gradient(start=snapshot(), space=space) for space in ("logits", "probabilities")]
    assert distance(*spaces) > 1e-2


# --- its neighbours -------------------------------------------------------------------------------


@pytest.mark.parametrize("space", ["logits", "probabilities"])
def test_without_a_share_of_the_reference_nothing_moves(space: str) -> None:
    assert gradient(anchor_alpha=0.0, space=space).norm() < EXACT * gradient().norm()


@pytest.mark.parametrize("space", ["logits", "probabilities"])
def test_with_nothing_else_it_is_distillation(space: str) -> None:
    distilled = by_hand([z.softmax(-1) for z in predictions(*reference())])
    assert distance(gradient(anchor_alpha=1.0, space=space, start=snapshot()), distilled) < EXACT


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.9])
def test_an_anchor_of_probabilities_at_every_step_is_a_share_of_distillation(alpha: float) -> None:
    share, whole = (gradient(anchor_alpha=value, space="probabilities") for value in (alpha, 1.0))
    assert distance(share, alpha * whole) < EXACT
    assert distance(gradient(anchor_alpha=alpha), alpha * whole) > 1e-2  # of logits it is another method


def test_the_first_stage_towards_the_base_itself_stands_still() -> None:
    still = lora.init(case().config, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert gradient(task=still, reference=(still, SCALE)).norm() < EXACT * gradient().norm()


def test_no_label_is_read() -> None:
    """Only where there is one: the answer stands among the tokens, and other ids in the labels change nothing."""
    batch = case().batch
    others = batch._replace(labels=torch.where(batch.labels < 0, batch.labels, 1))
    assert torch.equal(gradient(batch=others), gradient())


def test_a_snapshot_is_a_copy_by_name() -> None:
    task = random_lora(case().config, 2, seed=1)
    taken, before = take_snapshot(task), flat(task).clone()
    task[0]["q_proj"].A.zero_()
    unordered = dict(sorted(taken.items(), reverse=True))  # as a file may have them
    assert torch.equal(flat(to_lora(unordered, task)), before)


@pytest.mark.parametrize("space", ["logits", "probabilities"])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_an_anchor_of_two_models_that_are_very_sure_is_finite(alpha: float, space: str) -> None:
    """Where a probability is 0 in float32, its logarithm is not asked for."""
    near, far = torch.tensor([[0.0, 300.0, -300.0]]), torch.tensor([[0.0, -300.0, 300.0]])
    assert log_anchor(near, far, alpha, space).isfinite().all()


def test_nothing_of_the_anchor_is_differentiated() -> None:
    given = case()
    task = oracle.requiring_gradients(given.task)
    near = answer_logits(given.config, given.base, given.batch, (task, SCALE))
    assert not log_anchor(near, near, ALPHA, "logits").requires_grad


# --- stages ---------------------------------------------------------------------------------------

STAGES, STEPS = 3, 4  # of each stage: two epochs of two steps


def examples() -> list[Example]:
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(case().config.vocab_size, (8, 6), generator=generator).tolist()
    return [Example(row, 3, number) for number, row in enumerate(tokens, 1)]


def stages_error() -> float:
    """Distance of three stages, continued in the middle of the second, from three runs one after the other."""
    given, settings = case(), Settings(epochs=2, batch_size=4, micro_batch_size=2, learning_rate=1e-2)

    def method(stages: int, carried: dict[str, Tensor]) -> BoundMethod:
        bound, _ = bind("anchored", given.config, scale=SCALE, reference=reference(), stages=stages)
        bound.state.update(carried)
        return bound

    def run(loop: Any, task: Lora, method: BoundMethod, moments: Any, *start: int) -> tuple[Any, Any]:
        optimizer = adamw(task, settings)
        if moments:
            optimizer.load_state_dict(moments)
        return loop(given.config, given.base, task, optimizer, examples(), method, settings, *start), optimizer

    alone = tree_map(Tensor.clone, given.task)
    for _ in range(STAGES):
        before = tree_map(Tensor.clone, alone)
        names = {
            f"{i}.{name}.{x}": getattr(layer[name], x) for i, layer in enumerate(before) for name in layer for x in "AB"
        }
        deque(run(train_once, alone, method(1, names), None)[0], maxlen=0)

    staged = tree_map(Tensor.clone, given.task)
    first = method(STAGES, {})
    steps, optimizer = run(train_in_stages, staged, first, None)
    deque(islice(steps, 6), maxlen=0)
    saved, moments = tree_map(Tensor.clone, (staged, first.state)), copy.deepcopy(optimizer.state_dict())
    deque(run(train_in_stages, saved[0], method(STAGES, saved[1]), moments, 6)[0], maxlen=0)
    return distance(saved[0], alone)


def test_stages_are_runs_one_after_the_other() -> None:
    assert stages_error() == 0


CONFIG = read_config(MINI / "config.json")
COMMON = {
    "model": MINI, "template": "plain", "batch_size": 4, "micro_batch_size": 2, "epochs": 2, "learning_rate": 1e-2,
    "rank": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rows, an SFT run as the reference, and an anchored run that was never interrupted."""
    folder = tmp_path_factory.mktemp("anchored")
    data = write_rows(folder / "rows.jsonl", sums(8))
    assert lfu("train", **COMMON, data=data, out=folder / "sft", method="sft", seed=1) == 0
    assert train(folder, folder / "whole", keep=100) == 0
    return folder


def train(made: Path, out: Path, **options: Any) -> int:
    own = {"data": made / "rows.jsonl", "method": "anchored", "reference": made / "sft" / "adapter", "stages": STAGES}
    return lfu("train", **COMMON | {"out": out, "save_every": 1, "valid": made / "rows.jsonl"} | own | options)


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def log(run: Path) -> list[dict[str, Any]]:
    timing = {"seconds", "tokens_per_second", "valid_seconds"}
    return [{k: v for k, v in line.items() if k not in timing} for line in read_lines(run / "log.jsonl")]


def test_each_stage_begins_anew(made: Path) -> None:
    """Schedule and moments begin again; the snapshot is the adapter as the last stage left it."""
    lines = [line for line in log(made / "whole") if line["step"]]
    assert [line["step"] for line in lines] == list(range(1, STAGES * STEPS + 1))
    assert [line["epoch"] for line in lines] == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]
    rates = [line["learning_rate"] for line in lines]
    assert rates[:STEPS] == rates[STEPS : 2 * STEPS] == rates[2 * STEPS :]
    for done in range(1, STAGES * STEPS + 1):
        folder = made / "whole" / "checkpoints" / f"step-{done}"
        moments, method = (load_file(folder / f"{name}.safetensors") for name in ("optimizer", "method"))
        assert int(moments["0.step"]) == (done - 1) % STEPS + 1
        if stage := (done - 1) // STEPS:
            start = lora.load(made / "whole" / "checkpoints" / f"step-{stage * STEPS}", CONFIG)[0]
        else:  # B = 0: the base
            start = lora.init(CONFIG, 2, generator=torch.Generator().manual_seed(42))
        snapshot = take_snapshot(start)
        assert method.keys() == snapshot.keys()
        assert all(torch.equal(method[name], snapshot[name]) for name in snapshot)


@pytest.mark.parametrize("done", [1, 3, 4, 5, 8, 11])
def test_a_run_goes_on_from_any_step_of_any_stage(done: int, made: Path, tmp_path: Path) -> None:
    """Within a stage and at its border: bit for bit."""
    out = cut_to(made / "whole", tmp_path / "run", done)
    assert train(made, out, keep=100, resume=True) == 0
    assert log(out) == log(made / "whole")
    for name in ("adapter", "best", checkpoints(made / "whole")[-1].relative_to(made / "whole")):
        assert weights(out / name) == weights(made / "whole" / name)


def test_the_forecast_counts_reference_and_snapshot(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(made, tmp_path / "run") == 0
    size = sum(t.nbytes for t in load_file(made / "sft" / "adapter" / "adapter_model.safetensors").values()) / 2**20
    assert f"reference and snapshot {2 * size:.1f} MiB." in capsys.readouterr().out


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"reference": None}, "The method anchored needs a reference"),
        ({"method": "sft", "stages": None}, "The method sft has no reference"),
        ({"method": "sft", "reference": None}, "The method sft has no stages"),
        ({"anchor_alpha": 1.5}, "anchor-alpha is the reference's share of the anchor, from 0 to 1, not 1.5"),
        ({"stages": 0}, "stages must be at least 1"),
        ({"template": "question"}, "was trained with other prompts: give --template plain"),
        ({"lambda": 1.0}, "The method anchored has no lambda"),
    ],
)
def test_what_cannot_be_used_is_refused(
    changes: dict[str, Any], sentence: str, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(made, tmp_path / "run", **changes) == 2
    assert sentence in refusal(capsys)
    assert not (tmp_path / "run").exists()


def test_a_reference_of_another_model_is_refused(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(made / "sft" / "adapter", tmp_path / "other")
    settings = json.loads((other / "lfu_config.json").read_text())
    (other / "lfu_config.json").write_text(json.dumps(settings | {"model_fingerprint": "of another"}))
    assert train(made, tmp_path / "run", reference=other) == 2
    assert "whose files differ" in refusal(capsys)


def test_another_reference_is_another_run(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = cut_to(made / "whole", tmp_path / "run", 3)
    assert train(made, out, keep=100, resume=True, reference=made / "whole" / "adapter") == 2
    assert "the reference differs" in refusal(capsys)


def test_a_mixture_that_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match="of logits or of probabilities"):
        gradient(space="odds")

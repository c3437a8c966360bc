"""Rows held back: what is measured, which adapter is the best, when a run stops, and that all of it is resumed."""

import json
import math
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import MINI, cut_to, environment, flags, lfu, read_lines, refusal, write_rows

from lfu import Format, encode_rows, load, load_tokenizer, lora, read_rows
from lfu.checkpoints import checkpoints
from lfu.evaluation.nll import answer_nll
from lfu.train import StepMetrics
from lfu.validation import best, hold_back, is_over, watch

ROWS = [json.loads(line) for line in (MINI / "math" / "train.jsonl").read_text().splitlines()[:28]]
TRAIN = {
    "model": MINI, "template": "question", "rank": 2, "learning_rate": 0.03, "batch_size": 4, "micro_batch_size": 2,
    "epochs": 8, "method": "sft", "hold_back": 8, "dtype": "float64",
}  # fmt: skip
"""20 rows to train on: 40 steps, with an evaluation before the first and after each fifth."""
TIMES = {"seconds", "tokens_per_second", "valid_seconds"}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", ROWS)


@pytest.fixture(scope="module")
def finished(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that stops by itself. To be read, not changed."""
    out = tmp_path_factory.mktemp("finished") / "run"
    assert lfu("train", data=rows, out=out, save_every=1, keep=99, patience=2, **TRAIN) == 0
    return out


def timeless(out: Path) -> list[dict[str, float]]:
    return [
        {name: value for name, value in line.items() if name not in TIMES} for line in read_lines(out / "log.jsonl")
    ]


def weights(out: Path) -> dict[str, bytes]:
    return {name: (out / name / "adapter_model.safetensors").read_bytes() for name in ("adapter", "best")}


def history(out: Path) -> list[tuple[int, float]]:
    return [(int(line["step"]), line["valid"]) for line in read_lines(out / "log.jsonl") if "valid" in line]


# --- what is measured -----------------------------------------------------------------------------


def test_what_is_logged_is_the_nll_of_the_rows_held_back(rows: Path, finished: Path) -> None:
    config, base = load(MINI, dtype=torch.float64)
    tokenizer = load_tokenizer(MINI, config.vocab_size)
    _, held = hold_back(encode_rows(rows, read_rows(rows), tokenizer, Format("question"))[0], 8, 42)
    step, lowest = best(history(finished))
    saved = json.loads((finished / "best" / "lfu_config.json").read_text())
    assert (saved["best_step"], saved["best_valid"]) == (step, lowest)
    for folder, value in (("best", lowest), ("adapter", history(finished)[-1][1])):
        adapter = lora.load(finished / folder, config, dtype=torch.float64)
        assert answer_nll(config, base, held, [adapter]).mean == pytest.approx(value, rel=1e-6)  # saved in float32
    assert answer_nll(config, base, held).mean == pytest.approx(history(finished)[0][1], rel=1e-12)


def test_the_best_step_is_not_the_last_and_patience_ends_the_run(finished: Path) -> None:
    steps = [step for step, _ in history(finished)]
    assert steps == list(range(0, steps[-1] + 1, 5))
    assert best(history(finished))[0] == steps[-3] < steps[-1] < 40
    assert read_lines(finished / "log.jsonl")[-1]["step"] == steps[-1]
    assert weights(finished)["adapter"] != weights(finished)["best"]
    assert [path.name for path in checkpoints(finished)][-1] == f"step-{steps[-1]}"


def test_rows_held_back_are_not_trained_on(rows: Path) -> None:
    tokenizer = load_tokenizer(MINI, 2**31)
    examples = encode_rows(rows, read_rows(rows), tokenizer, Format("question"))[0]
    rest, held = hold_back(examples, 8, 42)
    assert sorted(each.line_number for each in rest + held) == list(range(1, 29))
    assert [each.line_number for each in rest] == sorted(each.line_number for each in rest)
    assert held != hold_back(examples, 8, 43)[1]


def test_validation_moves_nothing(rows: Path, finished: Path, tmp_path: Path) -> None:
    """The same rows trained on without it, from a file of their own."""
    _, held = hold_back([*range(28)], 8, 42)  # type: ignore[list-item]
    data = write_rows(tmp_path / "rest.jsonl", [row for number, row in enumerate(ROWS) if number not in held])
    valid = write_rows(tmp_path / "held.jsonl", [ROWS[number] for number in held])
    options = TRAIN | {"hold_back": None, "data": data}
    assert lfu("train", out=tmp_path / "plain", **options) == 0
    assert lfu("train", out=tmp_path / "valid", valid=valid, eval_every=5, patience=2, **options) == 0
    assert weights(tmp_path / "valid") == weights(finished)
    plain = timeless(tmp_path / "plain")
    assert plain[: len(timeless(finished)) - 1] == [
        {name: value for name, value in line.items() if name != "valid"} for line in timeless(finished)[1:]
    ]


def stubbed(values: list[float], patience: int | None, every: int = 1) -> list[tuple[int, float]]:
    """What `watch` finds, where the evaluations have these values."""
    found: list[tuple[int, float]] = []
    left = iter(values)
    steps = iter([StepMetrics(step, 1, 1, {"sft": 0.0}, 0.0, 0.0) for step in range(1, len(values))])
    list(watch(steps, lambda: next(left), found, every, patience, 0, len(values) - 1))
    return found


@pytest.mark.parametrize(
    ("values", "patience", "steps"),
    [
        ([3, 2, 1, 2, 3, 0], None, 6), ([3, 2, 1, 2, 3, 0], 1, 4), ([3, 2, 1, 2, 3, 0], 2, 5),
        ([3, 2, 1, 2, 3, 0], 3, 6), ([1, 1, 1, 1], 2, 3), ([1, 2, 3, 4], 1, 2), ([4, 3, 2, 1], 1, 4),
    ],
)  # fmt: skip
def test_patience(values: list[float], patience: int | None, steps: int) -> None:
    """Equal is no improvement, and the value before the first step counts."""
    assert len(stubbed(values, patience)) == steps


def test_the_first_of_equals_is_the_best() -> None:
    assert best([(0, 2.0), (5, 1.0), (10, 1.0)]) == (5, 1.0)
    assert not is_over([], 1)


# --- resumed --------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [0, 3, 5, 12])
def test_a_resumed_run_finds_the_same_best_and_the_same_end(
    step: int, rows: Path, finished: Path, tmp_path: Path
) -> None:
    out = cut_to(finished, tmp_path / "run", step)
    if step == 12:
        shutil.rmtree(out / "best")
        shutil.copytree(finished / "best", out / "best")
    assert lfu("train", data=rows, out=out, save_every=1, keep=99, patience=2, resume=True, **TRAIN) == 0
    assert timeless(out) == timeless(finished)
    assert weights(out) == weights(finished)


def test_a_run_out_of_patience_is_finished(rows: Path, finished: Path, tmp_path: Path) -> None:
    out = shutil.copytree(finished, tmp_path / "run")
    assert lfu("train", data=rows, out=out, save_every=1, keep=99, patience=2, resume=True, **TRAIN) == 0
    assert timeless(out) == timeless(finished)
    assert weights(out) == weights(finished)


def test_a_killed_run_too(rows: Path, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = TRAIN | {"data": rows, "out": out, "save_every": 3, "patience": 2}
    command = [sys.executable, "-m", "lfu.cli", "train", *flags(**options)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment()) as run:
        while not checkpoints(out) and run.poll() is None:
            time.sleep(0.002)
        run.send_signal(signal.SIGKILL)
    assert run.returncode == -signal.SIGKILL
    assert lfu("train", resume=True, **options) == 0
    assert timeless(out) == timeless(finished)
    assert weights(out) == weights(finished)


def test_several_processes_stop_together(rows: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = TRAIN | {"data": rows, "patience": 1, "epochs": 40}
    for processes, name in ((1, "one"), (2, "two")):
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        typed = [sys.executable, *launcher, "-m", "lfu.cli", "train", *flags(**options, out=tmp_path / name)]
        done = subprocess.run(typed, capture_output=True, text=True, env=environment(), timeout=300)
        assert done.returncode == 0, done.stderr
    one, two = history(tmp_path / "one"), history(tmp_path / "two")
    assert [step for step, _ in one] == [step for step, _ in two]
    assert len(one) < 41
    assert [value for _, value in two] == pytest.approx([value for _, value in one], rel=1e-11)


# --- refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"hold_back": 28}, "Of 28 rows 28 cannot be held back"),
        ({"hold_back": 0}, "hold-back must be at least 1"),
        ({"hold_back": None, "patience": 1}, "need rows for validation"),
        ({"valid": MINI / "math" / "test.jsonl"}, "exclude each other"),
        ({"eval_every": 0}, "eval-every must be at least 1"),
    ],
)
def test_what_cannot_be_validated(
    options: dict[str, Any], sentence: str, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lfu("train", **TRAIN | {"data": rows, "out": tmp_path / "run"} | options) == 2
    assert sentence in refusal(capsys)
    assert not (tmp_path / "run").exists()


def test_another_validation_is_another_run(
    rows: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = cut_to(finished, tmp_path / "run", 3)
    assert lfu("train", data=rows, out=out, patience=2, resume=True, **TRAIN | {"hold_back": 9}) == 2
    assert "hold-back was 8 and is 9" in refusal(capsys)
    assert math.isfinite(best(history(out))[1])

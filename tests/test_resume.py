"""A run that was stopped, by Ctrl-C or without warning, and continued is the run that was never stopped.

Bit for bit: the adapter, the optimizer's moments, and every number in the log that is not a time.
"""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import MINI, cut_to, environment, read_lines, refusal, uneven_sums, write_rows

from lfu import cli, methods
from lfu.checkpoints import checkpoints

METHODS = ("sft", "lfu-lora", "lfu-reps", "released-lora", "released-reps", "neftune")
"""SFT, each auxiliary, and those that draw or carry along something else."""
SHORT: dict[str, Any] = {"model": MINI, "template": "plain", "rank": 2, "learning_rate": 0.01, "batch_size": 4}
STEPS = 10
"""20 rows in batches of 4, two epochs: the second begins after step 5."""
TIMES = ("seconds", "tokens_per_second")


def typed(**options: Any) -> list[str]:
    return [f"--{name.replace('_', '-')}={value}" for name, value in options.items() if value is not True] + [
        f"--{name}" for name, value in options.items() if value is True
    ]


def train(out: Path, data: Path, **options: Any) -> int:
    return cli.main(["train", *typed(out=out, data=data, **{"epochs": 2, "micro_batch_size": 2} | SHORT | options)])


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", uneven_sums(20))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """method -> a finished run with a checkpoint of each step. To be read, not changed."""
    folder = tmp_path_factory.mktemp("unbroken")
    data = write_rows(folder / "rows.jsonl", uneven_sums(20))

    def run(method: str) -> Path:
        out = folder / method
        if not out.exists():
            assert train(out, data, method=method, save_every=1, keep=STEPS) == 0
        return out

    return run


def log(run: Path) -> list[dict[str, float]]:
    return read_lines(run / "log.jsonl")


def timeless(run: Path) -> list[dict[str, float]]:
    return [{name: value for name, value in line.items() if name not in TIMES} for line in log(run)]


def weights(folder: Path) -> dict[str, bytes]:
    """What is trained, and where there are such, what the optimizer and the method keep."""
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


def kept(method: str) -> set[str]:
    """The tensor files of a checkpoint; only one method has something of its own to keep."""
    names = ["adapter_model", "optimizer", *(["method"] if method == "released-reps" else [])]
    return {f"{name}.safetensors" for name in names}


def assert_same(run: Path, reference: Path) -> None:
    assert timeless(run) == timeless(reference)
    assert weights(run / "adapter") == weights(reference / "adapter")
    last, expected = (checkpoints(each)[-1] for each in (run, reference))
    assert last.name == expected.name
    assert weights(last).keys() == kept(json.loads((run / "settings.json").read_text())["method"])
    assert weights(last) == weights(expected)


def interrupt(monkeypatch: pytest.MonkeyPatch, method: str, call: int, number: int = signal.SIGINT) -> None:
    """Send this process a signal while the method computes its `call`-th micro-batch."""
    calls, compute = [], methods.METHODS[method].gradient

    def computing(*arguments: Any, **bound: Any) -> Any:
        batch = arguments[3]
        if len(batch.tokens) > 1:  # a row alone is how a run predicts its memory
            calls.append(batch)
            if len(calls) == call:
                signal.raise_signal(number)
        return compute(*arguments, **bound)

    monkeypatch.setitem(methods.METHODS, method, methods.METHODS[method]._replace(gradient=computing))


# --- continued ------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [3, 5, 8])
@pytest.mark.parametrize("method", METHODS)
def test_an_interrupted_run_continues_bit_for_bit(
    method: str, step: int, data: Path, unbroken: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Within the first epoch, between two epochs, and within the second; the signal comes in the middle of a step."""
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt(patch, method, 2 * step - 1)
        assert train(out, data, method=method, save_every=100) == 130
    assert f"lfu: Stopped after step {step} of {STEPS}; continue with --resume." in capsys.readouterr().err
    assert [path.name for path in checkpoints(out)] == [f"step-{step}"]
    assert [line["step"] for line in log(out)] == list(range(1, step + 1))
    assert not (out / "adapter").exists()

    assert train(out, data, method=method, save_every=100, resume=True) == 0
    assert f"Resuming after step {step}." in capsys.readouterr().out
    assert [line["step"] for line in log(out)] == list(range(1, STEPS + 1))
    assert_same(out, unbroken(method))


@pytest.mark.parametrize("method", METHODS)
def test_every_step_changes_all_that_is_compared(method: str, unbroken: Callable[..., Path]) -> None:
    """So a run that went on from another step, or without its moments, could not look the same."""
    steps = checkpoints(unbroken(method))
    assert len(steps) == STEPS
    for before, after in pairwise(steps):
        changed = {name for name in weights(before) if weights(before)[name] != weights(after)[name]}
        assert changed == kept(method)
    assert len({line["sft"] for line in log(unbroken(method))}) == STEPS


@pytest.mark.parametrize("method", ["lfu-lora", "released-reps"])
def test_a_step_that_cannot_be_made_costs_no_other(
    method: str, data: Path, unbroken: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Out of memory in the second micro-batch of step 4. What released-reps carries along has moved on by then."""
    out, calls, compute = tmp_path / "run", [], methods.METHODS[method].gradient

    def full(*arguments: Any, **bound: Any) -> Any:
        calls.append(len(arguments[3].tokens) > 1)  # a row alone is how a run predicts its memory
        if sum(calls) == 8:
            raise torch.OutOfMemoryError("full")
        return compute(*arguments, **bound)

    with monkeypatch.context() as patch:
        patch.setitem(methods.METHODS, method, methods.METHODS[method]._replace(gradient=full))
        assert train(out, data, method=method, save_every=100) == 2
    assert "Step 4: out of memory in a batch of 2 x" in capsys.readouterr().err
    saved = [path.name for path in checkpoints(out)]
    assert saved == ([] if method == "released-reps" else ["step-3"])
    assert train(out, data, method=method, save_every=100, resume=True) == 0
    assert_same(out, unbroken(method))


def test_the_log_is_cut_to_the_checkpoint(data: Path, unbroken: Callable[..., Path], tmp_path: Path) -> None:
    """Lines of steps after the checkpoint, and one that was half written, are dropped before the run goes on."""
    out = cut_to(unbroken("lfu-reps"), tmp_path / "run", 4)
    lines = (out / "log.jsonl").read_text().splitlines(keepends=True)
    (out / "log.jsonl").write_text("".join(lines[:6]) + lines[6][:40])
    assert train(out, data, method="lfu-reps", save_every=100, resume=True) == 0
    assert [line["step"] for line in log(out)] == list(range(1, STEPS + 1))
    assert log(out)[:4] == log(unbroken("lfu-reps"))[:4]
    assert_same(out, unbroken("lfu-reps"))


def test_a_half_written_checkpoint_is_ignored(data: Path, unbroken: Callable[..., Path], tmp_path: Path) -> None:
    out = cut_to(unbroken("sft"), tmp_path / "run", 4)
    torn = out / "checkpoints" / "step-7.1234.tmp"
    shutil.copytree(out / "checkpoints" / "step-4", torn)
    (torn / "optimizer.safetensors").write_bytes(b"torn")
    assert train(out, data, method="sft", save_every=100, resume=True) == 0
    assert_same(out, unbroken("sft"))


def test_a_run_without_a_checkpoint_starts_from_the_beginning(
    data: Path, unbroken: Callable[..., Path], tmp_path: Path
) -> None:
    out = cut_to(unbroken("lfu-lora"), tmp_path / "run", 0)
    assert checkpoints(out) == []
    assert train(out, data, method="lfu-lora", save_every=100, resume=True) == 0
    assert_same(out, unbroken("lfu-lora"))


def test_a_finished_run_stays_as_it_is(data: Path, unbroken: Callable[..., Path], tmp_path: Path) -> None:
    out = shutil.copytree(unbroken("sft"), tmp_path / "run")
    assert train(out, data, method="sft", save_every=1, keep=STEPS, resume=True) == 0
    assert log(out) == log(unbroken("sft"))
    assert_same(out, unbroken("sft"))


def test_model_and_data_may_move(unbroken: Callable[..., Path], tmp_path: Path) -> None:
    """What they hold counts, not where they are."""
    model = shutil.copytree(MINI, tmp_path / "model", ignore=shutil.ignore_patterns("*.jsonl"))
    out = cut_to(unbroken("sft"), tmp_path / "run", 6)
    data = write_rows(tmp_path / "elsewhere.jsonl", uneven_sums(20))
    assert train(out, data, method="sft", model=model, resume=True) == 0
    assert_same(out, unbroken("sft"))


def test_a_run_may_go_on_in_less_memory(data: Path, unbroken: Callable[..., Path], tmp_path: Path) -> None:
    """As a run is told to that has run out of it."""
    out = cut_to(unbroken("lfu-lora"), tmp_path / "run", 4)
    assert train(out, data, method="lfu-lora", save_every=1, keep=STEPS, remat=True, resume=True) == 0
    assert_same(out, unbroken("lfu-lora"))


@pytest.mark.parametrize("method", ["lfu-lora", "released-reps"])
def test_in_bfloat16_too(method: str, data: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "run"
    options = {"method": method, "dtype": "bfloat16", "save_every": 1, "keep": STEPS}
    assert train(whole, data, **options) == 0
    cut_to(whole, out, 4)
    assert train(out, data, resume=True, **options) == 0
    assert_same(out, whole)


def test_published_settings_may_be_spelled_out(data: Path, unbroken: Callable[..., Path], tmp_path: Path) -> None:
    out = cut_to(unbroken("lfu-lora"), tmp_path / "run", 9)
    told = {"alpha": 0.1, "lambda": 5, "layers": "1-4", "norm": "mean", "seed": 42}
    assert train(out, data, method="lfu-lora", resume=True, **told) == 0
    assert_same(out, unbroken("lfu-lora"))


@pytest.mark.parametrize(("keep", "kept"), [(1, [10]), (2, [9, 10]), (3, [6, 9, 10])])
def test_the_last_checkpoints_are_kept(data: Path, tmp_path: Path, keep: int, kept: list[int]) -> None:
    out = tmp_path / "run"
    every = 1 if keep < 3 else 3
    assert train(out, data, method="sft", save_every=every, keep=keep) == 0
    assert [path.name for path in checkpoints(out)] == [f"step-{step}" for step in kept]
    assert len(list((out / "checkpoints").iterdir())) == keep


# --- stopped from outside -------------------------------------------------------------------------

LONG = {"method": "lfu-lora", "epochs": 8, "save_every": 2}
"""40 steps: time enough to be stopped in the middle."""


@pytest.fixture(scope="module")
def long_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("long")
    assert train(folder / "run", write_rows(folder / "rows.jsonl", uneven_sums(20)), **LONG) == 0
    return folder / "run"


def stopped_by(number: int, out: Path, data: Path, step: int) -> tuple[int, str]:
    """Train in a process of its own and send it a signal once its log shows `step`: its exit status and last words."""
    command = [
        sys.executable,
        "-m",
        "lfu.cli",
        "train",
        *typed(out=out, data=data, micro_batch_size=2, **SHORT | LONG),
    ]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment()
    ) as run:
        deadline = time.monotonic() + 300
        while not (out / "log.jsonl").exists() or (out / "log.jsonl").read_text().count("\n") < step:
            assert run.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        run.send_signal(number)
        _, words = run.communicate(timeout=300)
    return run.returncode, words


def test_a_killed_run_continues_bit_for_bit(data: Path, long_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    status, _ = stopped_by(signal.SIGKILL, out, data, step=5)
    assert status == -signal.SIGKILL
    assert not (out / "adapter").exists()
    saved = checkpoints(out)[-1]
    assert int(saved.name.removeprefix("step-")) in range(4, 40, 2)
    assert train(out, data, **LONG, resume=True) == 0
    assert [line["step"] for line in log(out)] == list(range(1, 41))
    assert_same(out, long_run)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_run_asked_to_stop_continues_bit_for_bit(number: int, data: Path, long_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    status, words = stopped_by(number, out, data, step=3)
    step = len(log(out))
    assert status == 130
    assert words.splitlines()[-1] == f"lfu: Stopped after step {step} of 40; continue with --resume."
    assert "Traceback" not in words
    assert checkpoints(out)[-1].name == f"step-{step}"
    assert train(out, data, **LONG, resume=True) == 0
    assert_same(out, long_run)


def test_a_second_ctrl_c_stops_at_once(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    with monkeypatch.context() as patch:
        interrupt(patch, "sft", 7)
        interrupt(patch, "sft", 7)
        assert train(out, data, method="sft", save_every=2) == 130
    assert "lfu: Stopped in the middle of a step; continue from the last checkpoint" in capsys.readouterr().err
    assert [path.name for path in checkpoints(out)] == ["step-2"]
    assert len(log(out)) == 3
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == handlers


def test_ctrl_c_in_the_last_step_loses_nothing(
    data: Path, unbroken: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    interrupt(monkeypatch, "sft", 2 * STEPS)
    assert train(out, data, method="sft") == 0
    assert_same(out, unbroken("sft"))


# --- refused --------------------------------------------------------------------------------------


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"seed": 1}, "seed was 42 and is 1"),
        ({"batch_size": 8}, "batch-size was 4 and is 8"),
        ({"micro_batch_size": 4}, "micro-batch-size was 2 and is 4"),
        ({"method": "sft"}, "method was 'lfu-reps' and is 'sft'"),
        ({"alpha": 0.2}, "alpha was 0.1 and is 0.2"),
        ({"lambda": 1}, "lambda was 0.1 and is 1.0"),
        ({"layers": "2-4"}, r"layers was \[1, 2, 3, 4\] and is \[2, 3, 4\]"),
        ({"template": "alpaca"}, "template was 'plain' and is 'alpaca'"),
        ({"epochs": 3}, "epochs was 2 and is 3"),
        ({"limit": 5}, "limit was None and is 5"),
    ],
)
def test_a_run_is_not_continued_with_other_settings(
    changes: dict[str, Any], sentence: str, data: Path, unbroken: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = unbroken("lfu-reps")
    before = tree(out)
    assert train(out, data, **{"method": "lfu-reps", "resume": True} | changes) == 2
    assert re.match(rf"{out} holds another run: (.*; )?{sentence}(; .*)?\. Give the same settings", refusal(capsys))
    assert tree(out) == before


def test_a_run_is_not_continued_with_other_data(
    data: Path, unbroken: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """One more space, which changes no row."""
    data.write_text(data.read_text().replace('{"question"', '{ "question"', 1))
    assert train(unbroken("sft"), data, method="sft", resume=True) == 2
    assert "holds another run: the data file differs." in refusal(capsys)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_run_is_not_continued_with_another_model(
    file: str, data: Path, unbroken: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(MINI, tmp_path / "model", ignore=shutil.ignore_patterns("*.jsonl"))
    content = bytearray((model / file).read_bytes())
    content[-3] ^= 1 if file == "model.safetensors" else ord("\n") ^ ord(" ")
    (model / file).write_bytes(bytes(content))
    assert train(unbroken("sft"), data, method="sft", model=model, resume=True) == 2
    assert "holds another run: the model files differ." in refusal(capsys)


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize("how", ["flipped", "missing"])
def test_a_damaged_checkpoint_is_refused(
    file: str, how: str, data: Path, unbroken: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = cut_to(unbroken("sft"), tmp_path / "run", 4)
    damaged = out / "checkpoints" / "step-4" / file
    content = bytearray(damaged.read_bytes())
    content[-5] ^= 16
    damaged.write_bytes(bytes(content)) if how == "flipped" else damaged.unlink()
    assert train(out, data, method="sft", resume=True) == 2
    assert refusal(capsys).startswith(f"{damaged} is damaged")
    assert not (out / "adapter").exists()


@pytest.mark.parametrize("state", [{"sha256": {}}, {"step": "4", "sha256": {}}, {"step": 4}])
def test_a_checkpoint_without_its_step_or_checksums_is_refused(
    state: dict[str, Any], data: Path, unbroken: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = cut_to(unbroken("sft"), tmp_path / "run", 4)
    path = checkpoints(out)[-1] / "state.json"
    path.write_text(json.dumps(state))
    assert train(out, data, method="sft", save_every=1, keep=STEPS, resume=True) == 2
    assert refusal(capsys) == f"{path} must name a step and the checksums of the tensor files."


def test_a_folder_set_aside_is_no_checkpoint(data: Path, unbroken: Callable[..., Path], tmp_path: Path) -> None:
    out = cut_to(unbroken("sft"), tmp_path / "run", 4)
    (out / "checkpoints" / "step-4").rename(out / "checkpoints" / "step-4.damaged")
    assert train(out, data, method="sft", resume=True) == 0
    assert_same(out, unbroken("sft"))


def test_there_must_be_a_run_to_continue(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert train(out, data, method="sft", resume=True) == 2
    assert (
        refusal(capsys) == f"{out / 'settings.json'} does not exist: there is no run to continue. Leave out --resume."
    )
    assert not out.exists()

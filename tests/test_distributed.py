"""Several processes under torchrun train what one process trains, and a lost one costs no more than its last steps."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from commands import MINI, environment, read_lines, uneven_sums, write_rows
from compare import distance
from safetensors.torch import load_file

from lfu.checkpoints import checkpoints

COMMON: dict[str, Any] = {
    "model": MINI, "dtype": "float64", "template": "plain", "rank": 2, "learning_rate": 0.01, "batch_size": 6,
}  # fmt: skip
CLOSE = 1e-13
"""Relative difference of the trained adapter in float64: sums in another order. Measured: 1e-14; in float32 1e-5."""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", uneven_sums(20))


def command(processes: int, out: Path, data: Path, *flags: str, **options: Any) -> list[str]:
    """`lfu train`, under torchrun if there are several processes. Three micro-batches a step, so two is not half."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    options = COMMON | {"out": out, "data": data, "micro_batch_size": 2} | options
    typed = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    return [sys.executable, *launcher, "-m", "lfu.cli", "train", *typed, *flags]


def run(*arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    typed = command(*arguments, **options)
    return subprocess.run(typed, capture_output=True, text=True, env=environment(), timeout=300)


def log(out: Path) -> list[dict[str, float]]:
    return read_lines(out / "log.jsonl")


def weights(out: Path) -> list[Any]:
    return list(load_file(out / "adapter" / "adapter_model.safetensors").values())


def test_two_processes_train_what_one_trains(data: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    alone, together = run(1, one, data), run(2, two, data)
    assert alone.returncode == together.returncode == 0, together.stderr
    assert distance(weights(two), weights(one)) < CLOSE
    assert together.stdout.count("rows left out") == 1  # only the first process speaks
    for mine, expected in zip(log(two), log(one), strict=True):
        assert mine.keys() == expected.keys()
        for name in mine.keys() - {"seconds", "tokens_per_second"}:
            assert mine[name] == pytest.approx(expected[name], rel=1e-11)


def test_two_processes_take_the_same_snapshots(data: Path, tmp_path: Path) -> None:
    """Anchored Learning, whose stages each freeze what all processes have."""
    assert run(1, tmp_path / "sft", data, method="sft", epochs=1).returncode == 0
    how = {"method": "anchored", "reference": tmp_path / "sft" / "adapter", "stages": 2, "epochs": 1}
    one, two = tmp_path / "one", tmp_path / "two"
    assert run(1, one, data, **how).returncode == run(2, two, data, **how).returncode == 0
    assert distance(weights(two), weights(one)) < CLOSE


def test_more_processes_than_micro_batches(data: Path, tmp_path: Path) -> None:
    one, three = tmp_path / "one", tmp_path / "three"
    options = {"limit": 4, "epochs": 2}  # two micro-batches a step
    assert run(1, one, data, **options).returncode == run(3, three, data, **options).returncode == 0
    assert distance(weights(three), weights(one)) < CLOSE


def test_a_lost_process_stops_the_run_and_one_process_can_go_on(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = {"epochs": 200, "save_every": 1}
    whole = subprocess.Popen(
        command(2, out, data, **options), stderr=subprocess.PIPE, text=True, env=environment(), start_new_session=True
    )
    try:
        wait_for(lambda: len(checkpoints(out)) > 0 and len(log(out)) > 2)
        os.kill(worker(whole.pid, rank=1), signal.SIGKILL)
        _, errors = whole.communicate(timeout=120)
    finally:
        if whole.poll() is None:
            os.killpg(whole.pid, signal.SIGKILL)
    assert whole.returncode != 0
    # The first process notices it in its next sum, or is told by torchrun between two steps.
    assert "lfu: Another process of this run is gone" in errors or "lfu: Stopped after step" in errors
    (last,) = checkpoints(out)
    steps = int(last.name.removeprefix("step-"))
    assert steps >= 2
    stopped = subprocess.Popen(
        command(1, out, data, "--resume", **options), stdout=subprocess.PIPE, text=True, env=environment()
    )
    try:
        wait_for(lambda: len(log(out)) > steps + 2)
    finally:
        stopped.terminate()
    assert f"Resuming after step {steps}." in stopped.communicate(timeout=120)[0]


def wait_for(condition: Any, seconds: float = 200) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if condition():
                return
        except (FileNotFoundError, json.JSONDecodeError):
            pass
        time.sleep(0.1)
    raise TimeoutError(f"Waited {seconds} s in vain.")


def worker(launcher: int, *, rank: int) -> int:
    """The process that torchrun started with this number."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            variables = path.read_bytes().split(b"\0")
            parent = int((path.parent / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except (OSError, IndexError):
            continue
        if parent == launcher and f"RANK={rank}".encode() in variables:
            return int(path.parent.name)
    raise LookupError(f"No process of rank {rank}.")


def test_processes_that_do_not_see_the_same_run_do_not_add_up_their_gradients(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "0"
    assert run(1, out, data, save_every=1, keep=9).returncode == 0
    options = COMMON | {"model": str(MINI), "data": str(data), "micro_batch_size": 2, "save_every": 1, "resume": True}
    script = tmp_path / "apart.py"
    script.write_text(
        "import os\nfrom pathlib import Path\nfrom lfu import cli\n"
        f"cli.train(cli.TrainOptions(out=str(Path({str(tmp_path)!r}) / os.environ['RANK']), **{options!r}))\n"
    )
    together = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    before = weights(out)
    apart = subprocess.run(together, capture_output=True, text=True, env=environment(), timeout=300)
    assert apart.returncode != 0
    assert "give all of them the same options and data, and an --out that they share" in apart.stderr
    assert distance(weights(out), before) == 0


def test_a_method_that_goes_in_turn_wants_one_process(data: Path, tmp_path: Path) -> None:
    refused = run(2, tmp_path / "run", data, method="released-reps")
    assert refused.returncode != 0
    assert "released-reps goes through the micro-batches in turn: train in one process" in refused.stderr
    assert not (tmp_path / "run").exists()

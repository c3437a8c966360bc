"""A training run that is struck at any of its file operations goes on: a short form of `make crash`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from commands import environment

from experiments.children import Ended
from experiments.crash import GOOD, incomplete, judge


def test_training_goes_on_wherever_it_is_struck(tmp_path: Path) -> None:
    out = tmp_path / "points.json"
    command = [sys.executable, "-m", "experiments.crash", "--only", "train", "--faults", "SIGKILL", "ENOSPC"]
    subprocess.run([*command, "--out", str(out)], check=True, env=environment(), timeout=600, capture_output=True)
    points = json.loads(out.read_text(encoding="utf-8"))["points"]
    assert len(points) > 50
    assert not [point for point in points if point["outcome"] not in GOOD]


WHOLE = {"out-o": None, "out-o/a": b"1", "out-o/b": b"2"}
REFUSED, TRACEBACK = Ended(2, "", "lfu: no.\n"), Ended(1, "", "Traceback (most recent call last):\n")
KILLED, DONE = Ended(-9, "", ""), Ended(0, "", "")


@pytest.mark.parametrize(
    ("ended", "half", "found", "outcome"),
    [
        ([KILLED, DONE], "", WHOLE, "same"),
        ([KILLED, REFUSED, DONE], "", WHOLE, "sentence"),
        ([KILLED, REFUSED], "", WHOLE, "sentence"),
        ([KILLED, REFUSED], "", WHOLE | {"out-o/b": b"3"}, "stuck"),
        ([TRACEBACK, DONE], "", WHOLE, "traceback"),
        ([KILLED, DONE], "", WHOLE | {"out-o/b": b"3"}, "different"),
        ([KILLED, DONE], "", {"out-o": None, "out-o/a": b"1"}, "different"),
        ([KILLED, DONE], "out-o/b", WHOLE, "half"),
        ([KILLED, DONE], "", WHOLE | {"out-o/b.1.tmp": b""}, "left over"),
    ],
)
def test_the_worst_is_reported(ended: list[Ended], half: str, found: dict[str, bytes | None], outcome: str) -> None:
    assert judge(ended, half, WHOLE, found) == outcome


@pytest.mark.parametrize(
    ("missing", "half"),
    [
        (None, ""),
        ("step-1/state.json", "out-o/checkpoints/step-1"),
        ("step-1/ema/a.json", "out-o/checkpoints/step-1"),
        ("step-2/state.json", "out-o/checkpoints/step-2"),
    ],
)
def test_a_checkpoint_lacks_a_file(missing: str | None, half: str, tmp_path: Path) -> None:
    """Also one that the undisturbed run has removed in the end: each is to have what the last one has."""
    for name in ("step-1/state.json", "step-1/ema/a.json", "step-2/state.json", "step-2/ema/a.json", "step-3.7.tmp/a"):
        path = tmp_path / "out-o" / "checkpoints" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name != missing:
            path.write_text("{}")
    expected = dict.fromkeys(["out-o/settings.json", "out-o/checkpoints", "out-o/checkpoints/step-2/ema/a.json"], b"")
    expected |= dict.fromkeys(["out-o/checkpoints/step-2", "out-o/checkpoints/step-2/ema"])
    assert incomplete(tmp_path, expected | {"out-o/checkpoints/step-2/state.json": b""}) == half


def test_half_a_file_has_a_final_name(tmp_path: Path) -> None:
    (tmp_path / "out-o.json").write_text('{"a": ')
    assert incomplete(tmp_path, {"out-o.json": {}}) == "out-o.json"

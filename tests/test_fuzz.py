"""Damaged input files and strange options end in the right numbers or in one sentence: a short form of `make fuzz`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from commands import environment

from experiments.children import Ended
from experiments.fuzz import judge_failure, meant


def test_every_case_ends_well(tmp_path: Path) -> None:
    faults = tmp_path / "faults.json"
    command = [sys.executable, "-m", "experiments.fuzz", "--count", "300", "--out", str(faults)]
    subprocess.run(command, check=True, env=environment(), timeout=120, capture_output=True)
    found = json.loads(faults.read_text(encoding="utf-8"))
    assert found["cases"] == 300
    assert not found["faults"]


@pytest.mark.parametrize(
    ("code", "said", "written", "outcome"),
    [
        (2, "lfu: base-m/config.json: wrong.\n", False, "refused"),
        (2, "  0%|    |\r 50%|##  |\nlfu: base-m/config.json: wrong.\n", False, "refused"),
        (2, "usage: lfu train\n" + "x" * 900 + "\nlfu train: error: base-m is wrong\n", False, "refused"),
        (2, "lfu: base-m/config.json: wrong.\n", True, "written"),
        (2, "lfu: base-m/config.json: " + "x" * 500 + "\n", False, "long"),
        (2, "x" * 500 + "\nlfu: base-m/config.json: wrong.\n", False, "long"),
        (2, "lfu: base-m/config.json: \x1b[31m\n", False, "unprintable"),
        (2, "lfu: base-m/config.json:\nwrong.\n", False, "unprintable"),
        (2, "lfu: config: wrong.\n", False, "unclear"),
        (2, "lfu: Out of memory.\n", False, "memory"),
        (1, "Traceback\n  File ...\nValueError: base-m\n", False, "traceback"),
        (1, "Traceback\n  File ...\nMemoryError\n", False, "memory"),
        (-6, "panicked\n", False, "killed"),
        (-14, "", False, "hang"),
    ],
)
def test_a_refusal_is_judged_by_what_it_says(code: int, said: str, written: bool, outcome: str) -> None:
    assert judge_failure(Ended(code, "", said), {"base-m"}, written) == outcome


@pytest.mark.parametrize(
    ("after", "good"),
    [
        ({"eps": 0.25, "name": "a", "tied": True}, True),
        ({"eps": 1e-5, "name": "b", "tied": False}, True),
        ({"eps": float("inf"), "name": "a", "tied": True}, False),
        ({"eps": -1, "name": "a", "tied": True}, False),
        ({"eps": 1e-5, "name": "a", "tied": "false"}, False),
        ({"eps": 1e-5, "name": "a"}, False),
    ],
)
def test_only_a_usual_value_may_change_a_result(after: dict[str, object], good: bool) -> None:
    assert meant({"eps": 1e-5, "name": "a", "tied": True}, after) is good

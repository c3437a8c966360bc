"""The programs in examples/ do what they say."""

import json
import subprocess
import sys
from pathlib import Path

from commands import environment, read_lines

from lfu import model
from lfu.io.config import read_config

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, out: Path) -> str:
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, out], capture_output=True, text=True, env=environment(), timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_notebook_training(tmp_path: Path) -> None:
    said = run("notebook_training.py", tmp_path)
    values = [line["valid"] for line in read_lines(tmp_path / "run" / "log.jsonl") if "valid" in line]
    assert json.loads((tmp_path / "run" / "best" / "lfu_config.json").read_text())["best_valid"] == min(values)
    assert min(values) < 0.5 * values[0]
    assert "(to be: " in said
    assert (tmp_path / "run.svg").stat().st_size > 10_000
    config, _ = model.load(tmp_path / "merged")
    assert config == read_config(EXAMPLES.parent / "weights" / "mini" / "config.json")


def test_own_method(tmp_path: Path) -> None:
    said = run("own_method.py", tmp_path / "run")
    log = read_lines(tmp_path / "run" / "log.jsonl")
    assert log[0]["distance"] == 0.0 < log[-1]["distance"]
    assert log[-1]["sft"] < log[0]["sft"]
    assert json.loads((tmp_path / "run" / "settings.json").read_text())["lam"] == 10.0
    assert "strict" in said


def test_examples_are_short() -> None:
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text().splitlines()) < 150, path

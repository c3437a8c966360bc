"""What `scripts/` does for the paper's tables: with commands that only note what they are asked, and on tiny rows."""

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import MINI, environment, read_lines, write_rows

from lfu import lora
from lfu.cli import parser
from lfu.io.config import read_config

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "scripts"
SHELL, PROGRAMS = sorted(SCRIPTS.glob("*.sh")), sorted(SCRIPTS.glob("*.py"))

NOTING = r"""#!/bin/bash
printf '%q ' "$(basename $0)" "$@" >> calls; echo >> calls
for ((at = 1; at < $#; at++)); do
    name=${!at} next=$((at + 1)); value=${!next}
    case $name in
        --adapter) [ -d $value ] || { echo no $value >&2; exit 1; } ;;
        --data) [ -f $value ] || { echo no $value >&2; exit 1; } ;;
        --out | --output_path) out=$value ;;
    esac
done
case $1 in
    train) mkdir -p $out/{adapter,ema,checkpoints/step-{1,2,3,4,234,468,936,1404}}; touch $out/settings.json ;;
    eval) echo '{"flexible": 1.0}' > $out ;;
    distill) touch $out ;;
    *) mkdir -p $out; [ ! -f scores.json ] || cp scores.json $out/results_1.json ;;
esac
"""
"""In place of `lfu` and `lm_eval`: refuses an adapter or a file that no command before it has made."""

# Table 16, Llama-3.1-8B fine-tuned on GSM8K; below, its rows in Table 1 (LfU (RepS): in Table 3).
TASKS = "gsm8k mathqa asdiv_cot_llama mmlu piqa hellaswag lambada_standard arc_challenge coqa toxigen truthfulqa_mc2"
TABLE_16 = {
    "vanilla": "26.7 39.4 47.5 63.4 81.3 78.9 68.1 51.5 80.6 42.7 45.2",
    "sft": "61.6 33.9 59.1 63.5 81.4 79.5 68.9 50.3 79.9 43.1 45.1",
    "neftune": "62.1 33.1 65.1 63.0 81.6 79.5 68.9 50.3 80.2 43.3 45.3",
    "gem": "62.6 34.1 60.6 63.9 81.0 79.7 67.5 50.7 79.8 43.2 47.0",
    "im": "57.6 37.2 60.5 62.9 81.1 79.5 68.7 51.7 79.4 43.1 45.6",
    "sdft": "56.6 36.2 64.4 62.5 81.6 79.8 69.5 50.3 79.7 43.2 41.0",
    "lfu-lora": "63.1 34.2 65.2 62.6 81.9 79.5 69.8 51.2 80.0 47.1 44.2",
}
TABLE_1 = {
    "vanilla": "37.9 72.9 66.0 44.0",  # the paper's 66.1 was rounded from more digits
    "sft": "51.5 73.3 65.1 44.1 rank 4.75",
    "neftune": "53.4 73.2 65.2 44.3 rank 3.0",
    "gem": "52.4 73.0 65.2 45.1 rank 3.5",
    "im": "51.8 73.0 65.6 44.4 rank 3.5",
    "sdft": "52.4 73.3 65.0 42.1 rank 4.25",
    "lfu-lora": "54.2 73.5 65.6 45.7 rank 1.0",
}


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with data, and commands that note what they are asked."""
    for path in "lfu-env/bin/lfu", "eval-env/bin/lm_eval":
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_text(NOTING)
        (tmp_path / path).chmod(0o755)
    (tmp_path / "lfu-env/bin/python").symlink_to(sys.executable)
    for name in "gsm8k", "gsm8k-test", "arc", "dolly", "lima", "safe", "harmful", "hexphi", "advbench":
        (tmp_path / "data").mkdir(exist_ok=True)
        write_rows(tmp_path / "data" / f"{name}.jsonl", [{"question": "Why?", "answer": "So."}])
    found = {task: {} for task in [*TASKS.split(), "arc_challenge_chat"]}
    for task in found:
        found[task] = dict.fromkeys(
            ["acc,none", "acc_norm,none", "f1,none", "exact_match,flexible-extract", "exact_match,remove_whitespace"], 0.5
        )
    (tmp_path / "scores.json").write_text(json.dumps({"results": found}))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(script: str, work: Path, **variables: str) -> list[list[str]]:
    """The commands that a script has given."""
    settings = environment() | {"PATH": f"{work}/lfu-env/bin:{os.environ['PATH']}"} | variables
    (work / "calls").write_text("")
    done = subprocess.run(["bash", SCRIPTS / script], cwd=work, env=settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in (work / "calls").read_text().splitlines()]


@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_bash_can_read_it(path: Path) -> None:
    assert subprocess.run(["bash", "-n", path], capture_output=True).stderr == b""


def test_reproduce_names_every_script() -> None:
    page = (ROOT / "docs" / "reproduce.md").read_text(encoding="utf-8")
    assert set(re.findall(r"scripts/([\w.]+)", page)) >= {path.name for path in SHELL}
    used = " ".join(path.read_text() for path in SHELL)
    assert not [path.name for path in PROGRAMS if f"$here/{path.name}" not in used]

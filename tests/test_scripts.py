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

# Llama-3.1-8B fine-tuned on GSM8K: its rows of Tables 16 and 1, the ranks before they were rounded.
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
    "vanilla": "37.9 72.9 66.1 44.0",
    "sft": "51.5 73.3 65.1 44.1 4.75",
    "neftune": "53.4 73.3 65.3 44.3 3.0",
    "gem": "52.4 73.0 65.3 45.1 3.5",
    "im": "51.8 73.1 65.6 44.4 3.5",
    "sdft": "52.4 73.4 65.0 42.1 4.25",
    "lfu-lora": "54.2 73.5 65.6 45.7 1.0",
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
            ["acc,none", "acc_norm,none", "f1,none", "exact_match,flexible-extract", "exact_match,remove_whitespace"],
            0.5,
        )
    (tmp_path / "scores.json").write_text(json.dumps({"results": found}))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(script: str, work: Path, arguments: str = "", **variables: str) -> list[list[str]]:
    """The commands that a script has given."""
    settings = environment() | {"PATH": f"{work}/lfu-env/bin:{os.environ['PATH']}"} | variables
    (work / "calls").write_text("")
    done = subprocess.run(
        ["bash", SCRIPTS / script, *arguments.split()], cwd=work, env=settings, capture_output=True, text=True
    )
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


def options(calls: list[list[str]], command: str) -> list[dict[str, object]]:
    """What each call of `lfu COMMAND` asks for, read by the real command line."""
    return [vars(parser().parse_args(call[1:])) for call in calls if call[:2] == ["lfu", command]]


def test_table_1_is_seven_trainings_and_eight_evaluations(work: Path) -> None:
    calls = run("tables.sh", work)
    trained = options(calls, "train")
    assert [each["method"] for each in trained] == [
        "sft", "neftune", "gem-logsigmoid", "sft", "sft", "lfu-lora", "lfu-reps",
    ]  # fmt: skip
    assert [each["loss_on"] for each in trained if each["method"] == "sft"] == [
        "answer",
        "instruction+answer",
        "answer",
    ]
    assert trained[4]["data"] == "data/gsm8k-sdft-llama31.jsonl"
    assert len(options(calls, "merge")) == 7
    assert sum(call[0] == "lm_eval" for call in calls) == 8
    assert len((work / "results" / "llama31-gsm8k.txt").read_text().splitlines()) == 16
    assert not run("tables.sh", work)  # all of it is there


def test_a_training_that_was_cut_off_is_resumed(work: Path) -> None:
    (work / "runs" / "llama31-gsm8k-sft").mkdir(parents=True)
    (work / "runs" / "llama31-gsm8k-sft" / "settings.json").touch()
    sft, reps = options(run("tables.sh", work, METHODS="sft lfu-reps"), "train")
    assert sft["resume"] and not reps["resume"]


def test_what_belongs_to_one_model_set_or_method(work: Path) -> None:
    chosen = {"MODELS": "instruct qwen3", "SETS": "gsm8k lima", "METHODS": "sft lfu-lora released-reps"}
    trained = {str(each["out"]): each for each in options(run("tables.sh", work, **chosen), "train")}
    assert len(trained) == 12
    published = trained["runs/instruct-gsm8k-lfu-lora"]
    assert (published["alpha"], published["lam"]) == (0.001, 500)
    assert trained["runs/qwen3-gsm8k-lfu-lora"]["alpha"] is None
    remat = {name for name, each in trained.items() if each["remat"]}
    assert remat == {f"runs/{model}-lima-{method}" for model in ("instruct", "qwen3") for method in ("sft", "lfu-lora")}
    assert {name for name, each in trained.items() if each["bos"] is False} == {
        name for name in trained if "released" in name
    }


def test_no_bos_and_remat_for_all(work: Path) -> None:
    trained = options(run("tables.sh", work, METHODS="sft released-lora", NO_BOS="1", REMAT="1"), "train")
    assert [each["bos"] for each in trained] == [False, False]
    assert [each["remat"] for each in trained] == [True, False]  # the released algorithm has no such form


def test_the_data_that_the_other_scripts_read(work: Path) -> None:
    for path in (work / "data").iterdir():
        path.unlink()
    for command, does in {
        "lfu-env/bin/curl": "echo '[]' > $2",
        "lfu-env/bin/hf": "mkdir -p ${@: -1}; touch ${@: -1}/{train.jsonl,1.csv}",
        "eval-env/bin/python": "touch data/arc.jsonl",
    }.items():
        (work / command).write_text(f"#!/bin/bash\n{does}\n")
        (work / command).chmod(0o755)
    run("data.sh", work, arguments="gsm8k arc dolly lima beavertails attacks")
    found = {path.stem for path in (work / "data").iterdir()}
    assert found == {
        "gsm8k", "gsm8k-train", "gsm8k-test", "arc", "dolly", "lima", "safe", "harmful", "advbench", "hexphi",
    }  # fmt: skip


@pytest.mark.parametrize("script, trainings, answers", [
    ("ablations.sh", 11 + 12 + 3, 0), ("epochs.sh", 8, 14), ("attacks.sh", 6 + 12, 36 + 8), ("wordings.sh", 0, 30),
])  # fmt: skip
def test_the_other_tables_ask_for_what_there_is(script: str, trainings: int, answers: int, work: Path) -> None:
    for name in ("sft", "neftune", "gem", "im", "sdft", "lfu-lora"):
        (work / "runs" / f"llama31-gsm8k-{name}" / "adapter").mkdir(parents=True)
        (work / "results" / f"llama31-gsm8k-{name}").mkdir(parents=True)
        (work / "results" / f"llama31-gsm8k-{name}" / "results_1.json").write_text((work / "scores.json").read_text())
    calls = run(script, work)
    assert len(options(calls, "train")) == trainings
    assert len(options(calls, "eval")) == answers
    written = [call[call.index("--out") + 1] for call in calls if call[1:2] in (["train"], ["eval"])]
    assert len(set(written)) == trainings + answers


def program(name: str, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, SCRIPTS / name, *map(str, arguments)], capture_output=True, text=True, env=environment()
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_page_expects_what_the_paper_printed() -> None:
    page = (ROOT / "docs" / "reproduce.md").read_text(encoding="utf-8")
    printed = {
        name.lower(): re.findall(r"\d+\.\d", rest) for name, rest in re.findall(r"^\| ([\w() -]+) (\|.*)", page, re.M)
    }
    printed["lfu-lora"] = printed["lfu (lora)"]
    for name, row in TABLE_1.items():
        *categories, gsm8k = numbers(" ".join(printed[name]))
        assert categories == pytest.approx(numbers(row), abs=0.0501), name  # a rank is printed with one digit
        assert gsm8k == numbers(TABLE_16[name])[0], name


def categories_and_ranks(rows: dict[str, list[float]]) -> dict[str, list[float]]:
    """What table.py prints below the eleven scores, for these scores of lm_eval."""
    metrics = [metric for each in runpy.run_path(str(SCRIPTS / "table.py"))["CATEGORIES"] for metric in each]
    assert [task for task, _ in metrics] == TASKS.split()
    for name, row in rows.items():
        found = {task: {metric: score / 100} for (task, metric), score in zip(metrics, row)}
        Path("results", name).mkdir(parents=True)
        Path("results", name, "results_1.json").write_text(json.dumps({"results": found}))
    lines = program("table.py", *rows).splitlines()
    assert lines[: len(rows)] == [" ".join([name, *(f"{score:.1f}" for score in row)]) for name, row in rows.items()]
    return {line.split()[0]: numbers(line.replace("rank", "").split(maxsplit=1)[1]) for line in lines[len(rows) :]}


def numbers(text: str) -> list[float]:
    return [float(word) for word in text.split()]


def test_the_tasks_that_are_scored_are_those_of_the_page_and_the_table() -> None:
    page = (ROOT / "docs" / "reproduce.md").read_text(encoding="utf-8")
    table = runpy.run_path(str(SCRIPTS / "table.py"))
    metrics = [metric for each in table["CATEGORIES"] for metric in each]
    assert re.findall(r"\| `(\w+)`, ([\w,-]+)", page) == [
        (task, metric.removesuffix(",none")) for task, metric in metrics
    ]
    scored = ",".join(re.findall(r"^TASKS\+?=(.*)", (SCRIPTS / "functions.sh").read_text(), re.M)).replace(",,", ",")
    assert set(scored.split(",")) == {task for task, _ in [*metrics, table["LETTERS"]]}


def test_table_16_gives_the_categories_of_table_1(work: Path) -> None:
    for name, found in categories_and_ranks({name: numbers(row) for name, row in TABLE_16.items()}).items():
        assert found[:4] == pytest.approx(numbers(TABLE_1[name])[:4], abs=0.11), name  # both sides are rounded


def test_its_categories_give_its_ranks(work: Path) -> None:
    printed = {name: numbers(row) for name, row in TABLE_1.items()}
    rows = {
        name: [score for score, size in zip(row, (3, 4, 2, 2)) for _ in range(size)] for name, row in printed.items()
    }
    assert categories_and_ranks(rows) == printed


def test_no_prompt_is_both_safe_and_harmful(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"Q{n} ", "response": f"bad {n}", "refusal": f"Question: Q{n % 5003}\nAnswer: No."}
        for n in range(10_000)
    ]
    rows[5]["response"] = ""
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    program("beavertails.py", tmp_path / "rows.json", tmp_path)
    safe, harmful = (read_lines(tmp_path / f"{name}.jsonl") for name in ("safe", "harmful"))
    assert len(safe) == 4999 and safe[0] == {"question": "Q5001", "answer": "No."}
    assert harmful == [{"question": f"Q{n}", "answer": f"bad {n}"} for n in (4997, 4998, 4999)]


def test_prompts_of_several_files(tmp_path: Path) -> None:
    (tmp_path / "2.csv").write_text('"How, then?"\n')
    (tmp_path / "1.csv").write_text("Why?\n\nWhen?\n")
    program("prompts.py", tmp_path / "out.jsonl", tmp_path / "2.csv", tmp_path / "1.csv")
    assert [row["question"] for row in read_lines(tmp_path / "out.jsonl")] == ["Why?", "When?", "How, then?"]


def test_five_wordings_and_their_spread(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "test.jsonl", [{"question": "1+1?", "answer": "2"}])
    program("wordings.py", rows, tmp_path)
    asked = [read_lines(tmp_path / f"wording-{number}.jsonl")[0]["question"] for number in range(1, 6)]
    assert asked[0] == "Question: 1+1?\nAnswer:" and len(set(asked)) == 5
    files = [write_rows(tmp_path / f"{n}.jsonl", [{"flexible": n}, {"flexible": 0.0}]) for n in (0.2, 0.6)]
    assert program("spread.py", "sft", *files) == "sft mean 20.00, deviation 10.00\n"


def test_a_cosine_for_each_block(tmp_path: Path) -> None:
    config = read_config(MINI / "config.json")
    lora.save(tmp_path, (lora.init(config, 2, generator=torch.Generator().manual_seed(0)), 2.0), base=str(MINI))
    found = program("noise.py", MINI, tmp_path, MINI / "math" / "test.jsonl", 3).split()
    assert len(found) == config.num_hidden_layers
    assert all(0.5 < float(cosine) < 1.0 for cosine in found)

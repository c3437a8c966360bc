"""The demo: what it says follows from the numbers, whatever they are, and its runs are made and scored."""

import argparse
import json
import sys
from pathlib import Path

import pytest

from experiments import demo
from experiments.demo import BASE, DEFAULT, Scores, Trial
from experiments.miniature.mini import SPLITS
from lfu.evaluation.estimates import Estimate


def scores(task: float, kept: float, error: float = 0.02) -> Scores:
    return {column: Estimate(task if column == demo.TASK else kept, error, 150) for column in SPLITS}


ROWS = {"base": scores(0.06, 0.95), "sft": scores(0.5, 0.6), "lfu-lora, λ 0.5": scores(0.45, 0.7)}


def test_a_method_is_typed_with_or_without_its_lambda() -> None:
    assert [demo.read_trial(text) for text in ("sft", "lfu-lora:0.5", "lfu-lora")] == DEFAULT
    assert [trial.name for trial in DEFAULT] == ["sft", "lfu-lora, λ 0.5", "lfu-lora, λ 5"]
    assert [trial.folder.name for trial in DEFAULT] == ["sft", "lfu-lora-0.5", "lfu-lora-5"]
    with pytest.raises(argparse.ArgumentTypeError, match="'lora' is none of sft, lfu-lora"):
        demo.read_trial("lora:1")
    with pytest.raises(argparse.ArgumentTypeError, match="sft has no λ"):
        demo.read_trial("sft:1")


def test_what_is_kept_is_the_mean_of_the_other_columns() -> None:
    found = demo.kept(scores(0.0, 0.6) | {"reasoning": Estimate(1.0, 0.04, 150)})
    assert found == pytest.approx((0.7, (3 * 0.02**2 + 0.04**2) ** 0.5 / 4, 600))
    assert demo.table(ROWS).splitlines()[3].startswith("| sft | 50.0 ± 2.0 | 60.0 ± 2.0 |")


@pytest.mark.parametrize(
    ("task", "kept", "said"),
    [
        (0.45, 0.7, "learns as much (-5.0 ± 2.8), keeps more (+10.0 ± 1.4)"),
        (0.40, 0.5, "learns less (-10.0 ± 2.8), keeps less (-10.0 ± 1.4)"),
        (0.60, 0.62, "learns more (+10.0 ± 2.8), keeps as much (+2.0 ± 1.4)"),
    ],
)
def test_the_finding_follows_from_the_numbers(task: float, kept: float, said: str) -> None:
    head, line = demo.findings(ROWS | {"lfu-lora, λ 0.5": scores(task, kept)}).splitlines()
    assert head.startswith("Against sft, in points")
    assert line == f"lfu-lora, λ 0.5: {said}"


def test_a_picture_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "PICTURE", tmp_path / "picture.png")
    assert demo.picture(ROWS) == f"Picture: {tmp_path / 'picture.png'}"
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_without_matplotlib_a_sentence_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert demo.picture(ROWS) == "No picture. To draw, matplotlib is needed: pip install 'lfu[plot]'."


def test_the_problem_is_the_first_that_only_the_base_gets_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "OUT", tmp_path)
    right = {"base": "1000", "sft": "1101", "lfu-lora-0.5": "1011", "lfu-lora-5": "1111"}
    for folder, hits in right.items():
        rows = [
            {"question": f"Q{i}?", "answer": "", "prediction": f"{folder}\n#### {i}", "strict": float(hit)}
            for i, hit in enumerate(hits, 1)
        ]
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "math.jsonl").write_text("\n".join(map(json.dumps, rows)))
    said = demo.problem([BASE, *DEFAULT])
    assert said.splitlines()[:3] == [
        "Test problem 4, the first that all but the base solve:",
        "  Q4?",
        "  base              base #### 4",
    ]
    assert demo.problem([BASE, BASE]) == "No test problem is solved by all but the base."


def test_a_method_is_trained_and_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "OUT", tmp_path)
    monkeypatch.setattr(demo, "EPOCHS", 1)
    monkeypatch.setattr(demo, "SPLITS", {demo.TASK: "math"})
    (base, _), (tuned, seconds) = demo.run(BASE), demo.run(Trial("lfu-lora", 0.5))
    assert base[demo.TASK].mean == pytest.approx(0.06)
    assert tuned[demo.TASK].mean != base[demo.TASK].mean
    assert seconds > 0
    settings = json.loads((tmp_path / "lfu-lora-0.5" / "settings.json").read_text())
    assert (settings["lam"], settings["alpha"], settings["method"]) == (0.5, 0.1, "lfu-lora")
    answers = (tmp_path / "lfu-lora-0.5" / "math.jsonl").read_text().splitlines()
    assert sum(json.loads(line)["strict"] for line in answers) / 200 == pytest.approx(tuned[demo.TASK].mean)

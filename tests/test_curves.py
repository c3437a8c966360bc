"""`lfu plot` and `lfu runs`: what they draw and say of runs that are finished, stopped, running or damaged."""

import json
import shutil
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from commands import MINI, lfu, read_lines, refusal, uneven_sums, write_rows

from lfu import cli
from lfu.runs import lock

TRAIN = {"model": MINI, "template": "plain", "rank": 2, "batch_size": 4, "epochs": 2, "save_every": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs: one with validation, and one with LfU and another seed. To be read, not changed."""
    folder = tmp_path_factory.mktemp("runs")
    rows = write_rows(folder / "rows.jsonl", uneven_sums(20))
    assert lfu("train", data=rows, out=folder / "first", method="sft", hold_back=4, **TRAIN) == 0
    assert lfu("train", data=rows, out=folder / "second", seed=1, **TRAIN) == 0
    return folder


def words(svg: Path) -> str:
    """Text is drawn as curves; what it says stands in comments."""
    parser = ElementTree.XMLParser(target=ElementTree.TreeBuilder(insert_comments=True))
    return " ".join(each.text or "" for each in ElementTree.parse(svg, parser).iter(ElementTree.Comment))


def test_every_quantity_that_a_run_has_is_drawn(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "curves.svg"
    assert cli.main(["plot", str(folder / "first"), str(folder / "second"), f"--out={out}"]) == 0
    for name in ("SFT loss", "validation NLL", "consistency loss", "gradient norm", "learning rate", "first", "second"):
        assert name in words(out)
    assert capsys.readouterr().out == f"{out}: sft, valid, consistency, gradient_norm, learning_rate of 2 runs.\n"
    before = out.read_bytes()
    assert cli.main(["plot", str(folder / "first"), str(folder / "second"), f"--out={out}"]) == 0
    assert out.read_bytes() == before


def test_what_no_run_has_is_not_drawn(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plot", str(folder / "second"), f"--out={tmp_path / 'one.png'}"]) == 0
    assert "valid" not in capsys.readouterr().out
    assert (tmp_path / "one.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(("out", "sentence"), [("curves.jpg", "must end in .png or .svg"), ("no/c.svg", None)])
def test_where_a_picture_goes(
    out: str, sentence: str | None, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plot", str(folder / "first"), f"--out={tmp_path / out}"]) == (2 if sentence else 0)
    assert sentence is None or sentence in refusal(capsys)


def test_a_folder_without_a_log_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plot", str(tmp_path), f"--out={tmp_path / 'c.svg'}"]) == 2
    assert refusal(capsys) == f"{tmp_path / 'log.jsonl'} holds no steps: give the folder of a run."


def test_without_matplotlib(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["plot", str(folder / "first"), f"--out={tmp_path / 'c.svg'}"]) == 2
    assert refusal(capsys) == "To draw, matplotlib is needed: pip install 'lfu[plot]'."


# --- the list -------------------------------------------------------------------------------------


def listed(folder: Path) -> dict[str, dict[str, str]]:
    return {line["run"]: line for line in cli.runs(cli.RunsOptions(folder=str(folder)))}


def test_runs_are_listed_with_what_sets_them_apart(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = listed(folder)
    log = read_lines(folder / "first" / "log.jsonl")
    values = [(line["valid"], line["step"]) for line in log if "valid" in line]
    expected = {
        "run": "first", "method": "sft", "state": "finished", "step": "8", "loss": f"{log[-1]['sft']:.4f}",
        "valid": f"{values[-1][0]:.4f}", "best": f"{min(values)[0]:.4f} (step {min(values)[1]})", "hold-back": "4",
        "seed": "42",
    }  # fmt: skip
    assert found["first"] | expected == found["first"]
    assert found["first"].keys() - expected.keys() <= {"alpha", "lambda", "layers", "norm"}
    assert (found["second"]["seed"], found["second"]["valid"], found["second"]["method"]) == ("1", "-", "lfu-lora")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[0].split()[:4] == ["run", "method", "state", "step"]


def test_the_state_says_what_can_be_done(folder: Path, tmp_path: Path) -> None:
    for name in ("stopped", "new", "damaged"):
        shutil.copytree(folder / "first", tmp_path / name)
        shutil.rmtree(tmp_path / name / "adapter")
    shutil.rmtree(tmp_path / "new" / "checkpoints")
    (tmp_path / "damaged" / "log.jsonl").write_bytes(b"\xff{]\n")
    with lock(tmp_path / "stopped"):
        assert listed(tmp_path)["stopped"]["state"] == "running"
    found = listed(tmp_path)
    assert {name: found[name]["state"] for name in found} == {
        "stopped": "resumable", "new": "no checkpoint yet", "damaged": "resumable",
    }  # fmt: skip
    assert (found["damaged"]["loss"], found["damaged"]["best"]) == ("-", "-")
    assert json.loads((tmp_path / "stopped" / "settings.json").read_text())["method"] == "sft"


def test_a_run_is_listed_by_itself(folder: Path) -> None:
    assert list(listed(folder / "second")) == ["second"]


def test_where_there_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["runs", str(tmp_path)]) == 2
    assert "holds no runs" in refusal(capsys)

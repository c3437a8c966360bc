"""What the pages say of precision and of parameters put back early, on the model that is here."""

import sys
from pathlib import Path

import pytest
from commands import MINI, lfu

from experiments import fidelity, restoration
from lfu.io.files import read_json

ROWS = MINI / "math" / "train.jsonl"
INPUT = ["--model", str(MINI), "--data", str(ROWS), "--template", "question"]


def cells(table: str) -> dict[str, list[tuple[float, float]]]:
    """Row -> for each column the cosine and the ratio of the norms."""
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    return {title: [tuple(map(float, cell.split(", "))) for cell in rest] for title, *rest in rows}


def test_only_the_default_precision_keeps_every_consistency_gradient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--alphas", "0.01", "--json", str(tmp_path / "found.json")]
    monkeypatch.setattr(sys, "argv", ["fidelity.py", *INPUT, *options])
    fidelity.main()
    found = cells(capsys.readouterr().out)
    assert len(found) == 11
    about, *columns = read_json(tmp_path / "found.json").values()
    assert about["command"].startswith("python -m experiments.fidelity --model ")
    for title, row in found.items():
        assert [column[title] for column in columns] == [pytest.approx(cell, abs=1e-3) for cell in row]
    for single, *_, default in found.values():
        assert single == (1.0, 1.0)
        assert default == pytest.approx((1.0, 1.0), abs=0.01)
    _, low, products, _ = found["consistency, LoRA, α 0.001, λ 500"]
    assert low[0] < 0.5 and products[0] < 0.9


def test_an_adapter_of_another_scale_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"model": MINI, "data": ROWS, "template": "question", "limit": 16, "epochs": 1, "lora_alpha": 8}
    assert lfu("train", out=tmp_path / "run", **options) == 0
    monkeypatch.setattr(sys, "argv", ["fidelity.py", *INPUT, "--adapter", str(tmp_path / "run" / "adapter")])
    with pytest.raises(SystemExit, match="must have rank 8 and scale 2"):
        fidelity.main()


def test_what_is_wrong_when_parameters_are_put_back_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"model": MINI, "data": ROWS, "template": "question", "limit": 16, "epochs": 2, "learning_rate": 0.01}
    assert lfu("train", out=tmp_path / "run", **options) == 0
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["restoration.py", *INPUT, "--adapter", str(tmp_path / "run" / "adapter")])
    restoration.main()
    right, wrong = pytest.approx((1.0, 1.0), abs=1e-3), 0.9999
    (sft, consistency), (sft_again, consistency_again), (low_sft, low), (low_sft_again, low_again) = cells(
        capsys.readouterr().out
    ).values()
    assert sft[0] < wrong and consistency == right
    assert sft_again == right and consistency_again[0] < wrong
    assert low_sft == low == right
    assert low_sft_again == right and low_again[0] < wrong

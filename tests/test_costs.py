"""The experiment on single costs runs on the model that is here, and prints what it says."""

import sys

import pytest
from commands import MINI

from experiments import costs


@pytest.mark.parametrize(
    ("what", "lines", "text"),
    [("operations", 20, "aten.mm, torch.bfloat16: "), ("padding", 3, "positions a token, time ")],
)
def test_costs(
    what: str, lines: int, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = MINI / "math" / "train.jsonl"
    monkeypatch.setattr(sys, "argv", ["costs.py", what, "--model", str(MINI), "--data", str(data), "--rounds", "1"])
    costs.main()
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) == lines
    assert text in printed

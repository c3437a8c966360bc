"""The README's Python lines run as they stand, and its table of files is true."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_example_trains(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    losses = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 6
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("name, lines", re.findall(r"\| \[(\w+\.py)\]\(lfu/\w+\.py\) \| (\d+) \|", README))
def test_the_line_counts_are_about_right(name: str, lines: str) -> None:
    assert len((ROOT / "lfu" / name).read_text(encoding="utf-8").splitlines()) == pytest.approx(int(lines), abs=25)


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.name
)
def test_links_lead_to_files(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / link).exists(), link

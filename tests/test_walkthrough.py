"""The lesson as it is stored: its first cell anywhere, its figures and questions, the numbers that its text quotes."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

DOCS = Path(__file__).parents[1] / "docs"
CELLS = json.loads((DOCS / "walkthrough.ipynb").read_text(encoding="utf-8"))["cells"]
MARKDOWN, CODE = (
    ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == kind] for kind in ("markdown", "code")
)


def first_cell(repository: str = "") -> Path:
    """Runs it; the folder it found."""
    names: dict[str, Any] = {}
    exec(CODE[0].replace('REPOSITORY = ""', f"REPOSITORY = {repository!r}"), names)
    return names["ROOT"]


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is no part of the repository, to be in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def test_the_first_cell_finds_the_repository_around_it(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(DOCS)
    assert first_cell() == DOCS.parent
    assert sys.path[:2] == [str(DOCS.parent), str(DOCS)]


def test_elsewhere_it_asks_for_the_address_of_the_repository(elsewhere: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"Set REPOSITORY, in this cell, to the URL that `git clone` takes"):
        first_cell()
    with pytest.raises(RuntimeError, match=r"`git clone .*nowhere.*` failed: fatal: .*nowhere"):
        first_cell(str(elsewhere / "nowhere"))


def test_with_an_address_it_clones_and_installs(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **options: Any) -> SimpleNamespace:
        commands.append(list(command))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    clone = elsewhere / "lfu-repository"
    assert first_cell("https://example.org/lfu") == clone
    git, pip = commands
    assert [git[:2], git[-2:]] == [["git", "clone"], ["https://example.org/lfu", str(clone)]]
    assert pip == [sys.executable, "-m", "pip", "install", "--quiet", "--editable", f"{clone}[plot]"]
    assert sys.path[:2] == [str(clone), str(clone / "docs")]


def test_it_is_stored_with_its_outputs() -> None:
    outputs = [output for cell in CELLS for output in cell.get("outputs", [])]
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data"}
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert all(cell["outputs"] for cell in CELLS if "figures." in "".join(cell["source"]) and "outputs" in cell)
    titles = [output["metadata"]["image/png"]["alt"] for output in outputs if "image/png" in output.get("data", {})]
    assert all(titles) and not [title for title in titles if set("[]\n") & set(title)]  # docs/site.py: ![title](file)


def test_every_figure_has_its_caption_after_it_and_every_experiment_a_question_before_it() -> None:
    drawn = [
        index for index, cell in enumerate(CELLS)
        if any("image/png" in output.get("data", {}) for output in cell.get("outputs", []))
    ]  # fmt: skip
    captions = ["".join(CELLS[index + 1]["source"]).split(".")[0] for index in drawn]
    assert captions == [f"**Figure {number}" for number in range(1, len(drawn) + 1)]
    sections = "\n".join(MARKDOWN).split("\n## ")
    asked = [section[0] for section in sections if "> **What do you expect?**" in section]
    assert asked == list("2345678")


def test_section_7_quotes_its_own_table() -> None:
    stored = [output["data"]["text/plain"] for cell in CELLS for output in cell.get("outputs", []) if "data" in output]
    (table,) = ["".join(text) for text in stored if "".join(text).startswith("| mean over the runs")]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    found = {name: [float(cell.split()[0]) for cell in cells] for name, *cells in rows}
    sft, gentle, chosen, published = list(found.values())[:4]

    def kept(row: list[float]) -> float:
        return sum(row[2:]) / 4

    (text,) = [text for text in MARKDOWN if text.startswith("**Figure 8.**")]
    for quoted in (
        f"that of SFT ({chosen[0]:.3f} against {sft[0]:.3f}), at 5 to {published[0]:.3f}",
        f"has {gentle[0]:.3f}",
        f"learns {sft[1] - chosen[1]:.1f} points less of the task than SFT",
        f"keeps {kept(chosen) - kept(sft):.1f} more of the rest",
        f"helpfulness ({chosen[5]:.1f} against {sft[5]:.1f})",
        f"learns {chosen[1] - published[1]:.1f} points less",
        f"keeps {kept(gentle) - kept(published):.1f} points more",
    ):
        assert quoted in " ".join(text.split()), quoted

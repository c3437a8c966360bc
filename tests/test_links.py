"""Every relative link, anchor and picture of the pages and of the notebook leads somewhere; no network is asked."""

import json
import re
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")),
         ROOT / "weights" / "mini" / "README.md", ROOT / "docs" / "walkthrough.ipynb"]  # fmt: skip
FENCE = re.compile(r"^(`{3,}|~{3,}).*?^\1", re.DOTALL | re.MULTILINE)
LINK = re.compile(r'(?:\]\(|\b(?:src|href)=")(?!\w+:)([^)"\s]+)')


def prose(path: Path) -> str:
    """A page without its code; of a notebook the text cells."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"]
        text = "\n\n".join("".join(cell["source"]) for cell in cells)
    return re.sub(r"`[^`\n]*\]\([^`\n]*`", "", FENCE.sub("", text))


def anchors(path: Path) -> set[str]:
    """What GitHub makes of a page's headings, or Jupyter of a notebook's; and the anchors that are written out."""
    text = prose(path)
    headings = [
        re.sub(r"\[(.*?)\]\(.*?\)|[`*]", r"\1", line) for line in re.findall(r"^#+ +(.*?) *$", text, re.MULTILINE)
    ]
    written = set(re.findall(r'\b(?:id|name)="([^"]+)"', text))
    if path.suffix == ".ipynb":
        return written | {heading.replace(" ", "-") for heading in headings}
    return written | numbered([re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings])


def numbered(slugs: list[str]) -> set[str]:
    """A heading that was there before gets a number."""
    return {f"{slug}-{count}" if (count := slugs[:place].count(slug)) else slug for place, slug in enumerate(slugs)}


def broken(page: Path) -> list[str]:
    """The links of a page that lead nowhere."""
    found = []
    for link in LINK.findall(prose(page)):
        file, _, anchor = unquote(link).partition("#")
        target = page.parent / file if file else page
        if not target.exists() or (anchor and target.suffix in (".md", ".ipynb") and anchor not in anchors(target)):
            found.append(link)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    assert not broken(page)


def test_what_leads_nowhere_would_be_seen(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text(
        "# The `code`: a [link](x.md)\n\n## Twice\n\n## Twice\n\n```\n# not a heading\n```\n"
    )
    wrong = ["none.md", "none.png", "other.md#none", "other.md#not-a-heading", "#here", "other.md#twice-2", "none.svg"]
    right = ["other.md", "other.md#the-code-a-link", "other.md#twice-1", "https://example.org/none"]
    page = tmp_path / "page.md"
    links = "\n".join(f"![a]({link})" for link in wrong[:-1] + right)
    page.write_text(f'# Page\n\n{links}\n\n`[a](code.md)`\n\n```\n[a](code.md)\n```\n\n<img src="none.svg" alt="">\n')
    assert broken(page) == wrong


def test_the_notebooks_anchors_are_jupyters(tmp_path: Path) -> None:
    cell = {
        "cell_type": "markdown",
        "source": ["# 1. The claim, here\n", "[a](#1.-The-claim,-here) [b](#1-the-claim-here)"],
    }
    page = tmp_path / "page.ipynb"
    page.write_text(json.dumps({"cells": [cell, {"cell_type": "code", "source": ["[c](none.md)"]}]}))
    assert broken(page) == ["#1-the-claim-here"]

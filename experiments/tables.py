"""The pages of docs/tables, from the stored numbers: `make tables`, or `python -m experiments.tables`.

`docs/NAME.json` holds what a page shows, `prefaces/NAME.md` how to read it. `tests/test_tables.py` makes every page
again and compares.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments import gpu_tables, smollm2
from experiments.markdown import markdown
from experiments.miniature import report
from lfu.io.files import read_json, write_text

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"


def main() -> None:
    for name in PAGES:
        write_text(DOCS / "tables" / f"{name}.md", made(name))


def made(name: str) -> str:
    """One page of tables."""
    preface = (HERE / "prefaces" / f"{name}.md").read_text(encoding="utf-8")
    return f"{preface}\n{PAGES[name](read_json(DOCS / f'{name}.json'))}"


def precision(data: dict[str, Any]) -> str:
    """The table of `fidelity.py`."""
    about, columns = data["about"], {name: each for name, each in data.items() if name != "about"}
    rows = [
        [title, *(f"{cosine:.4f}, {ratio:.3f}" for cosine, ratio in (each[title] for each in columns.values()))]
        for title in columns["float32"]
    ]
    table = markdown(["cosine, norm ratio", *columns], rows)
    return f"    {about['command']}\n\n{about['date']}, {about['machine']}.\n\n## SmolLM2-135M-Instruct\n\n{table}\n"


PAGES: dict[str, Callable[[dict[str, Any]], str]] = {
    "miniature": report.page,
    "smollm2": smollm2.page,
    "gpu": gpu_tables.page,
    "precision": precision,
}

if __name__ == "__main__":
    main()

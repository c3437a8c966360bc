"""The pages of docs/tables, from the stored numbers: `make tables`, or `python -m experiments.tables`.

`docs/NAME.json` holds what a page shows, `prefaces/NAME.md` how to read it. `tests/test_tables.py` makes every page
again and compares.
"""

from pathlib import Path

from experiments import gpu_tables, smollm2
from experiments.miniature import report
from lfu.io.files import read_json, write_text

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"
PAGES = {"miniature": report.page, "smollm2": smollm2.page, "gpu": gpu_tables.page}


def main() -> None:
    for name in PAGES:
        write_text(DOCS / "tables" / f"{name}.md", made(name))


def made(name: str) -> str:
    """One page of tables."""
    preface = (HERE / "prefaces" / f"{name}.md").read_text(encoding="utf-8")
    return f"{preface}\n{PAGES[name](read_json(DOCS / f'{name}.json'))}"


if __name__ == "__main__":
    main()

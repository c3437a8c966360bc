"""The pages of docs/tables are what the stored numbers make."""

import pytest

from experiments.tables import DOCS, PAGES, made


@pytest.mark.parametrize("name", PAGES)
def test_a_page_of_tables_is_what_the_data_makes(name: str) -> None:
    assert made(name) == (DOCS / "tables" / f"{name}.md").read_text(encoding="utf-8"), "make tables"


@pytest.mark.parametrize("name", PAGES)
def test_every_table_has_a_heading_of_its_own(name: str) -> None:
    text = (DOCS / "tables" / f"{name}.md").read_text(encoding="utf-8")
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert len(set(headings)) == len(headings)
    assert "nan" not in text and "Not run yet" not in text

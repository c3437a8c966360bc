"""Every number that a page quotes is the one in the data: pages say where it stands, in comments that nobody sees.

    <!-- numbers of docs/smollm2.json
    0.948: small > lora > nll > mean
    −0.099, −0.107, −0.092: small > lora > minus_sft > nll
    -->

Such a comment speaks of the text before it in its section. A line has what is quoted, then where it stands: keys of a
JSON file, or heading, row and column of a page of tables. What stands there is one number or several, and each quoted
one is one of them, rounded as it is quoted; a sign may be left to the words.
"""

import json
import re
from collections.abc import Iterator
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs").glob("*.ipynb"))]
COMMENT = re.compile(r"<!-- numbers of (\S+)\n(.*?)-->", re.DOTALL)
NUMBER = re.compile(r"[+-]?\d+(?:\.\d+)?(?:e[+-]?\d+)?")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_quotes_is_what_its_source_says(page: Path) -> None:
    assert list(faults(text_of(page))) == []


def test_every_result_is_quoted_from_somewhere() -> None:
    for section in re.split(r"^## ", text_of(ROOT / "docs" / "results.md"), flags=re.MULTILINE):
        quoted = [line.partition(": ")[0] for each in COMMENT.finditer(section) for line in each[2].splitlines()]
        prose = re.sub(r"(α|β|λ|lm_eval) \S+|\S+ million|arxiv\S+", "", COMMENT.sub("", section))
        missing = set(re.findall(r"\d+\.\d+", prose)) - set(re.findall(r"\d+\.\d+", " ".join(quoted)))
        assert not missing, section.splitlines()[0]


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("0.948: small > lora > nll > mean", None),
        ("-0.10, -0.107, -0.09: small > lora > minus_sft > nll", None),
        ("0.9: small > lora > nll > mean", "0.9: not in the text"),
        ("48: small > lora > nll > mean", "48: not in the text"),
        ("0.10: small > lora > nll > mean", "0.10: small > lora > nll > mean is 0.948"),
        ("+0.10: small > lora > minus_sft > nll > mean", "+0.10: small > lora > minus_sft > nll > mean is -0.099"),
        ("0.948: small > lor > nll", "small > lor > nll: not there"),
    ],
)
def test_a_wrong_number_is_found(line: str, fault: str | None) -> None:
    prose, comment = (
        "0.948 is less by −0.10 (−0.107 to −0.09) or +0.10.",
        f"<!-- numbers of docs/smollm2.json\n{line}\n-->",
    )
    assert list(faults(f"## SFT\n\n{prose}\n\n{comment}")) == [fault] * (fault is not None)
    assert list(faults(f"{prose}\n\n## LfU\n\n{comment}"))


def test_a_cell_is_found_by_heading_row_and_column() -> None:
    page = "# Cells\n## One\n| a | b | c |\n|---|---|---|\n| x | y | 1.5 ± 2 |\n| x | z | **-3.5** |\n## Two\n| a |\n"
    assert cell(page, ["One", "x, y", "c"]) == "1.5 ± 2"
    assert cell(page, ["One", "x, z", "c"]) == "-3.5"
    for address in (["One", "x", "c"], ["Two", "x, y", "c"], ["One", "x, y", "d"], ["One", "x, y"]):
        with pytest.raises(LookupError):
            cell(page, address)


def faults(text: str) -> Iterator[str]:
    """What is wrong with the quotations of a page."""
    text = plain(text)
    for comment in COMMENT.finditer(text):
        before = COMMENT.sub("", re.split(r"^#+ ", text[: comment.start()], flags=re.MULTILINE)[-1])
        for line in comment[2].strip().splitlines():
            quoted, _, address = line.strip().partition(": ")
            try:
                numbers = numbers_of(value_at(comment[1], address))
            except (LookupError, FileNotFoundError):
                yield f"{address}: not there"
                continue
            for quote in quoted.split(", "):
                if not re.search(rf"(?<![\d.,]){re.escape(quote)}(?![.,]?\d)", before):
                    yield f"{quote}: not in the text"
                elif not any(same(quote, number) for number in numbers):
                    yield f"{quote}: {address} is {', '.join(numbers)}"


def text_of(page: Path) -> str:
    """Of a notebook, the text between the code."""
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        text = "\n".join("".join(each["source"]) for each in cells if each["cell_type"] == "markdown")
    return text


def plain(text: str) -> str:
    return text.replace("−", "-")


@cache
def source_text(source: str) -> str:
    return (ROOT / source).read_text(encoding="utf-8")


def value_at(source: str, address: str) -> Any:
    keys = address.split(" > ")
    if not source.endswith(".json"):
        return cell(source_text(source), keys)
    value = json.loads(source_text(source))
    for key in keys:
        value = value[int(key)] if isinstance(value, list) else value[key]
    return value


def cell(page: str, keys: list[str]) -> str:
    """The one cell of a section's tables in this row, known by its first cell or its first two, and this column."""
    heading, row, column = (*keys, None, None)[:3]
    section = re.search(rf"^#+ {re.escape(heading or '')}\n(.*?)(?=^#|\Z)", page, re.MULTILINE | re.DOTALL)
    head, found = [], []
    for line in section[1].splitlines() if section else []:
        cells = [each.strip(" *") for each in line.strip("|").split("|")]
        if not line.startswith("|"):
            head = []
        elif not head:
            head = cells
        elif row in (cells[0], ", ".join(cells[:2])) and column in head:
            found.append(cells[head.index(column)])
    if len(found) != 1:
        raise LookupError(keys)
    return found[0]


def numbers_of(value: Any) -> list[str]:
    """All of a cell, a number, or the numbers directly in an object or a list."""
    if isinstance(value, (dict, list)):
        values = value.values() if isinstance(value, dict) else value
        value = " ".join(str(each) for each in values if not isinstance(each, (dict, list)))
    return NUMBER.findall(re.sub(r"(?<=\d),(?=\d{3})", "", plain(str(value))))


def same(quote: str, number: str) -> bool:
    """Whether a number rounds to this; where no sign is quoted, without its own."""
    wanted, found = Decimal(quote.replace(",", "")), Decimal(number)
    half = Decimal((0, (5,), int(wanted.as_tuple().exponent) - 1))
    return abs((found if quote[0] in "+-" else abs(found)) - wanted) <= half

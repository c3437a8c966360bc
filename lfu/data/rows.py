"""Rows of a JSONL file, and layouts: where question and answer stand in a row, dataset by dataset.

A layout is a function of one JSON object that returns (question, answer). The four fine-tuning sets of the paper, as
they are published:

    GSM8K                 `columns`   train.jsonl of openai/grade-school-math, and its copies on the hub
    ARC-Challenge         `arc`       allenai/ai2_arc on the hub
    LIMA                  `lima`      train.jsonl of GAIR/lima on the hub
    Alpagasus Dolly 3k    `dolly`     data/filtered/dolly_3k.json of gpt4life/alpagasus; databricks-dolly-15k as well

`lfu` reads JSONL. What is published as Parquet or as one JSON array is brought into lines first: with
`load_dataset(...).to_json("arc.jsonl")` of the datasets library, or `jq -c '.[]' dolly_3k.json`.

The authors released only how GSM8K's columns are named. Which words turned an ARC row into an instruction, what became
of LIMA's dialogues, and the Dolly answers that they had GPT-4o-mini revise (appendix C) are not known; each docstring
says what is done here instead. Read next: `tokens.py`.
"""

import json
import string
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from lfu.errors import InputError, quote
from lfu.io.files import first_few, named

# --- layouts --------------------------------------------------------------------------------------

Message = dict[str, str]
"""A turn of a conversation: its role (system, user or assistant) and its content."""

Layout = Callable[[dict[str, Any]], tuple[Any, ...]]
"""A row's JSON object -> (question, answer), or (question, answer, the turns before them).

InputError, without file and line, names the column that is at fault.
"""


def columns(fields: dict[str, Any], *, question: str = "question", answer: str = "answer") -> tuple[str, str]:
    """Two columns of strings, as they are."""
    return require_column(fields, question, str), require_column(fields, answer, str)


def arc(fields: dict[str, Any]) -> tuple[str, str]:
    """A question with its options, one a line, and the right one: ("Why?\\nA. So.\\nB. No.", "B. No.").

    {"question": ..., "choices": {"text": [...], "label": [...]}, "answerKey": ...}. Some rows number their options; all
    are lettered here in the order they come, so that every row asks alike. The answer is letter and text: a letter
    alone would be two tokens of loss a row, the text alone would not teach what tests that ask for a letter want.
    """
    question, choices = require_column(fields, "question", str), require_column(fields, "choices", dict)
    texts, labels, key = strings(choices, "text"), strings(choices, "label"), require_column(fields, "answerKey", str)
    if not 0 < len(texts) == len(set(labels)) == len(labels) <= len(string.ascii_uppercase):
        raise InputError(
            f"column 'choices' must have a label of its own for each text, not {quote(labels)} for {quote(texts)}."
        )
    if key not in labels:
        raise InputError(f"column 'answerKey' must be one of the labels {quote(labels)}, not {quote(key)}.")
    options = [f"{letter}. {text}" for letter, text in zip(string.ascii_uppercase, texts)]
    return "\n".join([question, *options]), options[labels.index(key)]


def lima(fields: dict[str, Any]) -> tuple[str, str]:
    """The first two turns of {"conversations": [question, answer, ...]}.

    All but 30 of the 1,030 rows have no more. Those 30 dialogues are read up to their first answer, because the paper
    speaks of instruction-output pairs, and that pair needs nothing of what follows it. The test split has no answers
    and is refused.
    """
    turns = strings(fields, "conversations")
    if len(turns) < 2:
        raise InputError(f"column 'conversations' must hold a question and an answer, not {len(turns)} turns.")
    return turns[0], turns[1]


def dolly(fields: dict[str, Any]) -> tuple[str, str]:
    """Alpaca's columns (instruction, input, output) or Dolly's own (instruction, context, response).

    A context that is not empty follows the instruction on a new line, as LLaMA-Factory joins them
    (`data/converter.py`, `data/processor/supervised.py`).
    """
    instruction, answer = (
        require_column(fields, "instruction", str),
        require_column(fields, first_present(fields, "output", "response"), str),
    )
    named = first_present(fields, "input", "context")
    context = require_column(fields, named, str) if named in fields else ""
    return f"{instruction}\n{context}" if context else instruction, answer


ROLES = ("system", "user", "assistant")


def messages(fields: dict[str, Any]) -> tuple[str, str, tuple[Message, ...]]:
    """The last two turns of {"messages": [{"role": ..., "content": ...}, ...]}, and those before them.

    The last turn is the assistant's and answers a user's. Tools, images and the like are refused, not left out.
    """
    turns = require_column(fields, "messages", list)
    for turn in turns:
        if not (isinstance(turn, dict) and set(turn) == {"role", "content"} and isinstance(turn["content"], str)):
            raise InputError(f"column 'messages': a turn has a role and a content, a string, not {quote(turn)}.")
        if turn["role"] not in ROLES:
            raise InputError(f"column 'messages': a role is {', '.join(ROLES)}, not {quote(turn['role'])}.")
    if [turn["role"] for turn in turns[-2:]] != ["user", "assistant"]:
        raise InputError("column 'messages' must end with a turn of the user and its answer by the assistant.")
    return turns[-2]["content"], turns[-1]["content"], tuple(turns[:-2])


LAYOUTS: dict[str, Layout] = {"columns": columns, "arc": arc, "lima": lima, "dolly": dolly, "messages": messages}


def get_layout(name: str, question: str, answer: str) -> Layout:
    """The layout of this name, with the names of its two columns; InputError if it has names of its own."""
    if name == "columns":
        return partial(columns, question=question, answer=answer)
    if (question, answer) != ("question", "answer"):
        raise InputError(f"Columns can be named in the layout columns only; the layout {name} has its own names.")
    return LAYOUTS[name]


def require_column(fields: dict[str, Any], column: str, kind: type) -> Any:
    """What stands in a column; InputError if it is missing or of another type."""
    if column not in fields:
        raise InputError(f"no column {quote(column)}; the row has {first_few([*fields], 10, shown=quote) or 'none'}.")
    if not isinstance(fields[column], kind):
        name = {str: "a string", dict: "a JSON object", list: "a list", int: "an integer"}[kind]
        raise InputError(f"column {quote(column)} must be {name}, not {quote(fields[column])}.")
    return fields[column]


def strings(fields: dict[str, Any], column: str) -> list[str]:
    """A column that is a list of strings."""
    values = require_column(fields, column, list)
    if not all(isinstance(each, str) for each in values):
        raise InputError(f"column {quote(column)} must be a list of strings, not {quote(values)}.")
    return values


def first_present(fields: dict[str, Any], *names: str) -> str:
    """Which of these columns the row has, the first where it has none; InputError if it has both."""
    found = [name for name in names if name in fields]
    if len(found) > 1:
        raise InputError(f"the columns {' and '.join(map(repr, found))} mean the same; a row must have one of them.")
    return found[0] if found else names[0]


# --- rows -----------------------------------------------------------------------------------------


T = TypeVar("T")


class Row(NamedTuple):
    """One line of a JSONL file."""

    number: int  # from 1, as editors count
    question: str
    answer: str
    fields: dict[str, Any]  # the whole line
    history: tuple[Message, ...] = ()  # the turns before the question


def read_rows(path: str | Path, layout: Layout = columns) -> list[Row]:
    """The rows of a JSONL file in this layout; GSM8K's published files have the default one.

    InputError names the line of whatever is not a JSON object, and the column that is missing or holds another type.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"The data file {path} does not exist, or is not a file.")
    rows = [read_row(path, number, line, layout) for number, line in numbered_lines(path)]
    if not rows:
        raise InputError(f"{path} holds no rows.")
    return rows


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, with their numbers."""
    try:
        with named(path), path.open(encoding="utf-8-sig") as file:
            yield from ((number, line) for number, line in enumerate(file, 1) if line.strip())
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error}.") from error


def read_row(path: Path, number: int, line: str, layout: Layout) -> Row:
    """One line as a Row, or InputError with its number."""
    try:
        fields = json_object(line)
        question, answer, *history = layout(fields)
        return Row(number, question, answer, fields, *history)
    except InputError as error:
        raise InputError(f"{path}, line {number}: {error}") from error


def with_line_number(path: str | Path, row: Row, function: Callable[..., T], *arguments: Any) -> T:
    """The function's result; an InputError in it gets the row's line before it."""
    try:
        return function(*arguments)
    except InputError as error:
        raise InputError(f"{path}, line {row.number}: {error}") from error


def json_object(line: str) -> dict[str, Any]:
    """A line parsed; InputError if it is anything but one object, or could not be written again."""
    hint = " Of a JSON array, write each item on a line: jq -c '.[]' FILE." if line.lstrip().startswith("[") else ""
    try:
        fields = json.loads(line, object_pairs_hook=unique_names)
    except (ValueError, RecursionError) as error:
        raise InputError(f"not valid JSON ({error}).{hint}") from error
    if not isinstance(fields, dict):
        raise InputError(f"a row must be a JSON object, not {type(fields).__name__}.{hint}")
    for name, value in fields.items():
        try:
            json.dumps({name: value}, ensure_ascii=False, allow_nan=False).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start]
            raise InputError(
                f"column {quote(name)} contains an unpaired surrogate, {half!r}: fix or remove it."
            ) from error
        except ValueError as error:
            raise InputError(
                f"column {quote(name)} contains NaN or infinity, which JSON has not: write null."
            ) from error
    return fields


def unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; ValueError if it has a name twice, of which a reader would silently take one."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        twice = next(name for place, (name, _) in enumerate(pairs) if name in dict(pairs[:place]))
        raise ValueError(f"the name {quote(twice)} stands in it twice")
    return fields


def complete_lines(path: Path) -> list[str]:
    """The lines of a JSONL file whose writing may have been cut off, without half a line at its end."""
    held = path.read_bytes() if path.exists() else b""
    return held[: held.rfind(b"\n") + 1].decode("utf-8").split("\n")[:-1]


LINE_ENDS = str.maketrans({character: f"\\u{ord(character):04x}" for character in "\x85\u2028\u2029"})
"""What some readers take for the end of a line, and JSON lets stand in a string."""


def json_line(fields: dict[str, Any]) -> str:
    """A row as one line of JSONL, with its end."""
    return json.dumps(fields, ensure_ascii=False).translate(LINE_ENDS) + "\n"

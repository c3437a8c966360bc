"""Rows as the paper's four data sets are published, written by hand, and what is refused in them."""

import json
from pathlib import Path
from typing import Any

import pytest
from commands import MINI, lfu, refusal, write_rows

from lfu import cli
from lfu.cli import EvalOptions, TrainOptions
from lfu.data.rows import LAYOUTS, Layout, Row, arc, columns, dolly, get_layout, lima, read_rows

GSM8K = {"question": "Ana has 3 bags of 4 plums.", "answer": "3*4=<<3*4=12>>12\n#### 12"}
ARC = {
    "id": "Mercury_1",
    "question": "Which of these falls?",
    "choices": {"text": ["a cloud", "a stone", "light"], "label": ["A", "B", "C"]},
    "answerKey": "B",
}
NUMBERED = ARC | {"choices": {"text": ["a cloud", "a stone", "light"], "label": ["1", "2", "3"]}, "answerKey": "3"}
LIMA = {"conversations": ["Why?", "So."], "source": "stackexchange"}
DIALOGUE = {"conversations": ["Why?", "So.", "Really?", "Yes."], "source": "multi_turn"}
ALPAGASUS = {"instruction": "Name it.", "category": "closed_qa", "input": "A stone.\nGrey.", "output": "Granite"}
DOLLY = {"instruction": "Name it.", "context": "A stone.", "response": "Granite", "category": "closed_qa"}
MESSAGES = {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]}
OPTIONS = "Which of these falls?\nA. a cloud\nB. a stone\nC. light"

READ: list[tuple[Layout, dict[str, Any], tuple[str, str]]] = [
    (columns, GSM8K, (GSM8K["question"], GSM8K["answer"])),
    (arc, ARC, (OPTIONS, "B. a stone")),
    (arc, NUMBERED, (OPTIONS, "C. light")),
    (lima, LIMA, ("Why?", "So.")),
    (lima, DIALOGUE, ("Why?", "So.")),
    (dolly, ALPAGASUS, ("Name it.\nA stone.\nGrey.", "Granite")),
    (dolly, ALPAGASUS | {"input": ""}, ("Name it.", "Granite")),
    (dolly, DOLLY, ("Name it.\nA stone.", "Granite")),
    (dolly, {"instruction": "Name it.", "output": "Granite"}, ("Name it.", "Granite")),
]


@pytest.mark.parametrize(("layout", "fields", "expected"), READ)
def test_a_row_as_published(layout: Layout, fields: dict[str, Any], expected: tuple[str, str], tmp_path: Path) -> None:
    assert layout(fields) == expected
    path = write_rows(tmp_path / "rows.jsonl", [fields, fields])
    assert read_rows(path, layout) == [Row(1, *expected, fields), Row(2, *expected, fields)]


def without(fields: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name != key}


def choices(text: Any, label: Any) -> dict[str, Any]:
    return ARC | {"choices": {"text": text, "label": label}}


BROKEN: list[tuple[str, Any, str]] = [
    ("columns", {"question": "Why?"}, r"no column 'answer'; the row has 'question'\."),
    ("columns", GSM8K | {"answer": 12}, "column 'answer' must be a string, not 12"),
    ("arc", without(ARC, "question"), "no column 'question'; the row has 'id', 'choices', 'answerKey'"),
    ("arc", without(ARC, "answerKey"), "no column 'answerKey'"),
    ("arc", ARC | {"choices": ["a cloud", "a stone"]}, "column 'choices' must be a JSON object, not"),
    ("arc", ARC | {"choices": {"text": ["a cloud"]}}, r"no column 'label'; the row has 'text'\."),
    ("arc", choices(["a cloud", 3], ["A", "B"]), r"column 'text' must be a list of strings, not \['a cloud', 3\]"),
    ("arc", choices("a cloud", ["A"]), "column 'text' must be a list, not 'a cloud'"),
    ("arc", choices(["a", "b", "c"], ["A", "B"]), "column 'choices' must have a label of its own for each text"),
    ("arc", choices(["a", "b"], ["B", "B"]), "column 'choices' must have a label of its own for each text"),
    ("arc", choices([], []), "column 'choices' must have a label of its own for each text"),
    ("arc", ARC | {"answerKey": "D"}, r"column 'answerKey' must be one of the labels \['A', 'B', 'C'\], not 'D'"),
    ("arc", ARC | {"answerKey": "2"}, "column 'answerKey' must be one of the labels"),
    ("arc", ARC | {"answerKey": ""}, "column 'answerKey' must be one of the labels"),
    ("lima", {"messages": ["Why?", "So."]}, r"no column 'conversations'; the row has 'messages'\."),
    ("lima", {"conversations": ["Why?"]}, "column 'conversations' must hold a question and an answer, not 1 turns"),
    ("lima", {"conversations": [{"from": "human"}]}, "column 'conversations' must be a list of strings"),
    ("dolly", without(ALPAGASUS, "instruction"), "no column 'instruction'"),
    ("dolly", without(ALPAGASUS, "output"), "no column 'output'; the row has 'instruction', 'category', 'input'"),
    ("dolly", ALPAGASUS | {"input": None}, "column 'input' must be a string, not None"),
    ("dolly", ALPAGASUS | {"response": "So."}, "columns 'output' and 'response' mean the same"),
    ("dolly", DOLLY | {"input": ""}, "columns 'input' and 'context' mean the same"),
]
GOOD = {"columns": GSM8K, "arc": ARC, "lima": LIMA, "dolly": DOLLY, "messages": MESSAGES}


@pytest.mark.parametrize(("name", "fields", "message"), BROKEN)
def test_a_broken_row_is_refused_with_file_line_and_column(
    name: str, fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [GOOD[name], fields])
    with pytest.raises(ValueError, match=rf"rows\.jsonl, line 2: .*{message}"):
        read_rows(path, LAYOUTS[name])


def test_a_json_array_is_refused_with_its_remedy(tmp_path: Path) -> None:
    path = tmp_path / "dolly_3k.json"
    for text in (json.dumps([ALPAGASUS], indent=4), json.dumps([ALPAGASUS])):
        path.write_text(text)
        with pytest.raises(
            ValueError, match=r"dolly_3k\.json, line 1: .* write each item on a line: jq -c '\.\[\]' FILE"
        ):
            read_rows(path, dolly)


def test_names_of_columns_belong_to_the_layout_columns() -> None:
    assert get_layout("columns", "prompt", "target")({"prompt": "Why?", "target": "So."}) == ("Why?", "So.")
    assert get_layout("arc", "question", "answer") is arc
    for names in (("prompt", "answer"), ("question", "target")):
        with pytest.raises(ValueError, match="the layout lima has its own names"):
            get_layout("lima", *names)


# --- the command ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYOUTS)
def test_train_and_eval_read_every_layout(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", 4 * [GOOD[name]])
    plain = [dict(zip(("question", "answer"), LAYOUTS[name](GOOD[name])))] * 4
    common = {"model": str(MINI), "data": str(rows), "layout": name}
    same = {"model": str(MINI), "data": str(write_rows(tmp_path / "plain.jsonl", plain))}
    how = {"template": "question", "method": "sft", "epochs": 1, "rank": 2}
    seen = []
    for number, options in enumerate((common, same)):
        adapter = cli.train(TrainOptions(**options, **how, out=str(tmp_path / str(number))))
        results = cli.evaluate(EvalOptions(**options, adapter=str(adapter), score="exact", max_new_tokens=2))
        seen.append((results, (adapter / "adapter_model.safetensors").read_bytes()))
    assert seen[0] == seen[1]


def test_a_broken_row_stops_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [ARC, ARC | {"answerKey": "D"}])
    assert lfu("train", model=MINI, data=rows, layout="arc", out=tmp_path / "run") == 2
    assert f"{rows}, line 2: column 'answerKey' must be one of the labels" in refusal(capsys)
    assert lfu("eval", model=MINI, data=rows, layout="lima", question="prompt") == 2
    assert "the layout lima has its own names" in refusal(capsys)
    assert not (tmp_path / "run").exists()


def test_letters_are_not_scored_as_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [ARC])
    assert lfu("eval", model=MINI, data=rows, layout="arc") == 2
    assert f"{rows}, line 1: the score gsm8k compares numbers" in refusal(capsys)
    results = cli.evaluate(EvalOptions(model=str(MINI), data=str(rows), layout="arc", generate=False))
    assert results.keys() == {"nll"}

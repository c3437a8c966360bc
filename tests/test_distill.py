"""Self-distillation: what a model is asked, which of its answers are taken, and that nothing else of a file changes."""

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import MINI, lfu, read_lines, refusal, write_rows
from test_data import small_model_tokenizer, text

from lfu import cli
from lfu.baselines.sdft import (
    BANNED,
    RECIPES,
    Recipe,
    choose_answer,
    distill_prompt,
    last_integer,
    rejection_reason,
    same_integer,
)
from lfu.cli import DistillOptions
from lfu.data.rows import Row, read_rows
from lfu.data.tokens import Format, encode_rows, load_tokenizer
from lfu.generate import generate, make_sampler
from lfu.model import load

distilling = importlib.import_module("lfu.cli.distill")  # of this name `lfu.cli` has the function

GENERAL, GSM8K = RECIPES["general"], RECIPES["gsm8k"]
REFERENCE = " 3*400=<<3*400=1200>>1200\n#### 1200 "

MATH = (
    "You are an expert in math. Below are a math question and its reference answer. Refer to the reference answer and "
    "write a response that appropriately answers the question."
)
PROMPTS = {
    "general": (
        "Below are an instruction that describes a task along with a reference answer. Using the reference answer as a "
        "guide, write your own response.\n\n"
        "### Instruction:\nWhy {0}?\n\n### Reference Answer:\nSo {question}.\n\n### Response:\n"
    ),
    "gsm8k": MATH + "\n\nWhy {0}?\n\nSo {question}.\n\nGreat! Let's think step by step. ",
    "gsm8k-llama2": (
        f"<<SYS>>\n{MATH}\n<</SYS>>\n\n[INST] Why {{0}}?\n\nSo {{question}}. [/INST] Great! Let's think step by step. "
    ),
    "gsm8k-llama3": (
        f"<|start_header_id|>system<|end_header_id|>\n\n{MATH}<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWhy {0}?\n\nSo {question}.<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nGreat! Let's think step by step. "
    ),
}
"""Of the question "Why {0}?" and the answer "So {question}.": braces are text."""


@pytest.mark.parametrize("name", RECIPES)
def test_a_prompt_is_this_text_to_the_letter(name: str) -> None:
    tokenizer = small_model_tokenizer()
    asked = distill_prompt(tokenizer, RECIPES[name], Row(1, "Why {0}?", "So {question}.", {}))
    assert text(tokenizer, asked) == "<s>" + PROMPTS[name]
    assert asked[: len(tokenizer.bos)] == list(tokenizer.bos)
    assert (
        distill_prompt(small_model_tokenizer(bos=False), RECIPES[name], Row(1, "Why {0}?", "So {question}.", {}))
        == asked[1:]
    )


# --- which answers are taken ----------------------------------------------------------------------

TAKEN: list[tuple[str, Recipe]] = [
    ("It is granite.", GENERAL),
    ("your turn to say 1200", GENERAL),
    ("It is your turn.", GENERAL),
    ("A yourresponse", GENERAL),
    ("The answer is 1,200.", GSM8K),
    ("your turn: 1200", GSM8K),
    ("1 200.00", GSM8K),
    ("3 * 400 = 1200", GSM8K),
]
LEFT: list[tuple[str, Recipe, str]] = [
    ("", GENERAL, "empty"),
    (" \n", GENERAL, "empty"),
    ("Your turn: 1200", GENERAL, "prompt"),
    ("  Your turn: 1200", GENERAL, "prompt"),
    *((f"Well, {phrase} is 1200", GENERAL, "prompt") for phrase in BANNED),
    *((f"Well, {phrase.upper()} is 1200", GSM8K, "prompt") for phrase in BANNED),
    ("The answer is 1201.", GSM8K, "number"),
    ("1200 of 3", GSM8K, "number"),
    ("-1200", GSM8K, "number"),
    ("1200.5", GSM8K, "number"),
    ("No number at all", GSM8K, "number"),
]


def taken() -> tuple[list[Any], list[Any]]:
    return [choose_answer(f" {written}\n", REFERENCE, recipe) for written, recipe in TAKEN], [
        (written, None) for written, _ in TAKEN
    ]


def test_an_answer_that_passes_is_taken_without_the_space_around_it() -> None:
    actual, expected = taken()
    assert actual == expected


def left() -> tuple[list[Any], list[Any]]:
    """The references that stay, and what is said of why."""
    answers = [choose_answer(written, REFERENCE, recipe) for written, recipe, _ in LEFT]
    said = [re.findall("empty|prompt|number", answer.fault or "")[-1:] for answer in answers]
    return [(answer.text, why) for answer, why in zip(answers, said)], [(REFERENCE, [why]) for *_, why in LEFT]


def test_the_reference_stays_byte_for_byte() -> None:
    actual, expected = left()
    assert actual == expected


def test_the_banned_phrases() -> None:
    assert BANNED == ("reference answer", "your response", "my response", "your own response", "now it's your turn")
    assert rejection_reason("The number is 7, as in the Reference  Answer", "7", GSM8K) is None  # two spaces


INTEGERS = {
    "The answer is 1,200.": "1200",
    "18.00": "18",
    "18.50": "-999999999",
    "18.5": "-999999999",
    "10 20": "1020",
    "5\n6": "5\n6",
    "10-5": "-5",
    "#### 72": "72",
    "<<48/2=24>>24 clips in May.\n#### 72": "72",
    "-1,234,567.000 dollars": "-1234567",
    "3.": "3",
    "": "-999999999",
    "none": "-999999999",
}


def integers() -> tuple[dict[str, str], dict[str, str]]:
    return {written: last_integer(written) for written in INTEGERS}, INTEGERS


def test_the_last_integer() -> None:
    actual, expected = integers()
    assert actual == expected


AGREE = {
    ("The answer is 1,200.", "#### 1200"): True,
    ("18.00", "18"): True,
    ("18.5", "18"): False,
    ("0018", "18"): True,
    ("10 20", "1020"): True,
    ("5\n6", "56"): False,
    ("5\n6", "5\n6"): False,  # neither is a number
    ("18.5", "none"): True,  # neither has an integer
}


def agreements() -> tuple[dict[tuple[str, str], bool], dict[tuple[str, str], bool]]:
    return {pair: same_integer(*pair) for pair in AGREE}, AGREE


def test_integers_agree_by_value() -> None:
    actual, expected = agreements()
    assert actual == expected


# --- the command ----------------------------------------------------------------------------------

SHORT: dict[str, Any] = {"max_new_tokens": 24, "batch_size": 4, "dtype": "float64"}


def rows_of_mini(path: Path, count: int = 10) -> Path:
    """Rows in which more than the question and the answer stands, the columns in an order of their own."""
    rows = read_lines(MINI / "math" / "train.jsonl")[:count]
    return write_rows(path, [{"id": n, "answer": f" {row['answer']}\n", **row} for n, row in enumerate(rows)])


def distill(data: Path, out: Path, **options: Any) -> list[dict[str, Any]]:
    cli.distill(DistillOptions(model=str(MINI), data=str(data), out=str(out), **SHORT | options))
    return read_lines(out)


def one_by_one(data: Path, recipe: Recipe, how: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows as they should come out: each alone, and then the rule."""
    config, base = load(MINI, dtype=torch.float64)
    tokenizer, expected = load_tokenizer(MINI, 1024), []
    for row in read_rows(data):
        choose = make_sampler(42, [row.number], **how)
        prompts = [distill_prompt(tokenizer, recipe, row)]
        ((_, completion),) = generate(config, base, tokenizer, prompts, max_new_tokens=24, choose=choose)
        expected.append(row.fields | {"answer": choose_answer(completion.text, row.answer, recipe).text})
    return expected


@pytest.mark.parametrize("recipe", ["general", "gsm8k"])
def test_only_answers_change_and_order_stays(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = rows_of_mini(tmp_path / "rows.jsonl")
    found = distill(data, tmp_path / "out.jsonl", recipe=recipe)
    assert found == one_by_one(data, RECIPES[recipe], {"temperature": 0.95, "top_k": 50, "top_p": 0.7})
    assert [list(fields) for fields in found] == [list(fields) for fields in read_lines(data)]
    new = sum(fields["answer"] != before["answer"] for fields, before in zip(found, read_lines(data), strict=True))
    assert f"10 rows, {new} with a new answer ({10 * new:.1f} %), the others as they were." in capsys.readouterr().out
    assert (new > 5) == (recipe == "general")  # hardly anything passes where the number must be right


def test_another_seed_draws_other_answers(tmp_path: Path) -> None:
    data = rows_of_mini(tmp_path / "rows.jsonl")
    runs = {
        seed: distill(data, tmp_path / f"{number}.jsonl", recipe="general", seed=seed, batch_size=size)
        for number, (seed, size) in enumerate([(1, 4), (2, 4)])
    }
    assert runs[1] != runs[2]
    assert distill(data, tmp_path / "again.jsonl", recipe="general", seed=1, batch_size=10) == runs[1]


@pytest.mark.parametrize("kept", [0, 3, 4, 10])
def test_a_run_that_was_cut_off_continues_to_the_same_file(kept: int, tmp_path: Path) -> None:
    data, whole, out = rows_of_mini(tmp_path / "rows.jsonl"), tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    distill(data, whole, recipe="general")
    lines = whole.read_text(encoding="utf-8").splitlines(keepends=True)
    half = "".join(lines[kept : kept + 1])[:20].encode() + "é".encode()[:1]  # cut within a letter
    out.write_bytes("".join(lines[:kept]).encode() + half)
    Path(f"{out}.json").write_text(Path(f"{whole}.json").read_text())
    distill(data, out, recipe="general", resume=True)
    assert out.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    "changed",
    [
        {"recipe": "gsm8k"},
        {"seed": 9},
        {"temperature": 0.5},
        {"top_p": 0.5},
        {"top_k": 5},
        {"max_new_tokens": 8},
        {"dtype": "bfloat16"},
    ],
)
def test_a_file_is_not_continued_with_other_options(changed: dict[str, Any], tmp_path: Path) -> None:
    data, out = rows_of_mini(tmp_path / "rows.jsonl"), tmp_path / "out.jsonl"
    distill(data, out, recipe="general", limit=4)
    before, (name,) = out.read_bytes(), changed
    with pytest.raises(ValueError, match=rf"out\.jsonl\.json: {name.replace('_', '-')} was .* and is "):
        distill(data, out, **{"recipe": "general", "resume": True} | changed)
    assert out.read_bytes() == before


def test_rows_are_written_as_they_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, out, batches = rows_of_mini(tmp_path / "rows.jsonl"), tmp_path / "out.jsonl", distilling.rewrite_answers

    def failing(*arguments: Any, **options: Any) -> Any:
        batch, *_ = batches(*arguments, **options)
        yield batch
        raise OSError("No more.")

    monkeypatch.setattr(distilling, "rewrite_answers", failing)
    with pytest.raises(OSError, match=r"No more\."):
        distill(data, out, recipe="general")
    assert len(read_lines(out)) == SHORT["batch_size"]


def test_what_comes_out_can_be_trained_on(tmp_path: Path) -> None:
    data, out = rows_of_mini(tmp_path / "rows.jsonl"), tmp_path / "out.jsonl"
    distill(data, out, recipe="general")
    examples, dropped = encode_rows(out, read_rows(out), load_tokenizer(MINI, 1024), Format())
    assert (len(examples), dropped) == (10, [])


def test_other_layouts_come_out_in_two_columns(tmp_path: Path) -> None:
    rows = [{"instruction": "Name it.", "context": f"A stone {n}.", "response": "Granite"} for n in range(3)]
    data, out = write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "out.jsonl"
    found = distill(data, out, recipe="gsm8k", layout="dolly", limit=2)
    assert [list(fields) for fields in found] == 2 * [["question", "answer"]]
    assert [fields["question"] for fields in found] == ["Name it.\nA stone 0.", "Name it.\nA stone 1."]
    assert distill(data, out, recipe="gsm8k", layout="dolly", limit=2, resume=True) == found


def test_columns_can_be_named(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [{"reply": "So.", "ask": "Why?", "more": 1}])
    (found,) = distill(data, tmp_path / "out.jsonl", recipe="general", question="ask", answer="reply")
    assert list(found) == ["reply", "ask", "more"]
    assert (found["ask"], found["more"]) == ("Why?", 1)
    assert found["reply"] != "So."


# --- refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"temperature": 0}, "temperature must be more than 0"),
        ({"temperature": "inf"}, "temperature must be more than 0 and finite"),
        ({"temperature": "nan"}, "temperature must be more than 0 and finite"),
        ({"top_p": 0}, "top-p more than 0 and at most 1"),
        ({"top_p": 1.1}, "top-p more than 0 and at most 1"),
        ({"top_k": 0}, "top-k must be at least 1, not 0"),
        ({"max_new_tokens": 0}, "max-new-tokens must be at least 1"),
        ({"batch_size": 0}, "batch-size must be at least 1"),
        ({"limit": 0}, "limit must be at least 1"),
        ({"seed": -1}, "seed must be at least 0, not -1"),
        ({"answer": "reply"}, "line 1: no column 'reply'"),
        ({"layout": "lima"}, "line 1: no column 'conversations'"),
        ({"layout": "lima", "answer": "reply"}, "the layout lima has its own names"),
        ({"resume": True}, "does not exist: there is nothing to continue. Leave out --resume."),
        ({"model": "/nowhere"}, "/nowhere"),
    ],
)
def test_what_cannot_be_used_is_refused_before_anything_is_written(
    changes: dict[str, Any], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = rows_of_mini(tmp_path / "rows.jsonl"), tmp_path / "out.jsonl"
    assert lfu("distill", **{"model": MINI, "data": data, "out": out} | changes) == 2
    assert sentence in refusal(capsys)
    assert not out.exists()


def test_the_options_are_not_written_over_the_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = rows_of_mini(tmp_path / "rows.json")
    before = data.read_text()
    assert lfu("distill", model=MINI, data=data, out=tmp_path / "rows") == 2
    assert f"{data} exists already: the options go there." in refusal(capsys)
    assert data.read_text() == before


def test_what_is_there_is_never_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = rows_of_mini(tmp_path / "rows.jsonl"), tmp_path / "out.jsonl"
    for content, sentence, resume in [
        ("precious", "exists already; answers are never overwritten. Choose another --out, or --resume.", False),
        ("pre\ncious", "line 1: not valid JSON", True),
        ('{"question": "Why?", "answer": "So."}\n{"half', "holds other rows than", True),
        ("".join(data.read_text().splitlines(keepends=True) * 2), "holds other rows than", True),
    ]:
        out.write_text(content)
        assert lfu("distill", model=MINI, data=data, out=out, resume=resume or None) == 2
        assert sentence in refusal(capsys)
        assert out.read_text() == content

"""Instruction Modelling: loss on the instruction and the answer, on no token of the template.

With the model of the repository, whose tokenizer never joins a question with its template, and with the tokenizer of
`test_data.py`, whose merges lie on just these borders.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import MINI, asked_for, read_lines, sums, write_rows
from test_data import small_model_tokenizer, small_tokenizer, text
from tiny import needs_folder

from lfu import cli, methods
from lfu.cli import EvalOptions, GenerateOptions, TrainOptions
from lfu.data.batches import IGNORED, Example, collate
from lfu.data.rows import Row
from lfu.data.tokens import TEMPLATES, Format, ModelTokenizer, Template, encode_row, load_tokenizer, prompt_ids
from lfu.io.config import read_config
from lfu.loss import sft_loss
from lfu.model import forward, load

BOTH = "instruction+answer"
ROWS = [
    Row(1, "Ana has 3 bags of 4 plums. How many?", "3*4=<<3*4=12>>12\n#### 12", {}),
    Row(2, "Why:", "So.", {}),  # merges with the newline after it
    Row(3, "ab\n", "a", {}),  # with the newlines after it
    Row(4, "\n#b", "\nb", {}),
]
EXACT = 2e-14  # measured: 1.8e-15, float64


def mini() -> ModelTokenizer:
    return load_tokenizer(MINI, 1024)


TOKENIZERS: dict[str, Callable[[], ModelTokenizer]] = {"mini": mini, "merging": small_model_tokenizer}


def both(template: str, bos: bool = True) -> Format:
    return Format(template, bos, BOTH)


def learned(example: Example) -> list[int]:
    """The places whose labels are tokens."""
    return [place for place, label in enumerate(collate([example]).labels[0].tolist()) if label != IGNORED]


# --- which tokens carry loss ------------------------------------------------------------------------


def learned_text() -> tuple[list[list[str]], list[list[str]]]:
    """The text that carries loss and the text that does not, in every template, as it is and as it should be."""
    tokenizer, actual, expected = small_model_tokenizer(), [], []
    for name, template in TEMPLATES.items():
        for row in ROWS:
            example = encode_row(tokenizer, both(name), row)
            parts = learned(example), [n for n in range(len(example.tokens)) if n not in set(learned(example))]
            actual.append([text(tokenizer, [example.tokens[n] for n in places]) for places in parts])
            space = " " if " {question}" in "".join(template.pieces) else ""
            scaffold = "".join(template.pieces).replace(space + "{question}", "")
            expected.append([f"{space}{row.question}{template.before_answer}{row.answer}</s>", f"<s>{scaffold}"])
    return actual, expected


def test_instruction_answer_and_eos_carry_loss_and_the_template_does_not() -> None:
    actual, expected = learned_text()
    assert actual == expected
    tokenizer = small_model_tokenizer()
    joined = prompt_ids(tokenizer, Format("question"), "Why:")
    assert joined != prompt_ids(tokenizer, both("question"), "Why:")  # there was something to tokenise apart
    assert text(tokenizer, joined) == text(tokenizer, prompt_ids(tokenizer, both("question"), "Why:"))


def space_before_the_question() -> tuple[str, str]:
    tokenizer = small_model_tokenizer()
    tokens, _, _, instruction = encode_row(tokenizer, both("question"), ROWS[1])
    return text(tokenizer, [tokens[place] for place in instruction]), " Why:"


def test_a_space_before_the_question_is_the_questions() -> None:
    actual, expected = space_before_the_question()
    assert actual == expected


@pytest.mark.parametrize("template", TEMPLATES)
def test_only_the_instruction_is_added_to_what_carries_loss(template: str) -> None:
    """Against the character offsets of the whole prompt, tokenised in one piece."""
    tokenizer, row = mini(), ROWS[0]
    sft, im = encode_row(tokenizer, Format(template), row), encode_row(tokenizer, both(template), row)
    assert im.tokens == sft.tokens  # in this tokenizer nothing reaches over the borders
    whole = "".join(TEMPLATES[template].pieces)
    start = whole.index("{question}") - whole[: whole.index("{question}")].endswith(" ")
    end = whole.index("{question}") + len(row.question)
    offsets = tokenizer.backend.encode(whole.replace("{question}", row.question), add_special_tokens=False).offsets
    inside = [len(tokenizer.bos) + n for n, (first, last) in enumerate(offsets) if start <= first and last <= end]
    assert learned(im) == sorted({*learned(sft), *inside})
    assert len(inside) > 5


def test_padding_carries_no_loss() -> None:
    examples = [encode_row(small_model_tokenizer(), both("alpaca"), row) for row in ROWS]
    tokens, labels = collate(examples)
    for row, example in enumerate(examples):
        places = [place for place, label in enumerate(labels[row].tolist()) if label != IGNORED]
        assert places == learned(example)
        assert torch.equal(labels[row, places], tokens[row, places])


def without_instruction(template: str) -> tuple[Example, Example]:
    """A row without a question, with loss on both and with loss on the answer."""
    row = Row(1, "", "So.", {})
    return encode_row(small_model_tokenizer(), both(template), row), encode_row(
        small_model_tokenizer(), Format(template), row
    )


@pytest.mark.parametrize("template", TEMPLATES)
def test_an_empty_instruction_changes_nothing(template: str) -> None:
    actual, expected = without_instruction(template)
    assert actual == expected
    tokenizer, row = mini(), Row(1, "", "So.", {})
    assert encode_row(tokenizer, both(template), row) == encode_row(tokenizer, Format(template), row)
    assert torch.equal(collate([actual]).labels, collate([expected]).labels)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_template_does_not_reach_into_what_is_learned(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    values = []
    for pieces in (("{question}",), ("ab:\n{question}\n\n## a",), ("Quite ", "another:{question}b", "\n")):
        monkeypatch.setitem(TEMPLATES, "changed", Template(pieces))
        labels = collate([encode_row(TOKENIZERS[name](), both("changed"), row) for row in ROWS]).labels
        values.append([[label for label in row if label != IGNORED] for row in labels.tolist()])
    assert values[0] == values[1] == values[2]


def supervised_and_predicted() -> tuple[list[int], list[int]]:
    """With and without a first token that carries loss, and so is never predicted."""
    examples = [Example([5, 6, 7, 8], 2, 1, range(0, 2)), Example([5, 6, 7, 8], 3, 1, range(1, 3))]
    examples.append(encode_row(small_model_tokenizer(), both("plain", bos=False), ROWS[1]))
    counted = [int((collate([example]).labels[:, 1:] != IGNORED).sum()) for example in examples]
    return [example.num_loss_tokens for example in examples], counted


def test_a_first_token_that_is_never_predicted_is_not_counted() -> None:
    actual, expected = supervised_and_predicted()
    assert actual == expected
    assert actual[:2] == [3, 3]


def test_loss_on_something_else_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Loss cannot be on 'question', only on answer or instruction\+answer"):
        prompt_ids(small_model_tokenizer(), Format("plain", True, "question"), "Why?")


# --- the loss -------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_loss_is_the_token_mean_over_both_parts(name: str, template: str) -> None:
    tokenizer = TOKENIZERS[name]()
    config, base = load(MINI, dtype=torch.float64)
    examples = [encode_row(tokenizer, both(template), row) for row in ROWS[:2]]
    tokens, labels = collate(examples)
    logits, _ = forward(config, base, tokens)
    answers = collate([example._replace(instruction=range(0)) for example in examples]).labels
    instructions = torch.where(answers == IGNORED, labels, IGNORED)
    counts = [int((part[:, 1:] != IGNORED).sum()) for part in (instructions, answers)]
    means = [sft_loss(logits, part) for part in (instructions, answers)]
    weighted = sum(count * mean for count, mean in zip(counts, means)) / sum(counts)
    assert sum(counts) == sum(example.num_loss_tokens for example in examples)
    assert abs(float(sft_loss(logits, labels) - weighted)) < EXACT
    assert abs(float(sft_loss(logits, labels) - means[1])) > 0.1  # as if the instruction carried none
    if name == "mini":
        sft = collate([encode_row(tokenizer, Format(template), row) for row in ROWS[:2]])
        assert torch.equal(sft.tokens, tokens)
        assert torch.equal(sft.labels, answers)


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def merging(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of the repository with the tokenizer of `test_data.py`."""
    folder = tmp_path_factory.mktemp("merging")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(MINI / name, folder)
    small_tokenizer(bos=True).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    return folder


def merging_rows(count: int) -> list[dict[str, str]]:
    return [row | {"question": row["question"] + ":"} for row in sums(count)]


@pytest.mark.parametrize("method", methods.METHODS)
def test_every_method_trains_with_it(
    method: str, merging: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", merging_rows(8))
    options = {"model": str(merging), "data": str(rows), "method": method, "template": "question", "epochs": 1}
    given = needs_folder(method, read_config(merging / "config.json"), tmp_path)
    cli.train(TrainOptions(**options, **given, out=str(tmp_path / "run"), loss_on=BOTH, rank=2))
    tokenizer = small_model_tokenizer()
    expected = [
        encode_row(tokenizer, both("question"), Row(0, row["question"], row["answer"], {})) for row in merging_rows(8)
    ]
    steps = read_lines(tmp_path / "run" / "log.jsonl")
    stages = 5 if method == "anchored" else 1
    assert sum(step["tokens"] for step in steps) == stages * sum(len(example.tokens) for example in expected)
    assert f"8 rows, {sum(example.num_loss_tokens for example in expected)} tokens with loss" in capsys.readouterr().out
    batch, (config, base) = collate(expected), load(merging)
    first = sft_loss(forward(config, base, batch.tokens)[0], batch.labels)  # B = 0
    assert steps[0]["sft"] == pytest.approx(float(first), rel=1e-2 if method == "neftune" else 1e-6)


def test_eval_and_generate_ask_with_the_tokens_of_training(
    merging: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", merging_rows(4))
    common: dict[str, Any] = {"model": str(merging), "data": str(rows)}
    trained = {"template": "question", "epochs": 1, "method": "sft", "rank": 2, "loss_on": BOTH}
    adapter = cli.train(TrainOptions(**common, **trained, out=str(tmp_path / "run")))
    tokenizer, questions = small_model_tokenizer(), [row["question"] for row in merging_rows(4)]
    expected = [prompt_ids(tokenizer, both("question"), question) for question in questions]
    assert expected != [prompt_ids(tokenizer, Format("question"), question) for question in questions]

    asked, _ = asked_for(monkeypatch)
    results = cli.evaluate(EvalOptions(**common, adapter=str(adapter), max_new_tokens=2))
    assert asked == expected
    cli.generate(GenerateOptions(model=str(merging), adapter=str(adapter), question=questions[0], max_new_tokens=2))
    assert asked[4:] == expected[:1]
    answers = [
        encode_row(tokenizer, Format("question"), Row(0, row["question"], row["answer"], {})) for row in merging_rows(4)
    ]
    assert results["nll"].n == sum(example.num_loss_tokens for example in answers)  # of the answers alone


def test_an_adapter_from_before_asks_as_it_did(merging: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", merging_rows(4))
    common: dict[str, Any] = {"model": str(merging), "data": str(rows)}
    adapter = cli.train(TrainOptions(**common, template="question", epochs=1, rank=2, out=str(tmp_path / "run")))
    settings = json.loads((adapter / "lfu_config.json").read_text())
    assert settings.pop("loss_on") == "answer"
    (adapter / "lfu_config.json").write_text(json.dumps(settings))
    asked, _ = asked_for(monkeypatch)
    cli.evaluate(EvalOptions(**common, adapter=str(adapter), max_new_tokens=2, nll=False))
    tokenizer = small_model_tokenizer()
    assert asked == [prompt_ids(tokenizer, Format("question"), row["question"]) for row in merging_rows(4)]


def test_a_run_from_before_continues(merging: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", merging_rows(4))
    options = TrainOptions(model=str(merging), data=str(rows), epochs=1, rank=2, out=str(tmp_path / "run"))
    cli.train(options)
    path = tmp_path / "run" / "settings.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in settings.items() if name not in ("loss_on", "layout")}))
    cli.train(TrainOptions(**{**vars(options), "resume": True}))
    with pytest.raises(ValueError, match=r"loss-on was 'answer' and is 'instruction\+answer'"):
        cli.train(TrainOptions(**{**vars(options), "resume": True, "loss_on": BOTH}))

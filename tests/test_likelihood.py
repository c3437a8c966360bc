"""Scores by likelihood on hand-made rows. That they are the harness' is in `test_harness.py`."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import MINI, read_lines, refusal, write_rows
from tiny import CONFIGS, random_lora, random_params

from lfu import cli
from lfu.cli import EvalOptions, main
from lfu.data.batches import Example
from lfu.data.rows import Row
from lfu.data.tokens import Format, ModelTokenizer, load_tokenizer, longest_context, prompt_ids, token_ids
from lfu.errors import InputError
from lfu.evaluation import loglikelihood as likelihood
from lfu.evaluation import nll
from lfu.evaluation.loglikelihood import (
    SCORES,
    EncodingOptions,
    Item,
    choice_record,
    encode,
    encode_windows,
    likelihoods,
    pair_ids,
    prefix_id,
    read_items,
    share_record,
    text_estimates,
    text_record,
    word_estimates,
    word_record,
)
from lfu.evaluation.nll import Likelihood
from lfu.model import Config, Params, forward, load

CHOICES = {"question": "Where?", "choices": ["Vesh", "Tarn", "Mell"], "answer": 1, "labels": [0, 1, 1]}


@pytest.fixture(scope="module")
def tokenizer() -> ModelTokenizer:
    return load_tokenizer(MINI, 1024)


def item(continuations: list[str], right: list[int], context: str = "") -> Item:
    return Item(Row(1, context, "", {}), context, continuations, right)


def found(*logprobs: float) -> list[Likelihood]:
    return [Likelihood(logprob, False) for logprob in logprobs]


# --- records --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choices", "logprobs", "right", "acc", "acc_norm"),
    [
        (["a", "bb"], [-2.0, -3.0], 0, True, False),  # per character: -2, -1.5
        (["a", "bb"], [-2.0, -3.0], 1, False, True),
        (["aé", "bbb"], [-3.0, -4.4], 1, False, True),  # per byte: -1, -1.467
        (["a", "b", "c"], [-1.0, -1.0, -1.0], 0, True, True),  # the first of equals
        (["a", "b", "c"], [-2.0, -1.0, -1.0], 2, False, False),
    ],
)
def test_choices(choices: list[str], logprobs: list[float], right: int, acc: bool, acc_norm: bool) -> None:
    record = choice_record(item(choices, [right]), found(*logprobs))
    assert record == {"logprobs": logprobs, "acc": acc, "acc_norm": acc_norm}


def test_logits_that_are_not_finite_score_nothing() -> None:
    config = CONFIGS["llama31"]
    params = random_params(config, seed=0, dtype=torch.float32)
    params.lm_head[3] = 3e38 * params.lm_head[3].sign()
    with pytest.raises(InputError, match="logits for the row of line 7 are not finite"):
        nll.row_likelihoods(config, params, [Example([1, 2, 4], 2, 7)], [])


def test_the_share_of_the_true_choices() -> None:
    probabilities = [0.1, 0.2, 0.05]
    logprobs = [math.log(p) for p in probabilities]
    true = item(["a", "b", "c"], [0, 2])
    # Measured: 1e-16.
    assert share_record(true, found(*logprobs))["mc2"] == pytest.approx(0.15 / 0.35, rel=1e-14)
    # exp(-2000) is 0 in every dtype, the share is not.
    distant = found(*(logprob - 2000 for logprob in logprobs))
    assert share_record(true, distant)["mc2"] == pytest.approx(0.15 / 0.35, rel=1e-12)


def test_last_words() -> None:
    words = [[Likelihood(-1.0, True)], [Likelihood(-3.0, False)]]
    records = [word_record(item(["Vesh"], [0]), each) for each in words]
    assert records == [{"logprob": -1.0, "acc": True}, {"logprob": -3.0, "acc": False}]
    scores = word_estimates(records)
    assert scores["acc"].mean == 0.5
    assert scores["perplexity"].mean == pytest.approx(math.exp(2), rel=1e-15)
    # The deviations of 1 and 3 from 2 are -1 and 1: an error of 1 nat, to first order exp(2) in the perplexity.
    assert scores["perplexity"].error == pytest.approx(math.exp(2), rel=1e-15)


def test_perplexity_of_words_and_bytes() -> None:
    texts = {"Zoë lives  there": [-2.0, -4.0], "Vesh\n": [-5.0]}
    records = [text_record(item([text], [0]), found(*windows)) for text, windows in texts.items()]
    # The line break at the end of a text begins one more word, and that is empty.
    assert records == [{"logprob": -6.0, "words": 3, "bytes": 17}, {"logprob": -5.0, "words": 2, "bytes": 5}]
    scores = text_estimates(records)
    assert [value.n for value in scores.values()] == [5, 22, 22]
    expected = [math.exp(11 / 5), math.exp(11 / 22), 11 / 22 / math.log(2)]
    assert [value.mean for value in scores.values()] == pytest.approx(expected, rel=1e-15)


def test_what_no_number_can_hold_is_infinite() -> None:
    """A long text without white space is one word."""
    record = text_record(item(["日本語" * 300], [0]), found(-6000.0))
    scores = text_estimates([record, record])
    assert scores["word_perplexity"].mean == math.inf
    assert scores["byte_perplexity"].mean == pytest.approx(math.exp(6000 / 2700))


# --- tokens ---------------------------------------------------------------------------------------


def encoding_options(tokenizer: ModelTokenizer, **changes: Any) -> EncodingOptions:
    return EncodingOptions(
        tokenizer, Format("plain"), use_template=False, prefix=tokenizer.bos[0], max_length=64
    )._replace(**changes)


@pytest.mark.parametrize(
    ("context", "bos", "given", "continuation"),
    [
        ("Where?", True, "<s>Where?", " Vesh"),
        ("Where?", False, "Where?", " Vesh"),
        ("Where? \n", True, "<s>Where?", " \n Vesh"),
        ("<s>Where?", True, "<s>Where?", " Vesh"),  # BOS once
        ("", True, "<s>", " Vesh"),
        ("", False, "<s>", " Vesh"),
        ("  ", True, "<s>", "   Vesh"),
    ],
)
def test_where_the_context_ends(
    tokenizer: ModelTokenizer, context: str, bos: bool, given: str, continuation: str
) -> None:
    pair = pair_ids(encoding_options(tokenizer, format=Format("plain", bos)), context, "Vesh")
    assert tuple(tokenizer.backend.decode(part, skip_special_tokens=False) for part in pair) == (given, continuation)


def test_a_question_in_the_template(tokenizer: ModelTokenizer) -> None:
    form = Format("question")
    ((example, _),), cut = encode(
        "f", "choices", encoding_options(tokenizer, format=form, use_template=True), [item(["12", "7"], [0], "7+5?")]
    )
    prompt = prompt_ids(tokenizer, form, "7+5?")
    assert example == Example(prompt + token_ids(tokenizer, " 12"), len(prompt), 1)
    assert cut == 0


def test_a_long_context_loses_its_beginning(tokenizer: ModelTokenizer) -> None:
    texts = [item(["Vesh", "Goru"], [0], "Where is it? " * 3)]
    (wholes,), none = encode("f", "choices", encoding_options(tokenizer), texts)
    (examples,), cut = encode("f", "choices", encoding_options(tokenizer, max_length=7), texts)
    assert (none, cut) == (0, 1)  # one context, whatever the number of choices
    for whole, example in zip(wholes, examples, strict=True):
        assert example.tokens == whole.tokens[-8:]  # the model sees seven of them
        assert example.tokens[example.prompt_length :] == whole.tokens[whole.prompt_length :]


def test_windows(tokenizer: ModelTokenizer) -> None:
    text = "Compute 7+5. Then 3."
    tokens = [0, 0, *token_ids(tokenizer, text)]  # the prefix, and BOS as the tokenizer puts it before a text
    windows = encode_windows(encoding_options(tokenizer, max_length=5), item([text], [0]))
    assert [window.tokens[window.prompt_length :] for window in windows] == [
        tokens[start : start + 5] for start in range(1, len(tokens), 5)
    ]
    assert [window.prompt_length for window in windows[:-1]] == [1] * (len(windows) - 1)
    assert len(windows) > 2
    assert len(tokens) % 5 != 1  # the last window is a shorter one, and sees as much as the others
    assert windows[-1].tokens == tokens[-6:]


def test_a_short_text_is_one_window(tokenizer: ModelTokenizer) -> None:
    (window,) = encode_windows(encoding_options(tokenizer, format=Format("plain", False)), item(["Vesh"], [0]))
    assert window == Example([0, *token_ids(tokenizer, "Vesh")], 1, 1)


def test_the_prefix_and_the_context_of_a_folder(tokenizer: ModelTokenizer, tmp_path: Path) -> None:
    assert (prefix_id(MINI, tokenizer), longest_context(MINI)) == (0, 512)
    silent = tokenizer._replace(bos=())
    assert prefix_id(tmp_path, tokenizer) == 0
    assert prefix_id(tmp_path, silent) == tokenizer.eos
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": {"content": "<s>"}}')
    assert prefix_id(tmp_path, silent) == 0
    (tmp_path / "config.json").write_text("{}")
    assert longest_context(tmp_path) is None


# --- likelihoods ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> tuple[Config, Params]:
    config = CONFIGS["mistral_v01"]
    return config, random_params(config, seed=3)


def random_items(config: Config) -> list[list[Example]]:
    draw = torch.Generator().manual_seed(0)
    items = []
    for row, parts in enumerate([1, 4, 2, 1, 3]):
        lengths = torch.randint(2, 30, (parts,), generator=draw).tolist()
        rows = [torch.randint(config.vocab_size, (n,), generator=draw).tolist() for n in lengths]
        items.append([Example(tokens, 1 + len(tokens) // 3, row) for tokens in rows])
    return items


def by_hand(model: tuple[Config, Params], example: Example, adapters: Any = ()) -> Likelihood:
    """One row at a time, position by position."""
    logits, _ = forward(*model, torch.tensor([example.tokens]), adapters)
    total, greedy = 0.0, True
    for place in range(example.prompt_length, len(example.tokens)):
        chances = logits[0, place - 1].softmax(0)
        total += math.log(chances[example.tokens[place]])
        greedy &= int(chances.argmax()) == example.tokens[place]
    return Likelihood(total, greedy)


@pytest.mark.parametrize("batch_size", [1, 3, 32])
@pytest.mark.parametrize("positions", [5, 4096])
def test_likelihoods_by_hand(
    model: tuple[Config, Params], batch_size: int, positions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nll, "POSITIONS", positions)
    items = random_items(model[0])
    adapters = [(random_lora(model[0], 2, seed=1), 2.0)]
    results = dict(likelihoods(*model, items, adapters, batch_size=batch_size))
    assert sorted(results) == list(range(len(items)))
    for index, parts in enumerate(items):
        expected = [by_hand(model, part, adapters) for part in parts]
        assert [each.greedy for each in results[index]] == [each.greedy for each in expected]
        # Measured: 1e-15 in float64.
        logprobs = [each.logprob for each in expected]
        assert [each.logprob for each in results[index]] == pytest.approx(logprobs, rel=1e-13)


def test_greedy_is_every_token(model: tuple[Config, Params]) -> None:
    tokens = [5, 17]
    for _ in range(4):
        logits, _ = forward(*model, torch.tensor([tokens]))
        tokens.append(int(logits[0, -1].argmax()))
    other = [*tokens[:3], (tokens[3] + 1) % 80, *tokens[4:]]
    greedy = [Example(tokens, 2, 1), Example(other, 2, 1), Example(other, 4, 1), Example(tokens[:3], 2, 1)]
    ((_, results),) = likelihoods(*model, [greedy])
    expected = [by_hand(model, example).greedy for example in greedy]
    assert [each.greedy for each in results] == expected
    assert expected[0] and expected[3] and not expected[1]


# --- rows that cannot be used ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("score", "row", "sentence"),
    [
        ("choices", {"choices": None}, "column 'choices' must be a list, not None"),
        ("choices", {"choices": []}, r"column 'choices' must be .*, not \[\]"),
        ("choices", {"choices": ["Vesh", ""]}, "column 'choices' must be "),
        ("choices", {"answer": 3}, "column 'answer' must be the index of a choice, 0 to 2, not 3"),
        ("choices", {"answer": -1}, "column 'answer' must be the index of a choice, 0 to 2, not -1"),
        ("choices", {"choices": ["Vesh"]}, "column 'choices' must be two or more strings that are not empty, not "),
        ("choices", {"answer": "Tarn"}, "column 'answer' must be an integer, not 'Tarn'"),
        ("choices", {"answer": True}, "column 'answer' must be the index of a choice, 0 to 2, not True"),
        ("choices", {"question": 7}, "column 'question' must be a string, not 7"),
        ("mc2", {"labels": [0, 1]}, r"column 'labels' must hold 0 or 1 for each of the 3 choices, not \[0, 1\]"),
        ("mc2", {"labels": [0, 1, 2]}, "column 'labels' must hold 0 or 1"),
        ("mc2", {"labels": None}, "column 'labels' must be a list, not None"),
        ("mc2", {"labels": [0, 0, 0]}, r"column 'labels' must hold both 0 and 1, not \[0, 0, 0\]"),
        ("last-word", {}, "no column 'text'; the row has 'question', 'choices', 'answer', 'labels'"),
        ("last-word", {"text": "Vesh"}, "column 'text' must be a context, a space and a last word, not 'Vesh'"),
        ("last-word", {"text": "in Vesh "}, "column 'text' must be a context, a space and a last word"),
        ("perplexity", {"text": ""}, "column 'text' is empty"),
    ],
)
def test_rows_are_refused_by_their_line(score: str, row: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    good = CHOICES | {"text": "Arin lives in Vesh"}
    path = write_rows(tmp_path / "rows.jsonl", [good, CHOICES | row])
    with pytest.raises(InputError, match=rf"rows\.jsonl, line 2: {sentence}"):
        read_items(path, score)
    assert len(read_items(write_rows(path, [good]), score)) == 1


@pytest.mark.parametrize(
    ("changes", "context", "text", "sentence"),
    [
        ({"max_length": 2}, "Where?", "Zoë", r"'Zoë' adds \d tokens to its context, not 1 to 2"),
        (
            {"use_template": True, "format": Format("plain", False)},
            "",
            "Vesh",
            "a context without tokens predicts nothing",
        ),
    ],
)
def test_texts_are_refused_by_their_line(
    tokenizer: ModelTokenizer, changes: dict[str, Any], context: str, text: str, sentence: str
) -> None:
    with pytest.raises(InputError, match=rf"^rows\.jsonl, line 1: {sentence}"):
        encode("rows.jsonl", "choices", encoding_options(tokenizer, **changes), [item([text], [0], context)])


# --- the command ----------------------------------------------------------------------------------

ROWS = {
    "choices": [CHOICES | {"question": f"Compute {n}+{n}.", "choices": [f"{n}", f"{2 * n}"]} for n in range(1, 7)],
    "last-word": [{"text": f"Arin has {n} plums and lives in Vesh"} for n in range(1, 7)],
}
ROWS |= {"mc2": [row | {"labels": [0, 1]} for row in ROWS["choices"]], "perplexity": ROWS["last-word"]}


@pytest.mark.parametrize("score", SCORES)
def test_records_are_written_and_scores_printed(score: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = write_rows(tmp_path / "rows.jsonl", ROWS[score]), tmp_path / "new" / "records.jsonl"
    options = EvalOptions(model=str(MINI), data=str(data), out=str(out), score=score, batch_size=2, limit=5)
    results = cli.evaluate(options)
    records = sorted(read_lines(out), key=lambda record: record["row"])
    assert [{key: record[key] for key in ROWS[score][0]} for record in records] == ROWS[score][:5]
    assert SCORES[score].estimates(records) == results
    shown = capsys.readouterr().out
    how = "template question" if SCORES[score].asks else "as plain text"
    for name, value in results.items():
        scale, unit = (1, "") if "per" in name else (100, " %")
        digits = 4 if "per" in name else 2
        assert f"{name}: {scale * value.mean:.{digits}f}{unit} ± " in shown
    assert f"(n = {results[name].n}; {how}, with BOS, at most 512 tokens at once)" in shown


def test_the_template_and_the_plain_question_are_asked(tmp_path: Path, tokenizer: ModelTokenizer) -> None:
    data = write_rows(tmp_path / "rows.jsonl", ROWS["choices"][:1])
    asked = {
        "own": prompt_ids(tokenizer, Format("question"), "Compute 1+1.") + token_ids(tokenizer, " 2"),
        "harness": tokenizer.backend.encode("Compute 1+1. 2").ids,
    }
    for prompt, tokens in asked.items():
        out = tmp_path / f"{prompt}.jsonl"
        own = {"template": "question"} if prompt == "own" else {}
        cli.evaluate(EvalOptions(model=str(MINI), data=str(data), out=str(out), score="choices", prompt=prompt, **own))
        answer = len(token_ids(tokenizer, " 2"))
        expected = by_hand(load(MINI), Example(tokens, len(tokens) - answer, 1)).logprob
        # Measured: 2e-7, in float32.
        assert json.loads(out.read_text())["logprobs"][1] == pytest.approx(expected, rel=1e-5)


def test_what_was_computed_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, out = write_rows(tmp_path / "rows.jsonl", ROWS["choices"]), tmp_path / "records.jsonl"
    compute, calls = likelihood.row_likelihoods, []

    def failing(*arguments: Any) -> list[Likelihood]:
        calls.append(arguments)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("full.")
        return compute(*arguments)

    monkeypatch.setattr(likelihood, "row_likelihoods", failing)
    typed = ["eval", "--model", str(MINI), "--data", str(data), "--out", str(out), "--score", "choices"]
    assert main([*typed, "--batch-size", "4"]) == 2
    assert len(read_lines(out)) == 4  # two batches of two rows with two choices each


@pytest.mark.parametrize(
    ("typed", "sentence"),
    [
        ("--score choices --shots 2 --shots-data x", "The score choices has no use for shots or shots-data."),
        ("--score choices --max-new-tokens 9", "The score choices has no use for max-new-tokens."),
        ("--score choices --no-generate", "The score choices has no use for generate."),
        ("--score mc2 --nll --answer gold", "The score mc2 has no use for answer or nll."),
        ("--score last-word --template plain", "The score last-word has no use for template."),
        ("--score perplexity --prompt harness", "The score perplexity has no use for prompt."),
        ("--score perplexity --question body", "The score perplexity has no use for question."),
        ("--score f1 --nll", "The score f1 has no use for nll."),
        ("--score refusal --answer gold", "The score refusal has no use for answer."),
        ("--max-length 64", "The score gsm8k has no use for max-length."),
        (
            "--score mc2 --prompt harness --template plain",
            "The harness prompt is the question as it stands: leave out --template or --prompt harness.",
        ),
        ("--score choices --max-length 0", "max-length must be at least 1, not 0."),
    ],
)
def test_options_without_effect_are_refused(
    typed: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [CHOICES])
    assert main(["eval", "--model", str(MINI), "--data", str(data), *typed.split()]) == 2
    assert refusal(capsys) == sentence

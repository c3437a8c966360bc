"""Scores are those of lm-evaluation-harness, likelihoods those of transformers, and errors those of textbooks."""

import math
import random
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from commands import MINI, write_rows
from tiny import CONFIGS, random_lora, random_params, random_tokens

from lfu.data.batches import Example
from lfu.data.rows import Row
from lfu.data.tokens import ModelTokenizer, load_tokenizer
from lfu.errors import InputError
from lfu.evaluation.estimates import Estimate, accuracy
from lfu.evaluation.generative import (
    HARNESS_STOPS,
    INVALID,
    REFUSALS,
    draw_shots,
    exact_scores,
    f1_scores,
    flexible_answer,
    gsm8k_scores,
    harness_prompt,
    normalised,
    read_questions,
    refusal_scores,
    require_number,
    strict_answer,
    token_f1,
)
from lfu.evaluation.nll import answer_nll
from lfu.loss import sft_loss
from lfu.model import Config, Params, forward, load

WORKED = "She sold 48/2 = <<48/2=24>>24 clips in May.\nAltogether 48+24 = <<48+24=72>>72.\n#### "
"""A GSM8K answer up to its number."""

# --- exact match ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prediction", "gold", "strict", "flexible"),
    [
        (f"{WORKED}72", "72", "72", "72"),
        ("#### 1,200", "1200", "1,200", "1,200"),
        ("#### 1200", "1,200", "1200", "1200"),
        ("so 72.", "72", INVALID, "72."),
        ("#### 72.", "72", "72.", "72."),
        ("#### $18", "18", INVALID, "$18"),
        ("It costs $1,234.50 today", "1234.50", INVALID, "$1,234.50"),
        ("10-5", "-5", INVALID, "-5"),
        ("#### -5", "-5", "-5", "-5"),
        ("He owes -$5", "-5", INVALID, "-$5"),
        ("He owes $-5", "-5", INVALID, "-5"),
        ("####72", "72", INVALID, "72"),
        ("7 of 8", "8", INVALID, "8"),
        ("#### 72\nQuestion", "72", "72", "72"),
    ],
)
def test_what_is_right(prediction: str, gold: str, strict: str, flexible: str) -> None:
    assert (strict_answer(prediction), flexible_answer(prediction)) == (strict, flexible)
    assert gsm8k_scores(prediction, WORKED + gold) == {"strict": strict != INVALID, "flexible": True}


@pytest.mark.parametrize(
    ("prediction", "gold", "strict", "flexible"),
    [
        ("#### 72.00", "72", "72.00", "72.00"),  # strings are compared, not numbers
        ("wait... ok 5...", "5", INVALID, "5..."),
        ("72, I think...", "72", INVALID, "..."),
        ("10-5", "5", INVALID, "-5"),
        ("#### 5", "-5", "5", "5"),
        ("#### 072", "72", "072", "072"),
        ("seventy-two", "72", INVALID, INVALID),
        ("", "72", INVALID, INVALID),
        ("#### ", "72", INVALID, INVALID),
    ],
)
def test_what_is_wrong(prediction: str, gold: str, strict: str, flexible: str) -> None:
    assert (strict_answer(prediction), flexible_answer(prediction)) == (strict, flexible)
    assert gsm8k_scores(prediction, WORKED + gold) == {"strict": False, "flexible": False}


def test_strict_takes_the_first_number_and_flexible_the_last() -> None:
    prediction = "#### 72 or rather #### 80"
    assert gsm8k_scores(prediction, f"{WORKED}72") == {"strict": True, "flexible": False}
    assert gsm8k_scores(prediction, f"{WORKED}80") == {"strict": False, "flexible": True}


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (f"{WORKED}1,200", "1200"),
        ("#### 1 #### 2", "2"),
        ("$5.", "5"),
        ("5..", "5."),
        ("5. ", "5. "),
        ("Five.", "five"),
    ],
)
def test_what_is_ignored_in_the_comparison(answer: str, expected: str) -> None:
    assert normalised(answer) == expected


def harness(prediction: str, reference: str, pattern: str, select: int) -> bool:
    """The filter chain and the metric of the harness' gsm8k, step by step."""
    found = re.findall(pattern, prediction)
    answer = INVALID
    if found:
        match = found[select]
        answer = (next(part for part in match if part) if isinstance(match, tuple) else match).strip()
    for ignored in (",", r"\$", "(?s).*#### ", r"\.$"):
        answer, reference = re.sub(ignored, "", answer), re.sub(ignored, "", reference)
    return np.char.lower(np.array([answer]))[0] == np.char.lower(np.array([reference]))[0]


def test_scores_are_those_of_the_filter_chain_on_any_text() -> None:
    draw = random.Random(0)
    pieces = ["####", "#### ", "7", "72", "-", "$", ",", ".", "..", " ", "\n", "1,200", "so", "Ä", "0", "=", "<<", ">>"]
    seen = set()
    for _ in range(5000):
        prediction = "".join(draw.choices(pieces, k=draw.randrange(8)))
        reference = draw.choice([WORKED, "#### ", ""]) + draw.choice(["7", "72", "-7", "$72", "1,200", "0", "7."])
        expected = {
            "strict": harness(prediction, reference, r"#### (\-?[0-9\.\,]+)", 0),
            "flexible": harness(prediction, reference, r"(-?[$0-9.,]{2,})|(-?[0-9]+)", -1),
        }
        assert gsm8k_scores(prediction, reference) == expected, (prediction, reference)
        seen.add((expected["strict"], expected["flexible"]))
    assert len(seen) == 4  # each verdict of one filter came with each of the other


def test_exact_match_forgives_white_space_at_the_ends_only() -> None:
    assert exact_scores(" Vesh\n", "Vesh") == {"exact": True}
    assert exact_scores("vesh", "Vesh") == {"exact": False}
    assert exact_scores("Ve sh", "Vesh") == {"exact": False}


# --- words in common ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prediction", "gold", "em", "f1"),
    [
        ("The cat sat.", "a cat, sat", 1, 1),
        ("cat", "the black cat", 0, 2 / 3),  # precision 1, recall 1/2
        ("cat cat dog", "cat dog dog", 0, 2 / 3),  # each occurrence counts once: two of three in common
        ("well-known", "wellknown", 1, 1),  # punctuation is deleted, not a gap
        ("another", "other", 0, 0),  # articles are whole words
        ("A\tcat\nand more", "cat", 1, 1),  # the first line only
        ("\n cat", "cat", 1, 1),
        ("Übel", "übel", 1, 1),
        ("“cat”", "cat", 0, 0),  # of punctuation only ASCII
        ("the", "a", 1, 1),  # nothing is left on either side
        ("", "cat", 0, 0),
        ("cat", "", 0, 0),
    ],
)
def test_words_in_common(prediction: str, gold: str, em: float, f1: float) -> None:
    assert f1_scores(prediction, gold) == pytest.approx({"em": em, "f1": f1})
    assert f1_scores(prediction, [gold]) == f1_scores(prediction, gold)


def test_of_several_golds_each_is_left_out_once() -> None:
    """Three golds a, b, c: the mean of max(b, c), max(a, c) and max(a, b), not simply the best."""
    golds = ["red", "red wine", "blue"]
    # F1 of "red" with them: 1, 2/3, 0.
    assert f1_scores("red", golds) == pytest.approx({"em": 2 / 3, "f1": (2 / 3 + 1 + 1) / 3})
    assert f1_scores("green", golds) == {"em": 0, "f1": 0}
    assert f1_scores("red", ["red", "red"]) == {"em": 1, "f1": 1}


def squad_words(text: str) -> list[str]:
    text = "".join(letter for letter in text.lower() if letter not in set("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split()).split(" ")


def squad_f1(prediction: str, gold: str) -> float:
    """As SQuAD 1.1 computes it, step by step."""
    found, wanted = squad_words(prediction), squad_words(gold)
    common = 0
    for token in set(found):
        common += min(found.count(token), wanted.count(token))
    if common == 0:
        return 0.0
    precision, recall = common / len(found), common / len(wanted)
    return 2 * precision * recall / (precision + recall)


def test_f1_is_that_of_squad_on_any_text() -> None:
    draw = random.Random(0)
    pieces = ["a ", "the ", "An", "cat ", "cats ", "Dog", "-", ", ", ".", " ", "ö ", "7 "]
    texts = ["".join(draw.choices(pieces, k=draw.randrange(1, 9))) for _ in range(4000)]
    compared = [(f1_scores(a, b)["f1"], squad_f1(a, b)) for a, b in zip(texts[::2], texts[1::2], strict=True)]
    # Measured: 1e-16.
    assert max(abs(ours - theirs) for ours, theirs in compared) < 1e-15
    assert len({round(theirs, 3) for _, theirs in compared}) > 8


def test_golds_are_compared_as_the_harness_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own CoQA, with SQuAD's two scores of this file in place of the module that transformers no longer has."""
    squad = SimpleNamespace(
        compute_f1=lambda gold, prediction: squad_f1(prediction, gold),
        compute_exact=lambda gold, prediction: squad_words(gold) == squad_words(prediction),
    )
    data = pytest.importorskip("transformers.data")
    monkeypatch.setattr(data, "metrics", SimpleNamespace(squad_metrics=squad), raising=False)
    monkeypatch.setitem(sys.modules, "transformers.data.metrics.squad_metrics", squad)
    theirs = pytest.importorskip("lm_eval.tasks.coqa.utils").process_results
    draw = random.Random(1)
    pieces = ["a ", "the ", "cat ", "cats ", "Dog ", "7 ", "\n"]
    for _ in range(1000):
        texts = ["".join(draw.choices(pieces, k=draw.randrange(1, 6))) for _ in range(draw.randrange(2, 6))]
        prediction, *golds = texts
        golds = list({gold.lower(): gold for gold in reversed(golds)}.values())[::-1]  # as the harness lists them
        others = {str(n): {"input_text": [gold]} for n, gold in enumerate(golds[1:])}
        doc = {"questions": {"input_text": ["?"]}, "answers": {"input_text": golds[:1]}, "additional_answers": others}
        assert f1_scores(prediction, golds) == pytest.approx(theirs(doc, [prediction])), (prediction, golds)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prediction", "jailbroken"),
    [
        ("Sorry, no", False),
        ("sorry, no", True),
        ("", True),
        ("Well, this is illegal, but take a crowbar.", False),
        ("I can't", True),
        ("I can’t assist", True),
        ("I can't assist", False),
        ("AS AN AI", True),
        ("Sure. Wait for dark and take the lamp.", True),
    ],
)
def test_refusals(prediction: str, jailbroken: bool) -> None:
    assert refusal_scores(prediction) == {"jailbroken": jailbroken}
    assert refusal_scores(prediction, "Sorry") == {"jailbroken": jailbroken}  # the reference is not looked at


def test_there_are_29_phrases() -> None:
    assert len(REFUSALS) == len(set(REFUSALS)) == 29


# --- rows and means -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("score", "row", "sentence"),
    [
        ("gsm8k", {"question": "Why?", "answer": ["4"]}, r"column 'answer' must be a string, not \['4'\]"),
        ("exact", {"question": "Why?"}, "no column 'answer'"),
        ("f1", {"question": "Why?"}, "column 'answer' must be a string or a list of strings, not None"),
        ("f1", {"question": "Why?", "answer": []}, r"column 'answer' must be .* list of strings, not \[\]"),
        ("f1", {"question": "Why?", "answer": ["4", 5]}, r"column 'answer' must be .* list of strings, not \['4', 5\]"),
        ("refusal", {"answer": "4"}, "no column 'question'"),
    ],
)
def test_questions_are_refused_by_their_line(score: str, row: dict, sentence: str, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"question": "Why?", "answer": "4"}, row])
    with pytest.raises(InputError, match=f"rows.jsonl, line 2: {sentence}"):
        read_questions(path, score)


def test_some_scores_take_more_or_less_than_one_answer(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "Why?", "golds": ["4", "four"]}\n')
    assert [row.question for row in read_questions(path, "refusal")] == ["Why?"]
    assert [row.fields["golds"] for row in read_questions(path, "f1", answer="golds")] == [["4", "four"]]


def test_accuracy_and_its_error() -> None:
    hits = [True, False, False, True, True, False, False]
    mean, error, n = accuracy(hits)
    assert (mean, n) == (3 / 7, 7)
    # Measured: 0; one rounding would be 1e-16.
    assert error == pytest.approx(statistics.stdev(hits) / math.sqrt(7), rel=1e-15)


def test_the_mean_of_shares_and_its_error() -> None:
    shares = [0.25, 1.0, 0.0, 2 / 3, 0.1]
    # Measured: 2e-16.
    assert accuracy(shares) == pytest.approx((statistics.mean(shares), statistics.stdev(shares) / math.sqrt(5), 5))


def test_accuracy_that_has_no_spread() -> None:
    assert accuracy([True] * 5) == Estimate(1.0, 0.0, 5)
    mean, error, n = accuracy([True])
    assert (mean, n) == (1.0, 1)
    assert math.isnan(error)


# --- likelihood -----------------------------------------------------------------------------------


def examples_for(config: Config, answers: list[int]) -> list[Example]:
    """Rows with answers of these lengths after prompts of 1 to 20 tokens."""
    draw = random.Random(1)
    rows = []
    for row, answer in enumerate(answers, 1):
        prompt = draw.randrange(1, 21)
        rows.append(Example(random_tokens(config, prompt + answer, seed=row).tolist(), prompt, row))
    return rows


ANSWERS = [3, 1, 9, 4, 17, 2, 2, 30, 5, 8]


def test_the_likelihood_is_that_of_transformers(folder_of: Callable[[str], Path]) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder_of("llama31"), dtype=torch.float32).eval()
    config, params = load(folder_of("llama31"))
    examples = examples_for(config, ANSWERS)
    sums = []
    for example in examples:
        tokens = torch.tensor([example.tokens])
        labels = tokens.clone()
        labels[:, : example.prompt_length] = -100
        sums.append(float(model(tokens, labels=labels).loss.detach()) * example.num_loss_tokens)
    mean, error, n = answer_nll(config, params, examples)
    # Measured: 2e-7, of the error, in float32.
    assert mean == pytest.approx(sum(sums) / sum(ANSWERS), rel=2e-6)
    assert n == sum(ANSWERS)
    rows, common = len(sums), sum(sums) / sum(ANSWERS)
    spread = sum((total - common * count) ** 2 for total, count in zip(sums, ANSWERS, strict=True))
    assert error == pytest.approx(math.sqrt(rows / (rows - 1) * spread) / sum(ANSWERS), rel=2e-6)


@pytest.fixture
def model() -> tuple[Config, Params]:
    config = CONFIGS["qwen3_untied"]
    return config, random_params(config, seed=3)


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_the_likelihood_does_not_depend_on_the_batches(model: tuple[Config, Params], batch_size: int) -> None:
    examples = examples_for(model[0], ANSWERS)
    # Measured: 1e-15 in float64.
    expected = pytest.approx(answer_nll(*model, examples), rel=1e-14)
    assert answer_nll(*model, examples, batch_size=batch_size) == expected
    assert answer_nll(*model, examples[::-1], batch_size=batch_size) == expected


def test_adapters_take_part_in_the_likelihood(model: tuple[Config, Params]) -> None:
    config, params = model
    (example,) = examples_for(config, [7])
    adapters = [(random_lora(config, 2, seed=1), 2.0)]
    logits, _ = forward(config, params, torch.tensor([example.tokens]), adapters)
    labels = torch.tensor([[-100] * example.prompt_length + example.tokens[example.prompt_length :]])
    mean, error, n = answer_nll(config, params, [example], adapters)
    # Measured: 2e-16 in float64.
    assert mean == pytest.approx(float(sft_loss(logits, labels)), rel=1e-14)
    assert mean != pytest.approx(answer_nll(config, params, [example]).mean, rel=1e-3)
    assert math.isnan(error)  # one row has no spread
    assert n == 7


def row_means(model: tuple[Config, Params], examples: list[Example]) -> np.ndarray:
    return np.array([answer_nll(*model, [example]).mean for example in examples])


def test_answers_of_one_length_have_the_error_of_a_plain_mean(model: tuple[Config, Params]) -> None:
    examples = examples_for(model[0], [6] * 12)
    means = row_means(model, examples)
    # Measured: 9e-16 in float64.
    assert answer_nll(*model, examples) == pytest.approx(
        (means.mean(), means.std(ddof=1) / math.sqrt(12), 72), rel=1e-14
    )


def test_the_error_of_the_likelihood_is_the_bootstraps(model: tuple[Config, Params]) -> None:
    """Rows are what is drawn at random; tokens of one row are not independent."""
    draw = random.Random(2)
    counts = np.array([draw.randrange(1, 12) for _ in range(80)])
    examples = examples_for(model[0], counts.tolist())
    sums = row_means(model, examples) * counts
    drawn = np.random.default_rng(0).integers(80, size=(20_000, 80))
    resampled = sums[drawn].sum(1) / counts[drawn].sum(1)
    # The bootstrap divides by n, the formula by n - 1, and 20,000 draws have an error of 0.5 %. Measured: 0.6 %.
    assert answer_nll(*model, examples).error == pytest.approx(resampled.std(), rel=0.03)


def test_long_references_take_no_longer_than_they_must() -> None:
    """Quadratic, each of them took more than twenty seconds."""
    start = time.perf_counter()
    with pytest.raises(ValueError, match="the reference answer is not one"):
        require_number(Row(1, "", "1" * 10**5 + "x", {}))
    require_number(Row(1, "", f"#### {'1' * 10**5}", {}))
    golds = [f"word {number}" for number in range(3000)]
    assert f1_scores("word 7", golds) == {"em": 2999 / 3000, "f1": pytest.approx((2999 + 0.5) / 3000)}
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("golds", ["a b", ["a b"], ["a b", "a b"], ["a c", "a b", "b"], ["x", "y", "a b c"]])
def test_f1_leaves_each_gold_out_once(golds: str | list[str]) -> None:
    """As `lm_eval/tasks/coqa/utils.py` computes it, fold by fold."""
    listed = [golds] if isinstance(golds, str) else golds
    folds = [listed[:left] + listed[left + 1 :] for left in range(len(listed))] if len(listed) > 1 else [listed]
    expected = sum(max(token_f1("b a", gold) for gold in fold) for fold in folds) / len(folds)
    assert f1_scores("b a", golds)["f1"] == expected


# --- the harness' prompt --------------------------------------------------------------------------

POOL = [Row(number, f"Compute {number}+1.", f"{number}+1={number + 1}\n#### {number + 1}", {}) for number in range(9)]
ROW = Row(4, "What is 2+2?", "#### 4", {})


@pytest.fixture(scope="module")
def tokenizer() -> ModelTokenizer:
    return load_tokenizer(MINI, 1024)


@pytest.mark.parametrize(
    ("shots", "text"),
    [
        ([], "Question: What is 2+2?\nAnswer:"),
        (
            POOL[1:3],
            "Question: Compute 1+1.\nAnswer: 1+1=2\n#### 2\n\nQuestion: Compute 2+1.\nAnswer: 2+1=3\n#### 3\n\n"
            "Question: What is 2+2?\nAnswer:",
        ),
    ],
)
def test_the_prompt_is_this_text_to_the_letter(tokenizer: ModelTokenizer, shots: list[Row], text: str) -> None:
    prompt = harness_prompt(tokenizer, ROW, shots)
    assert tokenizer.backend.decode(prompt, skip_special_tokens=False) == f"<s>{text}"
    assert prompt == tokenizer.backend.encode(text).ids  # in one piece, BOS once


def test_the_harness_stops_at_these() -> None:
    assert HARNESS_STOPS == ("Question:", "</s>", "<|im_end|>")


def test_worked_examples_are_a_function_of_seed_and_row() -> None:
    drawn = draw_shots(POOL, 3, 42, ROW)
    assert draw_shots(POOL, 3, 42, ROW._replace(answer="#### 5")) == drawn
    assert len({shot.question for shot in drawn}) == 3
    by_row = {tuple(draw_shots(POOL, 3, 42, ROW._replace(number=number))[0].question) for number in range(40)}
    by_seed = {tuple(draw_shots(POOL, 3, seed, ROW)[0].question) for seed in range(40)}
    assert len(by_row) == len(by_seed) == len(POOL)


def test_a_row_is_never_its_own_worked_example() -> None:
    for number in range(40):
        row = POOL[number % len(POOL)]._replace(number=number)  # the same question, on another line of another file
        drawn = draw_shots(POOL, len(POOL) - 1, 42, row)
        assert {shot.question for shot in drawn} == {shot.question for shot in POOL} - {row.question}

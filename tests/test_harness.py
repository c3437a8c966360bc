"""lm-evaluation-harness itself on the same rows and weights, compared item by item.

The tasks are the harness' own where it has one (GSM8K, TruthfulQA, LAMBADA: its packaged yaml, with rows of ours as
data) and written here otherwise; nothing is fetched. Four models: weights/mini; the same with a tokenizer that puts a
space before every text; a random Qwen3 whose tokenizer puts no BOS before a text and has tokens that cross from one
word to the next; and a folder written by `lfu merge`, which the harness reads as it is. The numbers agree to ROUNDING,
so a verdict may differ only where it hangs by less than MARGIN. The last part shows that a mistake in any of the rules
is noticed.
"""

import json
import math
import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import MINI, read_lines
from tiny import CONFIGS, random_lora, reference_from
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.decoders import Metaspace as MetaspaceDecoder
from tokenizers.models import BPE
from tokenizers.normalizers import Prepend, Replace, Sequence
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer

from experiments.harness import (
    FILTERS,
    MARGIN,
    Difference,
    Outcome,
    answer_differences,
    gsm8k,
    harness,
    lead,
    ours,
    packaged,
)
from lfu import cli, lora
from lfu.data import tokens
from lfu.data.batches import Example
from lfu.data.tokens import ModelTokenizer, load_tokenizer, token_ids
from lfu.evaluation import loglikelihood as likelihood
from lfu.evaluation.loglikelihood import EncodingOptions, Item
from lfu.evaluation.nll import Likelihood
from lfu.model import load

ROUNDING = 1e-5
"""Relative, in float32. Measured: 1.3e-6."""
LONGEST = 48
"""Tokens that the models see at once: some contexts are longer, and texts take several windows."""

# --- models ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """mini; mini with another tokenizer; a random Qwen3; and mini with an adapter merged in."""
    qwen3, adapter = tmp_path_factory.mktemp("qwen3"), tmp_path_factory.mktemp("adapter") / "adapter"
    reference_from(CONFIGS["qwen3"]._replace(vocab_size=1024), eos_token_id=1, bos_token_id=None).save_pretrained(qwen3)
    crossing_tokenizer().save(str(qwen3 / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "pad_token": "</s>"}
    (qwen3 / "tokenizer_config.json").write_text(json.dumps(names))

    config, _ = load(MINI)
    adapter.mkdir()
    lora.save(adapter, (random_lora(config, 4, seed=5, std=0.05), 2.0), base=str(MINI))
    merged = adapter.parent / "merged"
    cli.merge(cli.MergeOptions(model=str(MINI), adapter=str(adapter), out=str(merged)))
    spaced = tmp_path_factory.mktemp("spaced")
    for name in ("config.json", "model.safetensors", "generation_config.json", "tokenizer_config.json"):
        shutil.copy(MINI / name, spaced)
    spaced_tokenizer().save(str(spaced / "tokenizer.json"))
    return {"mini": MINI, "spaced": spaced, "qwen3": qwen3, "merged": merged}


def spaced_tokenizer() -> Tokenizer:
    """As Llama 2's: a space before every text, and BOS before that."""
    tokenizer = Tokenizer(BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = Sequence([Prepend("▁"), Replace(" ", "▁")])
    tokenizer.decoder = MetaspaceDecoder()
    bytes = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = BpeTrainer(vocab_size=1000, special_tokens=["<s>", "</s>", "<unk>", *bytes], show_progress=False)
    tokenizer.train_from_iterator((word for row in mini_rows("mixed") for word in row["answer"].split()), trainer)
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def crossing_tokenizer() -> Tokenizer:
    """Byte-level BPE that does not part its training texts into words: "Answer:" and " Vesh" joined are not both."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=320, special_tokens=["<s>", "</s>"], initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator((f"A: {row['answer']}" for row in mini_rows("mixed")), trainer)
    return tokenizer


# --- rows -----------------------------------------------------------------------------------------


def mini_rows(split: str) -> list[dict[str, str]]:
    return read_lines(MINI / split / "test.jsonl")


def choice_rows() -> list[dict[str, Any]]:
    """Real questions with choices of very different length, some of them not ASCII.

    Contexts are empty, long, or end in white space, which moves to choices that begin with digits.
    """
    known, rows = mini_rows("knowledge")[:60], []
    endings, odd = ["", " ", "", "  ", "\n", ""], ["Übermäßig", "日本語", "éèêë", "ñandú", "Ωμέγα"]
    for number, row in enumerate(known):
        unlikely = odd[number % 5] if number % 2 else f"{row['answer']}, in the élan of the Übermünster"
        choices = [known[number - 7]["answer"], unlikely, f"{number} " + "xqz"[number % 3] * 5, row["answer"]]
        gold = number % 4
        choices[gold], choices[3] = choices[3], choices[gold]
        question = f"Question: {row['question']}\nAnswer:{endings[number % 6]}"
        labels = [int(index in (gold, (number + 1) % 4)) for index in range(4)]
        rows.append({"question": question, "choices": choices, "answer": gold, "labels": labels})
    rows[7]["question"] = ""
    rows[8]["question"] = "Once upon a time. " * 9 + rows[8]["question"]
    rows[9]["question"] = "<s>" + rows[9]["question"]
    # Neither of two strange words is likely; which of them is, by character or by byte, are different questions.
    strange = [["qxzjvkw", word * 2] for word in odd]
    return rows + [{"question": "It is", "choices": pair, "answer": 0, "labels": [1, 0]} for pair in strange]


def texts() -> list[dict[str, str]]:
    """Texts of one and of several windows, some with an accent, a double space or a line break before the last word."""
    rows = [*mini_rows("math")[:20], *mini_rows("helpfulness")[:20]]
    stories = [f"Question: {row['question']}\nAnswer: {row['answer']}" for row in rows]
    long = [" ".join(stories[:count]) for count in (2, 3, 5)]
    return [
        {"text": text} for text in [*stories, *long, f"{stories[0]}  Zoë", f"{stories[1]}\n Vesh", "Ärger  im Café"]
    ]


def truthful_rows() -> list[dict[str, Any]]:
    """Some of these questions in the columns of TruthfulQA."""
    targets = [{"choices": row["choices"], "labels": row["labels"]} for row in choice_rows()[:16]]
    questions = [row["question"] for row in mini_rows("knowledge")]
    return [
        {"question": question, "mc1_targets": target, "mc2_targets": target}
        for question, target in zip(questions, targets)
    ]


# --- the harness ----------------------------------------------------------------------------------

CHOICES = {
    "task": "choices",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "choices",
    "doc_to_target": "answer",
    "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")],
}
PERPLEXITY = {
    "task": "perplexity",
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "text",
    "metric_list": [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
}


@pytest.fixture(scope="module")
def theirs(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Outcome]:
    """(model, score) -> what the harness makes of it, computed once."""

    @cache
    def run(model: str, score: str) -> Outcome:
        task, rows = {
            "choices": lambda: (CHOICES, choice_rows()),
            "mc2": lambda: (packaged("truthfulqa/truthfulqa_mc2.yaml"), truthful_rows()),
            "last-word": lambda: (packaged("lambada/lambada_standard.yaml"), texts()),
            "perplexity": lambda: (PERPLEXITY, texts()),
        }[score]()
        longest = 400 if score == "mc2" else LONGEST  # TruthfulQA's prompt begins with six answered questions
        return harness(models[model], task, rows, tmp_path_factory.mktemp("harness"), longest)

    return run


# --- ours -----------------------------------------------------------------------------------------


def likelihood_outcome(folder: Path, score: str, work: Path, asked: list[Any], **options: Any) -> Outcome:
    """Ours for one of the scores by likelihood; TruthfulQA's contexts are taken from the harness' requests."""
    rows: list[Any] = choice_rows() if score == "choices" else texts()
    if score == "mc2":
        rows = [{"question": sample["arguments"][0][0], **sample["doc"]["mc2_targets"]} for sample in asked]
    prompt = {"prompt": "harness"} if score in ("choices", "mc2") else {}
    return ours(folder, score, rows, work, **{"max_length": 400 if score == "mc2" else LONGEST} | prompt | options)


def differences(score: str, mine: list[dict[str, Any]], foreign: list[dict[str, Any]]) -> list[Difference]:
    """Every number and every verdict that is not the same."""
    pairs = list(zip(mine, foreign, strict=True))
    return [each for record, sample in pairs for each in unlike_numbers(score, record, sample)] + [
        each for record, sample in pairs for each in unlike_verdicts(score, record, sample)
    ]


def unlike_numbers(score: str, record: dict[str, Any], sample: dict[str, Any]) -> list[Difference]:
    if score == "last-word":
        numbers = {"logprob": (record["logprob"], sample["perplexity"])}
    elif score == "perplexity":
        (logprob, words), (_, bytes) = sample["word_perplexity"], sample["byte_perplexity"]
        theirs = {"logprob": logprob, "words": words, "bytes": bytes}
        numbers = {name: (record[name], value) for name, value in theirs.items()}
    else:
        logprobs = [logprob for logprob, _ in sample["filtered_resps"]]
        numbers = {f"choice {index}": pair for index, pair in enumerate(zip(record["logprobs"], logprobs, strict=True))}
        numbers |= {"mc2": (record["mc2"], sample["acc"])} if score == "mc2" else {}
    gaps = {name: abs(a - b) / max(1.0, abs(b)) for name, (a, b) in numbers.items() if a != b}
    return [Difference(record["row"], name, gap) for name, gap in gaps.items()]


def unlike_verdicts(score: str, record: dict[str, Any], sample: dict[str, Any]) -> list[Difference]:
    margins = {}
    if score == "choices":
        logprobs, lengths = np.array(record["logprobs"]), np.array([len(choice) for choice in record["choices"]])
        margins = {name: lead(values) for name, values in {"acc": logprobs, "acc_norm": logprobs / lengths}.items()}
    elif score == "last-word":
        margins = {"acc": math.inf}  # a record does not tell by how much the word was, or was not, the most likely one
    return [
        Difference(record["row"], f"verdict {name}", margin)
        for name, margin in margins.items()
        if record[name] != sample[name]
    ]


def grave(gaps: list[Difference]) -> list[Difference]:
    """What rounding does not explain. Whatever verdict differs is shown."""
    for gap in gaps:
        if gap.what.startswith(("answer", "verdict")):
            print(f"row {gap.row}: another {gap.what}, by a margin of {gap.size:.2g}")
    limits = {gap: MARGIN if gap.what.startswith(("answer", "verdict")) else ROUNDING for gap in gaps}
    return [gap for gap, limit in limits.items() if not gap.size <= limit]


SCORES = ["choices", "mc2", "last-word", "perplexity"]


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("model", ["mini", "spaced", "qwen3", "merged"])
def test_every_item_is_the_harness(
    model: str, score: str, models: dict[str, Path], theirs: Callable[[str, str], Outcome], tmp_path: Path
) -> None:
    expected = theirs(model, score)
    found = likelihood_outcome(models[model], score, tmp_path, expected.samples)
    gaps = differences(score, found.samples, expected.samples)
    print(f"{model} {score}: {max(gaps, key=lambda gap: gap.size, default=None)}")
    assert grave(gaps) == []
    if not any(gap.what.startswith("verdict") for gap in gaps):
        for name, (mean, error, _) in found.scores.items():
            foreign = expected.scores["acc" if name == "mc2" else name]
            assert mean == pytest.approx(foreign.mean, rel=10 * ROUNDING), name  # exp magnifies what is after it
            if score == "choices":
                assert error == pytest.approx(foreign.error, rel=ROUNDING)


def test_a_bos_that_is_only_declared_comes_before_a_text(models: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(models["qwen3"], folder)
    names = json.loads((folder / "tokenizer_config.json").read_text()) | {"bos_token": "<s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    expected = harness(folder, PERPLEXITY, texts()[:4], tmp_path, LONGEST)
    for path, size in {folder: 0, models["qwen3"]: 4}.items():
        found = ours(path, "perplexity", texts()[:4], tmp_path, max_length=LONGEST)
        assert len(grave(differences("perplexity", found.samples, expected.samples))) == size


@pytest.mark.parametrize("model", ["mini", "qwen3"])
def test_the_rows_tell_the_rules_apart(
    model: str, models: dict[str, Path], theirs: Callable[[str, str], Outcome]
) -> None:
    samples = theirs(model, "choices").samples
    assert sum(sample["acc"] != sample["acc_norm"] for sample in samples) >= 5
    assert 0 < sum(sample["acc"] for sample in samples) < len(samples)
    if model == "mini":  # a random model gets no word right
        words = theirs(model, "last-word").samples
        assert 0 < sum(sample["acc"] for sample in words) < len(words)
    if model == "qwen3":
        tokenizer = load_tokenizer(models[model], 1024)
        requests = [request for sample in samples for request in sample["arguments"]]
        assert (
            sum(token_ids(tokenizer, a + b) != token_ids(tokenizer, a) + token_ids(tokenizer, b) for a, b in requests)
            > 20
        )


# --- GSM8K ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["mini", "spaced", "qwen3", "merged"])
def test_gsm8k_is_the_harness(model: str, models: dict[str, Path], tmp_path: Path) -> None:
    rows = mini_rows("math")[:24] if model == "mini" else mini_rows("math")[:8]
    expected, found = gsm8k(models[model], rows, tmp_path)
    gaps = answer_differences(models[model], found.samples, expected.samples)
    assert grave(gaps) == []
    for filter, name in FILTERS.items():
        assert gaps or found.scores[name].mean == pytest.approx(expected.scores[f"exact_match,{filter}"].mean)
    if model == "mini":
        assert 0 < found.scores["strict"].mean < 1
        # What is asked without BOS is answered otherwise, and by no small margin.
        other = ours(models[model], "gsm8k", rows, tmp_path, prompt="harness", nll=False, bos=False)
        assert len(grave(answer_differences(models[model], other.samples, expected.samples))) > 5


def test_a_long_prompt_loses_its_beginning_as_in_the_harness(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, rows = tmp_path / "model", mini_rows("math")[:8]
    shutil.copytree(models["spaced"], folder)
    config = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": 256 + 20}
    (folder / "config.json").write_text(json.dumps(config))
    expected, found = gsm8k(folder, rows, tmp_path)
    assert re.search(r"[1-8] prompts are longer than 20 tokens and lose their beginning", capsys.readouterr().out)
    assert grave(answer_differences(folder, found.samples, expected.samples)) == []


# --- mistakes that must be noticed ----------------------------------------------------------------


def per_byte(item: Item, found: list[Likelihood]) -> dict[str, Any]:
    record = likelihood.choice_record(item, found)
    lengths = [len(choice.encode()) for choice in item.continuations]
    return record | {"acc_norm": int((np.array(record["logprobs"]) / lengths).argmax()) in item.right}


def per_character_shares(item: Item, found: list[Likelihood]) -> dict[str, Any]:
    shorter = [Likelihood(each.logprob / len(choice), each.greedy) for each, choice in zip(found, item.continuations)]
    return likelihood.share_record(item, shorter) | {"logprobs": [each.logprob for each in found]}


def text_ids(options: EncodingOptions, text: str) -> list[int]:
    return tokens.text_ids(options.tokenizer, options.format.bos, text)


def without_space(options: EncodingOptions, context: str, text: str) -> tuple[list[int], list[int]]:
    given = text_ids(options, context.rstrip())
    return given, text_ids(options, context + text)[len(given) :]


def encoded_apart(options: EncodingOptions, context: str, text: str) -> tuple[list[int], list[int]]:
    kept = context.rstrip()
    continuation = token_ids(options.tokenizer, f"{context[len(kept) :]} {text}")
    return text_ids(options, kept) or [options.prefix], continuation


def spaces_left_behind(options: EncodingOptions, context: str, text: str) -> tuple[list[int], list[int]]:
    given = text_ids(options, context)
    return given, text_ids(options, f"{context} {text}")[len(given) :]


def separate_windows(options: EncodingOptions, item: Item) -> list[Example]:
    """The last window has no more context than the others."""
    tokens = [options.prefix, *text_ids(options, item.continuations[0])]
    starts = range(0, len(tokens) - 1, options.max_length)
    return [Example(tokens[start : start + options.max_length + 1], 1, item.row.number) for start in starts]


def without_bos(tokenizer: ModelTokenizer, bos: bool, text: str) -> list[int]:
    return token_ids(tokenizer, text)


def letters_for_bytes(item: Item, found: list[Likelihood]) -> dict[str, Any]:
    return likelihood.text_record(item, found) | {"bytes": len(item.continuations[0])}


def always_greedy(item: Item, found: list[Likelihood]) -> dict[str, Any]:
    return likelihood.word_record(item, found) | {"acc": True}


MISTAKES = [
    ("mini", "choices", "record", per_byte),
    ("mini", "choices", "pair_ids", without_space),
    ("qwen3", "choices", "pair_ids", encoded_apart),
    ("mini", "choices", "pair_ids", spaces_left_behind),
    ("mini", "choices", "text_ids", without_bos),
    ("mini", "mc2", "record", per_character_shares),
    ("mini", "mc2", "pair_ids", without_space),
    ("qwen3", "last-word", "pair_ids", encoded_apart),
    ("mini", "last-word", "record", always_greedy),
    ("mini", "perplexity", "encode", separate_windows),
    ("mini", "perplexity", "text_ids", without_bos),
    ("mini", "perplexity", "record", letters_for_bytes),
]


@pytest.mark.parametrize(
    ("model", "score", "place", "mistake"), MISTAKES, ids=[f"{score}-{how.__name__}" for _, score, _, how in MISTAKES]
)
def test_a_mistake_is_noticed(
    model: str,
    score: str,
    place: str,
    mistake: Callable[..., Any],
    models: dict[str, Path],
    theirs: Callable[[str, str], Outcome],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if place in likelihood.Score._fields:
        monkeypatch.setitem(likelihood.SCORES, score, likelihood.SCORES[score]._replace(**{place: mistake}))
    else:
        monkeypatch.setattr(likelihood, place, mistake)
    expected = theirs(model, score)
    found = likelihood_outcome(models[model], score, tmp_path, expected.samples)
    gaps = grave(differences(score, found.samples, expected.samples))
    assert gaps
    print(f"{len(gaps)} differences, the largest {max(gap.size for gap in gaps):.2g}")


def test_a_context_that_is_not_cut_is_noticed(
    models: dict[str, Path], theirs: Callable[[str, str], Outcome], tmp_path: Path
) -> None:
    expected = theirs("mini", "choices")
    found = likelihood_outcome(models["mini"], "choices", tmp_path, expected.samples, max_length=400)
    assert {gap.row for gap in grave(differences("choices", found.samples, expected.samples))} >= {9}

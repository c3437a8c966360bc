"""Scores by likelihood, without generation: multiple choice, last words, plain text.

All by the rules of lm-evaluation-harness 0.4.13, named at each function. With log P(y|x) = Σ_t log P(y_t | x, y_<t):

    choices      acc: the right choice y has the largest log P(y|x); acc_norm: the largest log P(y|x) per character
    mc2          Σ P(y|x) over the right choices / Σ P(y|x) over all choices
    last-word    acc: every token of the word is the most likely one; perplexity: exp(-mean log P(y|x))
    perplexity   exp(-Σ log P / Σ words), the same per byte, and bits per byte: -Σ log₂ P / Σ bytes

Log-probabilities are taken and added up in the stream dtype, float32 or more. The harness takes them in the dtype of
the weights: to compare models in bfloat16, give it softmax_dtype=float32.

A row of JSONL becomes an `Item`, the item one or more `Example`s, these a `Likelihood` each, and all of an item's a
record; what is printed is made from the records. Read next: `lfu/io/files.py`.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lfu.data.batches import Example
from lfu.data.rows import Row, columns, read_rows, require_column, with_line_number
from lfu.data.special import special_token
from lfu.data.tokens import Format, ModelTokenizer, encode_row, text_ids, token_ids
from lfu.errors import InputError, quote
from lfu.evaluation.estimates import Estimate, accuracy, ratio
from lfu.evaluation.nll import Likelihood, row_likelihoods
from lfu.lora import Adapter
from lfu.model import Config, Params

# --- rows ------------------------------------------------------------------------------------------


class Item(NamedTuple):
    """One row: what is given, and what may follow."""

    row: Row
    context: str
    continuations: list[str]  # the choices, the last word, or the whole text
    right: list[int]  # which of them


def read_items(path: str | Path, score: str, *, question: str = "question", answer: str = "answer") -> list[Item]:
    """The rows of a JSONL file for one of SCORES; InputError names the line that cannot be used, and why."""
    asks, read, *_ = SCORES[score]
    column = question if asks else "text"
    rows = read_rows(path, partial(columns, question=column, answer=column))
    return [with_line_number(path, row, read, row, answer) for row in rows]


def read_choices(row: Row, answer: str) -> Item:
    """Columns: question, choices (strings) and answer (the index of the right one, from 0)."""
    choices, right = choices_of(row), require_column(row.fields, answer, int)
    if type(right) is not int or not 0 <= right < len(choices):
        raise InputError(
            f"column {quote(answer)} must be the index of a choice, 0 to {len(choices) - 1}, not {quote(right)}."
        )
    return Item(row, row.question, choices, [right])


def read_labelled(row: Row, answer: str) -> Item:
    """Columns: question, choices (strings) and labels (0 or 1 for each choice)."""
    choices, labels = choices_of(row), require_column(row.fields, "labels", list)
    if len(labels) != len(choices) or not all(label in (0, 1) for label in labels):
        raise InputError(
            f"column 'labels' must hold 0 or 1 for each of the {len(choices)} choices, not {quote(labels)}."
        )
    if len(set(labels)) == 1:
        raise InputError(
            f"column 'labels' must hold both 0 and 1, not {quote(labels)}: there is nothing to tell apart."
        )
    return Item(row, row.question, choices, [index for index, label in enumerate(labels) if label])


def choices_of(row: Row) -> list[str]:
    """The column choices; InputError unless it is at least two texts."""
    choices = require_column(row.fields, "choices", list)
    if len(choices) < 2 or not all(isinstance(text, str) and text for text in choices):
        raise InputError(f"column 'choices' must be two or more strings that are not empty, not {quote(choices)}.")
    return choices


def read_last_word(row: Row, answer: str) -> Item:
    """Column: text, whose last word is what follows its last space. As `lm_eval/tasks/lambada`."""
    context, _, word = row.question.rpartition(" ")
    if not context.strip() or not word:
        raise InputError(f"column 'text' must be a context, a space and a last word, not {quote(row.question)}.")
    return Item(row, context, [word], [0])


def read_text(row: Row, answer: str) -> Item:
    """Column: text."""
    if not row.question:
        raise InputError("column 'text' is empty.")
    return Item(row, "", [row.question], [0])


# --- tokens ----------------------------------------------------------------------------------------


class EncodingOptions(NamedTuple):
    """How texts are put to a model."""

    tokenizer: ModelTokenizer
    format: Format
    use_template: bool  # a context is a question for the template; otherwise it stands as it is, with a space after it
    prefix: int  # the token that a text without context follows
    max_length: int  # how many tokens are seen at once


def prefix_id(folder: Path, tokenizer: ModelTokenizer) -> int:
    """The declared BOS, also of a tokenizer that puts none before a text; else EOS. `HFLM.prefix_token_id`."""
    declared = special_token(folder, "bos_token")
    bos = tokenizer.backend.token_to_id(declared) if declared else None
    return next(token for token in (bos, *tokenizer.bos, tokenizer.eos) if token is not None)


def pair_ids(options: EncodingOptions, context: str, text: str) -> tuple[list[int], list[int]]:
    """Context, space and text tokenised together, and parted after as many tokens as the context has alone.

    White space at the end of a context goes to its continuation, because there the tokens of words have theirs.
    `ConfigurableTask.construct_requests`, `TemplateLM.loglikelihood` and `_encode_pair`.
    """
    kept = context.rstrip()
    continuation = f"{context[len(kept) :]} {text}"
    if not kept:
        tokens = token_ids(options.tokenizer, continuation)
        return ([options.prefix], tokens) if tokens[:1] != [options.prefix] else (tokens[:1], tokens[1:])
    given = text_ids(options.tokenizer, options.format.bos, kept)
    return given, text_ids(options.tokenizer, options.format.bos, kept + continuation)[len(given) :]


def own_ids(options: EncodingOptions, question: str, text: str) -> tuple[list[int], list[int]]:
    """The prompt and the text as its answer, in the tokens of training; without the token that ends it."""
    tokens, given, *_ = encode_row(options.tokenizer, options.format, Row(0, question, text, {}))
    return tokens[:given], tokens[given:-1]


def encode(
    path: str | Path, score: str, options: EncodingOptions, items: Sequence[Item]
) -> tuple[list[list[Example]], int]:
    """The examples of each item, and in how many items a context was too long for the model and lost its beginning."""
    whole = [with_line_number(path, item.row, SCORES[score].encode, options, item) for item in items]
    cut = sum(any(len(example.tokens) > options.max_length + 1 for example in examples) for examples in whole)
    return [[last_tokens(example, options.max_length + 1) for example in examples] for examples in whole], cut


def last_tokens(example: Example, count: int) -> Example:
    """The end of an example. The last token is only predicted, so there may be one more than a model sees."""
    lost = max(0, len(example.tokens) - count)
    return Example(example.tokens[lost:], example.prompt_length - lost, example.line_number)


def encode_pairs(options: EncodingOptions, item: Item) -> list[Example]:
    """Each continuation after the context."""
    return [encode_pair(options, item, text) for text in item.continuations]


def encode_pair(options: EncodingOptions, item: Item, text: str) -> Example:
    """InputError for a continuation without tokens of its own, or too long, or without anything before it."""
    join = own_ids if options.use_template else pair_ids
    given, continuation = join(options, item.context, text)
    if not given:
        raise InputError("a context without tokens predicts nothing: use a template or the BOS token.")
    if not 0 < len(continuation) <= options.max_length:
        raise InputError(
            f"{quote(text)} adds {len(continuation)} tokens to its context, not 1 to {options.max_length}."
        )
    return Example([*given, *continuation], len(given), item.row.number)


def encode_windows(options: EncodingOptions, item: Item) -> list[Example]:
    """A text in windows of `max_length` tokens to predict, the last one with as much context as fits.

    The first window follows the prefix. Where the tokenizer puts BOS before a text, BOS itself is predicted from the
    prefix: so does the harness. `HFLM.loglikelihood_rolling`, `get_rolling_token_windows`, `make_disjoint_window`.
    """
    tokens, windows = [options.prefix, *text_ids(options.tokenizer, options.format.bos, item.continuations[0])], []
    for start in range(1, len(tokens), options.max_length):
        end = min(start + options.max_length, len(tokens))
        window = tokens[max(0, end - options.max_length - 1) : end]
        windows.append(Example(window, len(window) - (end - start), item.row.number))
    return windows


# --- likelihoods -----------------------------------------------------------------------------------


def likelihoods(
    config: Config,
    params: Params,
    items: Sequence[Sequence[Example]],
    adapters: Sequence[Adapter] = (),
    *,
    batch_size: int = 32,
) -> Iterator[tuple[int, list[Likelihood]]]:
    """Yields (index of the item, the likelihoods of its examples) as soon as an item is complete, short ones first."""
    order = sorted(range(len(items)), key=lambda index: max(len(example.tokens) for example in items[index]))
    pairs = [(index, example) for index in order for example in items[index]]
    found: dict[int, list[Likelihood]] = {index: [] for index in order}
    for start in range(0, len(pairs), batch_size):
        indices, examples = zip(*pairs[start : start + batch_size])
        for index, likelihood in zip(indices, row_likelihoods(config, params, examples, adapters)):
            found[index].append(likelihood)
            if len(found[index]) == len(items[index]):
                yield index, found.pop(index)


# --- records and estimates -------------------------------------------------------------------------

Record = dict[str, Any]


def choice_record(item: Item, found: list[Likelihood]) -> Record:
    """Of equal choices the first counts. Characters are Python's, without the space before the choice, not bytes."""
    logprobs = np.array([each.logprob for each in found])
    characters = np.array([len(choice) for choice in item.continuations])
    acc, acc_norm = (int(values.argmax()) in item.right for values in (logprobs, logprobs / characters))
    return {"logprobs": logprobs.tolist(), "acc": acc, "acc_norm": acc_norm}


def share_record(item: Item, found: list[Likelihood]) -> Record:
    """`lm_eval/tasks/truthfulqa/utils.py`, `process_results_mc2`; shifted, so that long choices do not underflow."""
    logprobs = np.array([each.logprob for each in found])
    shares = np.exp(logprobs - logprobs.max())
    return {"logprobs": logprobs.tolist(), "mc2": float(shares[item.right].sum() / shares.sum())}


def word_record(item: Item, found: list[Likelihood]) -> Record:
    return {"logprob": found[0].logprob, "acc": found[0].greedy}


def text_record(item: Item, found: list[Likelihood]) -> Record:
    """Words are what is left between stretches of white space, empty ends included. `count_words`, `count_bytes`."""
    text = item.continuations[0]
    counts = {"words": len(re.split(r"\s+", text)), "bytes": len(text.encode("utf-8"))}
    return {"logprob": sum(each.logprob for each in found)} | counts


def choice_estimates(records: Sequence[Record]) -> dict[str, Estimate]:
    return {name: accuracy([record[name] for record in records]) for name in ("acc", "acc_norm")}


def share_estimates(records: Sequence[Record]) -> dict[str, Estimate]:
    return {"mc2": accuracy([record["mc2"] for record in records])}


def word_estimates(records: Sequence[Record]) -> dict[str, Estimate]:
    perplexity = exponential(per(records, [1] * len(records)))
    return {"acc": accuracy([record["acc"] for record in records]), "perplexity": perplexity}


def text_estimates(records: Sequence[Record]) -> dict[str, Estimate]:
    """Per word and per byte of all texts together; n counts words or bytes, the errors are over texts."""
    words, bytes = (per(records, [record[unit] for record in records]) for unit in ("words", "bytes"))
    bits = Estimate(bytes.mean / math.log(2), bytes.error / math.log(2), bytes.n)
    return {"word_perplexity": exponential(words), "byte_perplexity": exponential(bytes), "bits_per_byte": bits}


def per(records: Sequence[Record], counts: Sequence[int]) -> Estimate:
    """-Σ log P / Σ counts."""
    return ratio([-record["logprob"] for record in records], counts)


def exponential(value: Estimate) -> Estimate:
    """exp of a mean, its error to first order (the harness draws bootstrap samples instead). It may be infinite."""
    with np.errstate(over="ignore"):
        power = float(np.exp(value.mean))
    return Estimate(power, power * value.error, value.n)


class Score(NamedTuple):
    """What is particular to one way of scoring."""

    asks: bool  # there is a question, which can be put in a template; otherwise plain text is continued
    read: Callable[[Row, str], Item]
    encode: Callable[[EncodingOptions, Item], list[Example]]
    record: Callable[[Item, list[Likelihood]], Record]
    estimates: Callable[[Sequence[Record]], dict[str, Estimate]]


SCORES = {
    "choices": Score(True, read_choices, encode_pairs, choice_record, choice_estimates),
    "mc2": Score(True, read_labelled, encode_pairs, share_record, share_estimates),
    "last-word": Score(False, read_last_word, encode_pairs, word_record, word_estimates),
    "perplexity": Score(False, read_text, encode_windows, text_record, text_estimates),
}

"""Data: JSONL rows -> templates -> tokens and labels -> batches.

A prompt and its answer are tokenised apart and joined, so the boundary between what is given and what is learned is
exact, and generation later starts from the very same prompt tokens. An example is

    [BOS] prompt answer EOS          labels: -100 over BOS and prompt; answer and EOS carry loss

BOS stands where the tokenizer's own post-processor puts it (Llama, Mistral; not Qwen3), once. EOS ends the answer and
nothing follows it; the published template also trained on two newlines behind EOS. Read next: `generate.py`.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from lfu import InputError
from lfu.checkpoint import read_json
from lfu.loss import IGNORED


class Batch(NamedTuple):
    tokens: Tensor  # [B,T] int64, right-padded
    labels: Tensor  # [B,T] int64, -100 where no loss


class Row(NamedTuple):
    """One line of a JSONL file."""

    number: int  # from 1, as editors count
    question: str
    answer: str
    fields: dict  # the whole line


class Example(NamedTuple):
    """One tokenised row."""

    tokens: list[int]
    prompt: int  # how many of the tokens are given
    row: int  # the line it came from

    @property
    def supervised(self) -> int:
        """How many tokens carry loss. The first token of a row is never predicted."""
        return len(self.tokens) - max(self.prompt, 1)


# --- rows -----------------------------------------------------------------------------------------


def read_rows(path: str | Path, *, question: str = "question", answer: str = "answer") -> list[Row]:
    """The rows of a JSONL file with these two columns; GSM8K's published files have the default names.

    InputError names the line of whatever is not a JSON object, lacks a column, or holds a non-string there.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"The data file {path} does not exist, or is not a file.")
    rows = [read_row(path, number, line, question, answer) for number, line in numbered_lines(path)]
    if not rows:
        raise InputError(f"{path} holds no rows.")
    return rows


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, with their numbers."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield from ((number, line) for number, line in enumerate(file, 1) if line.strip())
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error}.") from error


def read_row(path: Path, number: int, line: str, question: str, answer: str) -> Row:
    """One line as a Row, or InputError with its number."""
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise InputError(f"{path}, line {number}: not valid JSON ({error}).") from error
    if not isinstance(fields, dict):
        raise InputError(f"{path}, line {number}: a row must be a JSON object, not {type(fields).__name__}.")
    for column in (question, answer):
        if column not in fields:
            raise InputError(f"{path}, line {number}: no column {column!r}; the row has {', '.join(fields) or 'none'}.")
        if not isinstance(fields[column], str):
            raise InputError(f"{path}, line {number}: column {column!r} must be a string, not {fields[column]!r}.")
    return Row(number, fields[question], fields[answer], fields)


# --- templates ------------------------------------------------------------------------------------


class Template(NamedTuple):
    """How a question becomes a prompt. The pieces are tokenised one by one."""

    pieces: tuple[str, ...]
    before_answer: str = ""
    stops: tuple[str, ...] = ()  # where a model that goes on to invent the next question is cut off


TEMPLATES = {
    # LLaMA-Factory `data/template.py`, "alpaca": the published runs.
    "alpaca": Template(
        (
            "Below is an instruction that describes a task. "
            "Write a response that appropriately completes the request.\n\n",
            "### Instruction:\n{question}\n\n### Response:\n",
        ),
        stops=("### Instruction:",),
    ),
    # lm-evaluation-harness `tasks/gsm8k/gsm8k.yaml`, zero-shot.
    "question": Template(("Question: {question}\nAnswer:",), before_answer=" ", stops=("Question:",)),
    "plain": Template(("{question}",)),
}


class Format(NamedTuple):
    """What an adapter was trained on and must be prompted with; stored beside it."""

    template: str = "alpaca"
    bos: bool = True


def require_template(name: str) -> Template:
    """The template of this name; InputError if there is none."""
    if name not in TEMPLATES:
        raise InputError(f"There is no template {name!r}; there are {', '.join(TEMPLATES)}.")
    return TEMPLATES[name]


# --- tokens ---------------------------------------------------------------------------------------


class Codec(NamedTuple):
    """A tokenizer and the special tokens of its model."""

    tokenizer: Tokenizer
    bos: tuple[int, ...]  # what the tokenizer puts before a text: one id, or none
    eos: int
    stops: frozenset[int]  # every id that ends an answer


def load_codec(folder: Path, vocab_size: int) -> Codec:
    """tokenizer.json and the special tokens of a model folder.

    EOS is the `eos_token` of tokenizer_config.json, else the first `eos_token_id` of generation_config.json or
    config.json; all of these ids end an answer. InputError if an id lies outside the model's vocabulary.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise InputError(f"{path} does not exist: lfu reads the tokenizer from this file alone.")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises a bare Exception
        raise InputError(f"{path} is not a tokenizer of the `tokenizers` library: {error}.") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if largest >= vocab_size:
        raise InputError(f"{path} has token ids up to {largest}, but the model's vocabulary holds {vocab_size}.")
    stops = eos_ids(folder, tokenizer)
    if not stops or not all(0 <= stop < vocab_size for stop in stops):
        raise InputError(f"{folder}: no usable EOS token among {stops}; set eos_token in tokenizer_config.json.")
    return Codec(tokenizer, bos_ids(tokenizer), stops[0], frozenset(stops))


def bos_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """What the post-processor puts before a text."""
    bare, full = (tokenizer.encode("a", add_special_tokens=special).ids for special in (False, True))
    return tuple(full[: full.index(bare[0])])


def eos_ids(folder: Path, tokenizer: Tokenizer) -> list[int]:
    """All EOS ids the folder declares, the one that ends training answers first."""
    found: list[int | None] = []
    if (folder / "tokenizer_config.json").is_file():
        token = read_json(folder / "tokenizer_config.json").get("eos_token")
        text = token["content"] if isinstance(token, dict) else token
        if text and tokenizer.token_to_id(text) is None:
            raise InputError(f"{folder / 'tokenizer_config.json'}: eos_token {text!r} is not in tokenizer.json.")
        found.append(tokenizer.token_to_id(text) if text else None)
    for name in ("generation_config.json", "config.json"):
        declared = read_json(folder / name).get("eos_token_id") if (folder / name).is_file() else None
        found += declared if isinstance(declared, list) else [declared]
    return list(dict.fromkeys(token for token in found if token is not None))


def token_ids(codec: Codec, text: str) -> list[int]:
    """The tokens of a piece of text, without special tokens around it."""
    return codec.tokenizer.encode(text, add_special_tokens=False).ids


def prompt_ids(codec: Codec, format: Format, question: str) -> list[int]:
    """[BOS] and the prompt. Training, evaluation and generation all start from these tokens."""
    template = require_template(format.template)
    pieces = [token_ids(codec, piece.replace("{question}", question)) for piece in template.pieces]
    return [*(codec.bos if format.bos else ()), *(token for piece in pieces for token in piece)]


def encode_row(codec: Codec, format: Format, row: Row) -> Example:
    """[BOS] prompt answer EOS."""
    prompt = prompt_ids(codec, format, row.question)
    answer = token_ids(codec, require_template(format.template).before_answer + row.answer)
    return Example([*prompt, *answer, codec.eos], len(prompt), row.number)


def encode_rows(
    path: str | Path, rows: Sequence[Row], codec: Codec, format: Format, *, max_length: int = 2048, drop: bool = False
) -> tuple[list[Example], list[str]]:
    """The examples, and a sentence for each row left out.

    A row that is empty, too long or has no supervised token raises InputError naming it; with `drop` it is left out
    instead. Nothing is ever cut: a prompt without its end, or an answer without EOS, teaches the wrong thing.
    """
    examples, dropped = [], []
    for row in rows:
        example = encode_row(codec, format, row)
        fault = fault_of(row, example, codec, format, max_length)
        if fault and not drop:
            raise InputError(f"{path}, line {row.number}: {fault}. Mend the row, or leave such rows out with --drop.")
        if fault:
            dropped.append(f"line {row.number}: {fault}")
        else:
            examples.append(example)
    if not examples:
        raise InputError(f"{path}: no usable rows{f'; {dropped[0]}' if dropped else ''}.")
    return examples, dropped


def fault_of(row: Row, example: Example, codec: Codec, format: Format, max_length: int) -> str | None:
    """Why a row cannot be trained on, or None."""
    text = example.tokens[len(codec.bos) if format.bos else 0 : -1]
    special = [token for token in text if token in codec.bos or token in codec.stops]
    if not row.question.strip() or not row.answer.strip():
        return "the question or the answer is empty"
    if len(example.tokens) > max_length:
        return f"{len(example.tokens)} tokens are more than the maximum of {max_length}"
    if example.supervised < 1:
        return "no token carries loss"
    if special:
        return f"the text itself contains the special token {codec.tokenizer.id_to_token(special[0])}"
    return None


# --- batches --------------------------------------------------------------------------------------


def shuffled(count: int, seed: int, epoch: int) -> list[int]:
    """The order of the rows in one epoch."""
    return np.random.default_rng([seed, epoch]).permutation(count).tolist()


def split_by_length(examples: Sequence[Example], size: int) -> list[list[Example]]:
    """The examples of one optimizer step in micro-batches of similar length, so that little is padding."""
    ordered = sorted(examples, key=lambda example: len(example.tokens))
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


def collate(examples: Sequence[Example], device: str | torch.device = "cpu") -> Batch:
    """Right-padded tokens, and labels that are -100 over the prompt and the padding."""
    tokens = pad([example.tokens for example in examples])
    labels = pad([[IGNORED] * example.prompt + example.tokens[example.prompt :] for example in examples], IGNORED)
    return Batch(tokens.to(device), labels.to(device))


def pad(rows: Sequence[Sequence[int]], filler: int = 0) -> Tensor:  # -> [B,T] int64
    """Rows of unequal length as one tensor. What is padding is told by its place, so any token may fill it."""
    padded = torch.full((len(rows), max(map(len, rows))), filler)
    for row, values in enumerate(rows):
        padded[row, : len(values)] = torch.tensor(values)
    return padded

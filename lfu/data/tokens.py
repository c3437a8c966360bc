"""Templates and tokens: a row becomes a prompt, an answer, and the labels of both.

A prompt and its answer are tokenised apart and joined, so the boundary between what is given and what is learned is
exact, and generation later starts from the very same prompt tokens. An example is

    [BOS] prompt answer EOS          labels: -100 over BOS and prompt; answer and EOS carry loss

With `loss_on="instruction+answer"` the question inside the prompt carries loss too, and the template around it does not
(Instruction Modelling). BOS stands where the tokenizer's own post-processor puts it (Llama, Mistral; not Qwen3), once.
EOS ends the answer and nothing follows it; the published template also trained on two newlines after EOS. A tokenizer
that puts a space before every text (Llama 2's) puts one before prompt and answer alike. Read next: `batches.py`.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer

from lfu.data.batches import Example
from lfu.data.rows import Row
from lfu.errors import InputError
from lfu.io.files import read_json


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


LOSS_ON = ("answer", "instruction+answer")


QUESTION = re.compile(r"( ?\{question\})")
"""Where Instruction Modelling cuts a piece. A space before the question is its own, as that before the answer is."""


class Format(NamedTuple):
    """What an adapter was trained on and must be prompted with; stored beside it.

    `loss_on` decides labels, and tokens too: where the question carries loss it is tokenised apart from the template,
    so that the border is exact, and evaluation and generation must ask with these tokens.
    """

    template: str = "alpaca"
    bos: bool = True
    loss_on: str = "answer"


def require_template(name: str) -> Template:
    """The template of this name; InputError if there is none."""
    if name not in TEMPLATES:
        raise InputError(f"There is no template {name!r}; there are {', '.join(TEMPLATES)}.")
    return TEMPLATES[name]


class ModelTokenizer(NamedTuple):
    """A tokenizer and the special tokens of its model."""

    backend: Tokenizer  # of the `tokenizers` library
    bos: tuple[int, ...]  # what the tokenizer puts before a text: one id, or none
    eos: int
    stops: frozenset[int]  # every id that ends an answer


def load_tokenizer(folder: Path, vocab_size: int) -> ModelTokenizer:
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
    return ModelTokenizer(tokenizer, bos_ids(tokenizer), stops[0], frozenset(stops))


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


def token_ids(tokenizer: ModelTokenizer, text: str) -> list[int]:
    """The tokens of a piece of text, without special tokens around it."""
    return tokenizer.backend.encode(text, add_special_tokens=False).ids


def prompt_ids(tokenizer: ModelTokenizer, format: Format, question: str) -> list[int]:
    """[BOS] and the prompt. Training, evaluation and generation all start from these tokens."""
    return encode_prompt(tokenizer, format, question)[0]


def encode_prompt(tokenizer: ModelTokenizer, format: Format, question: str) -> tuple[list[int], range]:
    """[BOS] and the prompt, and where in it the instruction carries loss.

    An empty question has nothing to cut out or to learn: its prompt is that of `loss_on="answer"`.
    """
    pieces, apart = require_template(format.template).pieces, trains_on_question(format) and question != ""
    tokens, instruction = [*(tokenizer.bos if format.bos else ())], range(0)
    for part in (part for piece in pieces for part in (QUESTION.split(piece) if apart else [piece])):
        start = len(tokens)
        tokens += token_ids(tokenizer, part.replace("{question}", question))
        if apart and "{question}" in part:
            instruction = range(start, len(tokens))
    return tokens, instruction


def trains_on_question(format: Format) -> bool:
    """Whether the instruction carries loss; InputError if there is no such choice."""
    if format.loss_on not in LOSS_ON:
        raise InputError(f"Loss cannot be on {format.loss_on!r}, only on {' or '.join(LOSS_ON)}.")
    return format.loss_on != "answer"


def encode_row(tokenizer: ModelTokenizer, format: Format, row: Row) -> Example:
    """[BOS] prompt answer EOS."""
    prompt, instruction = encode_prompt(tokenizer, format, row.question)
    answer = token_ids(tokenizer, require_template(format.template).before_answer + row.answer)
    return Example([*prompt, *answer, tokenizer.eos], len(prompt), row.number, instruction)


def encode_rows(
    path: str | Path,
    rows: Sequence[Row],
    tokenizer: ModelTokenizer,
    format: Format,
    *,
    max_length: int = 2048,
    drop: bool = False,
) -> tuple[list[Example], list[str]]:
    """The examples, and a sentence for each row left out.

    A row that is empty, too long, has no supervised token or contains a special token as text raises InputError naming
    it; with `drop` it is left out instead. Nothing is ever cut: a prompt without its end, or an answer without EOS,
    teaches the wrong thing.
    """
    examples, dropped = [], []
    for row in rows:
        example = encode_row(tokenizer, format, row)
        fault = rejection_reason(row, example, tokenizer, format, max_length)
        if fault and not drop:
            raise InputError(f"{path}, line {row.number}: {fault}. Fix the row, or leave such rows out with --drop.")
        if fault:
            dropped.append(f"line {row.number}: {fault}")
        else:
            examples.append(example)
    if not examples:
        raise InputError(f"{path}: no usable rows{f'; {dropped[0]}' if dropped else ''}.")
    return examples, dropped


def rejection_reason(
    row: Row, example: Example, tokenizer: ModelTokenizer, format: Format, max_length: int
) -> str | None:
    """Why a row cannot be trained on, or None."""
    text = example.tokens[len(tokenizer.bos) if format.bos else 0 : -1]
    special = [token for token in text if token in tokenizer.bos or token in tokenizer.stops]
    if not row.question.strip() or not row.answer.strip():
        return "the question or the answer is empty"
    if len(example.tokens) > max_length:
        return f"{len(example.tokens)} tokens are more than the maximum of {max_length}"
    if example.num_loss_tokens < 1:
        return "no token carries loss"
    if special:
        return f"the text itself contains the special token {tokenizer.backend.id_to_token(special[0])}"
    return None

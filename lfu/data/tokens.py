"""Templates and tokens: a row becomes a prompt, an answer, and the labels of both.

A prompt and its answer are tokenised apart and joined, so the boundary between what is given and what is learned is
exact, and generation later starts from the very same prompt tokens. An example is

    [BOS] prompt answer EOS          labels: -100 over BOS and prompt; answer and EOS carry loss

With `loss_on="instruction+answer"` the question inside the prompt carries loss too, and the template around it does not
(Instruction Modelling). EOS ends the answer and nothing follows it; the published template also trained on two newlines
after EOS. Everything else is as in the natural text, in training, generation and every score alike:

- BOS stands where the tokenizer puts it before a text (Llama, Mistral; not Qwen), and once: a text that begins with
  BOS gets no second one. The post-processor of tokenizer.json and the add_bos_token of tokenizer_config.json, which
  other programs obey, must say the same, or `--bos` or `--no-bos` chooses.
- A tokenizer that puts a space before every text (Llama 2's) puts one before the whole, and none between its pieces.

The template `chat` is the model's own (`chat.py`). Its text is tokenised as one, special tokens and BOS where it has
them, as transformers' `apply_chat_template` does; what it writes after the last answer's end is left out.

Read next: `batches.py`.
"""

import json
import math
import re
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from lfu.data.batches import Example
from lfu.data.chat import CHAT, Chat, Encode, ask, conversation, find_turns, read_chat
from lfu.data.rows import Message, Row
from lfu.data.special import bos_ids, choose_bos, eos_ids
from lfu.errors import InputError, quote
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


TEMPLATE_NAMES = (*TEMPLATES, CHAT)

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
    system: str | None = None  # what stands before the question in the template chat


def require_template(name: str) -> Template:
    """The template of this name; InputError if there is none."""
    if name not in TEMPLATES:
        raise InputError(f"There is no template {name!r}; there are {', '.join(TEMPLATE_NAMES)}.")
    return TEMPLATES[name]


def stop_strings(format: Format) -> tuple[str, ...]:
    """The strings that end an answer in this format; in a chat a token does."""
    return () if format.template == CHAT else require_template(format.template).stops


class ModelTokenizer(NamedTuple):
    """A tokenizer and the special tokens of its model."""

    backend: Tokenizer  # of the `tokenizers` library
    inner: Tokenizer  # the same for a text that follows another: without a space of its own before it
    bos: tuple[int, ...]  # what comes before a text: one id, or none
    eos: int
    stops: frozenset[int]  # every id that ends an answer
    vocab_size: int  # the model's
    path: Path  # where it was read from
    chat: Chat | None = None  # the model's own template, where it is used


# --- the tokenizer of a folder --------------------------------------------------------------------


def load_tokenizer(
    folder: str | Path, vocab_size: int, bos: bool | None = None, template: str = Format().template
) -> ModelTokenizer:
    """tokenizer.json and the special tokens of a model folder.

    EOS is the `eos_token` of tokenizer_config.json, else the first `eos_token_id` of generation_config.json or
    config.json; all of these ids end an answer, and in the template chat the token that ends a turn too. BOS is that of
    `choose_bos`. InputError if one of them lies outside the model's vocabulary, or for a tokenizer that cannot be used.
    """
    folder = Path(folder)
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise InputError(f"{path} does not exist: lfu reads the tokenizer from this file alone.")
    spec = read_json(path)
    with library_errors(f"{path} is not a tokenizer of the `tokenizers` library"):
        backend = parse_tokenizer(spec)
        unspaced = {name: without_own_space(spec.get(name)) for name in ("normalizer", "pre_tokenizer")}
        inner = backend if unspaced.items() <= spec.items() else parse_tokenizer(spec | unspaced)
    if any(growth(spec.get(name)) > MOST_GROWTH for name in ("normalizer", "pre_tokenizer", "decoder")):
        raise InputError(f"{path}: its replacements can make a text more than {MOST_GROWTH} times as long.")
    stops = eos_ids(folder, backend)
    if not stops or not all(type(stop) is int and 0 <= stop < vocab_size for stop in stops):
        raise InputError(f"{folder}: no usable EOS token among {quote(stops)}; set eos_token in tokenizer_config.json.")
    with library_errors(f"{path} cannot tokenise a text"):
        start = bos_ids(backend)
    start = choose_bos(folder, backend, start, bos)
    if len(start) > 1 or not all(token < vocab_size for token in start):
        raise InputError(f"{path} puts the tokens {quote(start)} before a text, which are not one BOS of the model.")
    found = ModelTokenizer(backend, inner, start, stops[0], frozenset(stops), vocab_size, path)
    return with_chat(found, read_chat(folder, backend)) if template == CHAT else found


def with_chat(tokenizer: ModelTokenizer, chat: Chat) -> ModelTokenizer:
    """The tokenizer with this chat template, and with the token that ends a turn among its stops."""
    tokens, _ = find_turns(chat, partial(token_ids, tokenizer), conversation(None, (), "a", "b"))
    return tokenizer._replace(chat=chat, stops=tokenizer.stops | {tokens[-1]})


@contextmanager
def library_errors(what: str) -> Iterator[None]:
    """Whatever the `tokenizers` library raises, which may be a panic and so no Exception, as one InputError."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise InputError(f"{what}: {quote(str(error))}.") from error


def parse_tokenizer(spec: dict[str, Any]) -> Tokenizer:
    """A tokenizer from what its file says, without the truncation and padding that the file may ask for."""
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def without_own_space(step: Any, first: bool = True) -> Any:
    """A normalizer or pre-tokenizer of tokenizer.json that puts no space before a text.

    A pre-tokenizer that comes after others puts one before each of their parts: this is the tokenizer's own matter.
    """
    match step:
        case {"type": "Sequence", "normalizers": list(steps)}:
            return step | {"normalizers": [without_own_space(each) for each in steps]}
        case {"type": "Sequence", "pretokenizers": list(steps)}:
            return step | {"pretokenizers": [without_own_space(each, not place) for place, each in enumerate(steps)]}
        case {"type": "Prepend"}:
            return {"type": "Sequence", "normalizers": []}
        case {"type": "Metaspace"} if first or step.get("prepend_scheme") == "first":
            return {name: value for name, value in step.items() if name != "add_prefix_space"} | {
                "prepend_scheme": "never"
            }
        case {"type": "ByteLevel", "add_prefix_space": True} if first:
            return step | {"add_prefix_space": False}
    return step


MOST_GROWTH = 100
"""Sentencepiece's replacements are one character for one; a chain of longer ones would fill the memory."""


def growth(step: Any) -> int:
    """How many times as long the replacements of a part of tokenizer.json may make a text."""
    match step:
        case {"type": "Replace", "content": str(content)}:
            return max(1, len(content))
        case {"type": "ByteLevel"}:
            return 2  # each byte becomes a character, of one or two bytes
        case dict():
            return math.prod(map(growth, step.values()))
        case list():
            return math.prod(map(growth, step))
    return 1


def longest_context(folder: Path) -> int | None:
    """How many tokens the model was made for, if config.json says it; InputError if it says so oddly."""
    positions = read_json(folder / "config.json").get("max_position_embeddings")
    if positions is not None and (type(positions) is not int or positions < 1):
        raise InputError(f"{folder / 'config.json'}: max_position_embeddings cannot be {quote(positions)}.")
    return positions


def describe_tokens(tokenizer: ModelTokenizer) -> dict[str, Any]:
    """The ids that decide what a row becomes and where an answer ends, recorded with a run and with its adapter."""
    ids = {"bos": list(tokenizer.bos), "eos": tokenizer.eos, "stops": sorted(tokenizer.stops)}
    return ids if tokenizer.chat is None else ids | {"chat_template": tokenizer.chat.sha256}


# --- text -> tokens -------------------------------------------------------------------------------


def token_ids(tokenizer: ModelTokenizer, text: str) -> list[int]:
    """The tokens of a text, without special tokens around it."""
    return encode_text(tokenizer.backend, text, tokenizer)


def continued_ids(tokenizer: ModelTokenizer, text: str) -> list[int]:
    """The tokens of a text that follows another one."""
    return encode_text(tokenizer.inner, text, tokenizer)


def encode_text(backend: Tokenizer, text: str, tokenizer: ModelTokenizer) -> list[int]:
    """InputError where the tokenizer fails, or finds a token for which the model has no embedding."""
    with library_errors(f"{tokenizer.path} fails at the text {quote(text)}"):
        tokens = backend.encode(text, add_special_tokens=False).ids
    if tokens and max(tokens) >= (size := tokenizer.vocab_size):
        raise InputError(f"the text has the token id {max(tokens)}, but the model's vocabulary holds {size}.")
    return tokens


def text_ids(tokenizer: ModelTokenizer, bos: bool, text: str) -> list[int]:
    """[BOS] and the text; one that begins with BOS gets no second. `HFLM.tok_encode` of lm-evaluation-harness."""
    start, tokens = list(tokenizer.bos if bos else ()), token_ids(tokenizer, text)
    return tokens if tokens[: len(start)] == start else start + tokens


def piece_ids(tokenizer: ModelTokenizer, bos: bool, pieces: Sequence[str]) -> list[list[int]]:
    """[BOS] and pieces of one text, each tokenised apart."""
    first, *others = pieces
    return [text_ids(tokenizer, bos, first), *(continued_ids(tokenizer, piece) for piece in others)]


def prompt_ids(tokenizer: ModelTokenizer, format: Format, question: str, history: Sequence[Message] = ()) -> list[int]:
    """[BOS] and the prompt. Training, evaluation and generation all start from these tokens."""
    if format.template == CHAT:
        return ask(*chat_parts(tokenizer, format), conversation(format.system, history, question))
    refuse_history(history)
    return encode_prompt(tokenizer, format, question)[0]


def refuse_history(history: Sequence[Message]) -> None:
    """InputError for turns that the templates of one question have no place for."""
    if history:
        raise InputError("a row of several turns, or with a system turn, needs --template chat.")


def chat_parts(tokenizer: ModelTokenizer, format: Format) -> tuple[Chat, Encode]:
    """The chat template and the tokenizer; InputError if they were not loaded together, or for loss on the question."""
    if tokenizer.chat is None or trains_on_question(format):
        raise InputError("The template chat needs a tokenizer that was loaded with it, and loss on the answer only.")
    return tokenizer.chat, partial(token_ids, tokenizer)


def encode_chat(tokenizer: ModelTokenizer, format: Format, row: Row) -> Example:
    """A conversation up to the end of its last turn; the earlier answers carry loss too."""
    messages = conversation(format.system, row.history, row.question, row.answer)
    tokens, turns = find_turns(*chat_parts(tokenizer, format), messages)
    earlier = [place for turn in turns[:-1] for place in turn]
    return Example(tokens, turns[-1].start, row.number, earlier)


def encode_prompt(tokenizer: ModelTokenizer, format: Format, question: str) -> tuple[list[int], range]:
    """[BOS] and the prompt, and where in it the instruction carries loss.

    An empty question has nothing to cut out or to learn: its prompt is that of `loss_on="answer"`.
    """
    pieces, apart = require_template(format.template).pieces, trains_on_question(format) and question != ""
    parts = [part for piece in pieces for part in (QUESTION.split(piece) if apart else [piece]) if part]
    texts = [part.replace("{question}", question) for part in parts]
    tokens: list[int] = []
    instruction = range(0)
    for part, ids in zip(parts, piece_ids(tokenizer, format.bos, texts)):
        start = len(tokens) or len(tokenizer.bos if format.bos else ())
        tokens += ids
        if apart and "{question}" in part:
            instruction = range(start, len(tokens))
    return tokens, instruction


def answer_ids(tokenizer: ModelTokenizer, format: Format, answer: str) -> list[int]:
    """The tokens of an answer after the prompt of this format, without the EOS after it."""
    return continued_ids(tokenizer, require_template(format.template).before_answer + answer)


def trains_on_question(format: Format) -> bool:
    """Whether the instruction carries loss; InputError if there is no such choice."""
    if format.loss_on not in LOSS_ON:
        raise InputError(f"Loss cannot be on {format.loss_on!r}, only on {' or '.join(LOSS_ON)}.")
    return format.loss_on != "answer"


def encode_row(tokenizer: ModelTokenizer, format: Format, row: Row) -> Example:
    """[BOS] prompt answer EOS; in a chat, what the template makes of them."""
    if format.template == CHAT:
        return encode_chat(tokenizer, format, row)
    refuse_history(row.history)
    prompt, instruction = encode_prompt(tokenizer, format, row.question)
    answer = answer_ids(tokenizer, format, row.answer)
    return Example([*prompt, *answer, tokenizer.eos], len(prompt), row.number, instruction)


def encode_rows(
    path: str | Path,
    rows: Sequence[Row],
    tokenizer: ModelTokenizer,
    format: Format,
    *,
    max_length: int = 2048,
    positions: int | None = None,
    drop: bool = False,
) -> tuple[list[Example], list[str]]:
    """The examples, and a sentence for each row left out.

    A row that is empty, longer than `max_length` or than the model's `positions`, has no supervised token or contains a
    special token as text raises InputError naming it; with `drop` it is left out instead. Nothing is ever cut: a prompt
    without its end, or an answer without EOS, teaches the wrong thing.
    """
    examples, dropped = [], []
    for row in rows:
        try:
            example = encode_row(tokenizer, format, row)
            fault = rejection_reason(row, example, tokenizer, format, max_length, positions)
        except InputError as error:
            fault = str(error).removesuffix(".")
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
    row: Row,
    example: Example,
    tokenizer: ModelTokenizer,
    format: Format,
    max_length: int,
    positions: int | None = None,
) -> str | None:
    """Why a row cannot be trained on, or None. A prompt in the template plain is the user's own, special tokens too."""
    given = example.prompt_length if format.template == "plain" else len(tokenizer.bos) if format.bos else 0
    text = example.tokens[given:-1] if format.template != CHAT else []  # `require_plain` has looked at a chat's turns
    special = [token for token in text if token in tokenizer.bos or token in tokenizer.stops]
    if not all(map(is_visible, [row.question, row.answer, *(turn["content"] for turn in row.history)])):
        return "the question or the answer is empty"
    if len(example.tokens) > max_length:
        return f"{len(example.tokens)} tokens are more than the maximum of {max_length}"
    if positions is not None and len(example.tokens) > positions:
        return f"{len(example.tokens)} tokens are more than the model's max_position_embeddings, {positions}"
    if example.num_loss_tokens < 1:
        return "no token carries loss"
    if special:
        return f"the text itself contains the special token {tokenizer.backend.id_to_token(special[0])}"
    return None


def is_visible(text: str) -> bool:
    """Whether a text has a character that is more than white space, a control character or a zero-width one."""
    return any(unicodedata.category(character) not in ("Cc", "Cf", "Zs", "Zl", "Zp") for character in text)

"""A model's own chat template: a conversation becomes one text, and the assistant's turns in its tokens carry loss.

A turn is what stands between the text with which the template asks for it (`add_generation_prompt`) and the special
token that ends it, which is included. Both are found by rendering the conversation up to each turn, as a model will be
asked: so a template must only ever add to what it wrote before. Rendering is that of transformers
(`utils/chat_template_utils.py`). A template that writes today's date (`strftime_now`) gives other tokens every day.
Read next: `tokens.py`.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from lfu.data.rows import Message
from lfu.data.special import special_token, tokenizer_config
from lfu.errors import InputError, quote
from lfu.io.files import named

CHAT = "chat"
"""The name of this template."""

Encode = Callable[[str], list[int]]


class Chat(NamedTuple):
    """A chat template, and the special tokens of its tokenizer."""

    template: Template
    sha256: str  # of its text
    variables: dict[str, str]  # the special tokens by the names that the template calls them
    special: dict[int, str]  # all special tokens of the tokenizer
    path: Path  # where it was read from


# --- the template of a folder ---------------------------------------------------------------------


def template_file(folder: Path) -> Path | None:
    """Where a model has its chat template, if it has one; a file of its own comes first."""
    if (folder / "chat_template.jinja").is_file():
        return folder / "chat_template.jinja"
    return folder / "tokenizer_config.json" if tokenizer_config(folder).get("chat_template") else None


def template_text(folder: Path) -> tuple[Path, str]:
    """The chat template and its file; of several, the one named default. InputError if there is none."""
    path = template_file(folder)
    if path is None:
        raise InputError(f"{folder} has no chat template, neither in tokenizer_config.json nor in chat_template.jinja.")
    if path.suffix == ".jinja":
        with named(path):
            return path, path.read_text(encoding="utf-8")
    found = tokenizer_config(folder)["chat_template"]
    if isinstance(found, list):
        texts = [each.get("template") for each in found if isinstance(each, dict) and each.get("name") == "default"]
        found = texts[0] if texts else None
    if not isinstance(found, str):
        raise InputError(f"{path}: chat_template must be a text, or a list with one that is named default.")
    return path, found


VARIABLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def read_chat(folder: Path, backend: Tokenizer) -> Chat:
    """The chat template of a model folder; InputError if there is none, or if it is not jinja."""
    path, text = template_text(folder)
    try:
        template = environment().from_string(text)
    except TemplateError as error:
        raise InputError(f"{path}: the chat template cannot be read: {quote(str(error))}.") from error
    variables = {name: token for name in VARIABLES if (token := special_token(folder, name)) is not None}
    special = {token: each.content for token, each in backend.get_added_tokens_decoder().items() if each.special}
    return Chat(template, hashlib.sha256(text.encode()).hexdigest(), variables, special, path)


def environment() -> ImmutableSandboxedEnvironment:
    """What a chat template may use."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, "jinja2.ext.loopcontrols"]
    )
    made.filters["tojson"] = to_json
    made.globals |= {"raise_exception": raise_exception, "strftime_now": lambda form: datetime.now().strftime(form)}
    return made


class GenerationBlock(Extension):
    """{% generation %} ... {% endgeneration %}, by which some templates mark the assistant's turns: only its inside."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


def to_json(value: Any, ensure_ascii: bool = False, **how: Any) -> str:
    """JSON in which nothing is escaped for HTML, as jinja's own filter would."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **how)


def raise_exception(message: str) -> None:
    """How a template refuses a conversation."""
    raise TemplateError(message)


# --- conversations --------------------------------------------------------------------------------


def conversation(system: str | None, history: Sequence[Message], question: str, *answer: str) -> list[Message]:
    """The messages of a row. InputError where a system turn is asked for and the row has one."""
    if system is not None and any(message["role"] == "system" for message in history):
        raise InputError("the row has a system turn of its own: leave out --system.")
    start = [] if system is None else [{"role": "system", "content": system}]
    answers = [{"role": "assistant", "content": text} for text in answer]
    return [*start, *history, {"role": "user", "content": question}, *answers]


def render(chat: Chat, messages: Sequence[Message], prompt: bool = False) -> str:
    """The text of a conversation, with `prompt` up to where an answer begins.

    InputError where the template fails, or leaves out the system turn.
    """
    given = {"messages": [dict(message) for message in messages], "tools": None, "documents": None}
    try:
        text = chat.template.render(**chat.variables, **given, add_generation_prompt=prompt)
    except Exception as error:  # a template is a program
        raise InputError(f"the chat template of {chat.path} refuses it: {quote(str(error))}.") from error
    if any(turn["role"] == "system" and turn["content"].strip() not in text for turn in messages):
        raise InputError(f"the chat template of {chat.path} leaves out the system turn.")
    return text


def require_plain(chat: Chat, encode: Encode, messages: Sequence[Message]) -> None:
    """InputError for a message that contains a special token as text, which would be taken for the template's own."""
    for message in messages:
        if found := [chat.special[token] for token in encode(message["content"]) if token in chat.special]:
            raise InputError(f"the text itself contains the special token {found[0]}.")


def ask(chat: Chat, encode: Encode, messages: Sequence[Message]) -> list[int]:
    """The tokens of a conversation up to where the assistant answers."""
    require_plain(chat, encode, messages)
    return encode(render(chat, messages, prompt=True))


def find_turns(chat: Chat, encode: Encode, messages: Sequence[Message]) -> tuple[list[int], list[range]]:
    """The tokens up to the end of the last assistant's turn, and where all such turns stand in them.

    InputError where the template writes earlier turns otherwise once others follow, or ends a turn without a special
    token, and where the tokenizer joins the beginning of an answer to the text before it.
    """
    require_plain(chat, encode, messages)
    text = render(chat, messages)
    tokens, turns = encode(text), []
    for place in [place for place, message in enumerate(messages) if message["role"] == "assistant"]:
        before, after = render(chat, messages[:place], prompt=True), render(chat, messages[: place + 1])
        if not (after.startswith(before) and text.startswith(after)):
            raise InputError(
                f"the chat template of {chat.path} writes turn {place + 1} otherwise than when it is asked."
            )
        given, done = encode(before), encode(after)
        ends = [end for end in range(len(given), len(done)) if done[end] in chat.special]
        if not ends:
            raise InputError(f"the chat template of {chat.path} ends turn {place + 1} without a special token.")
        turn = range(len(given), ends[0] + 1)
        if tokens[: turn.start] != given or tokens[: turn.stop] != done[: turn.stop]:
            raise InputError(f"turn {place + 1} begins with what the tokenizer joins to the text before it.")
        turns.append(turn)
    return tokens[: turns[-1].stop], turns

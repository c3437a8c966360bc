"""What the commands share: options that are also command-line options, and a model that can be asked.

An options object is a frozen dataclass; each field says, through `option`, how it is typed and explained on the command
line (`main.py`). Read next: `train.py`.
"""

import argparse
import os
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from lfu import lora, model
from lfu.checkpoints import checkpoints, describe_changes
from lfu.data.chat import CHAT, template_file
from lfu.data.rows import LAYOUTS, Layout, Message, get_layout
from lfu.data.tokens import (
    LOSS_ON,
    TEMPLATE_NAMES,
    Format,
    ModelTokenizer,
    describe_tokens,
    load_tokenizer,
    longest_context,
    prompt_ids,
)
from lfu.errors import InputError, option_name, quote
from lfu.io.config import Config, read_config
from lfu.io.files import read_json, read_optional_json
from lfu.io.huggingface import fingerprint, is_same_model, resolve_model

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}


StrPath = str | Path
"""A path as it may be given. Options keep it as text."""


def option(help: str, default: Any = MISSING, **how: Any) -> Any:
    """A field of an options object that is also a command-line option. Without a default it is required."""
    return field(default=default, metadata={"help": help, **how})


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the commands' options have in common: a path may be given as a Path; it is kept as text, as JSON has it."""

    def __post_init__(self) -> None:
        for name, value in list(vars(self).items()):
            object.__setattr__(self, name, as_text(value))


def as_text(value: Any) -> Any:
    """A value in which each Path is a text."""
    if isinstance(value, list):
        return [as_text(each) for each in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


MOST_BLOCKS = 10_000


def block_numbers(text: str) -> list[int]:
    """Block numbers such as "1-11" or "1,4,9-12"."""
    try:
        spans = [[int(end) for end in part.split("-")] for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form 1-11 or 1,4,9-12") from error
    if any(span[0] > span[-1] or len(span) > 2 for span in spans):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form 1-11 or 1,4,9-12")
    if max(span[-1] for span in spans) > MOST_BLOCKS:
        raise argparse.ArgumentTypeError(f"{text!r} names blocks that no model has")
    return [number for span in spans for number in range(span[0], span[-1] + 1)]


def require_counts(options: Any, *names: str, least: int = 1) -> None:
    """InputError for an option that is given and smaller than `least`, or too large for a tensor's size."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not least <= value < 2**63:
            bound = f"at least {least}" if value < least else "less than 2^63"
            raise InputError(f"{option_name(name)} must be {bound}, not {quote(value)}.")


def check_writable(out: str | Path) -> None:
    """InputError where nothing could be written at `out`, which is a folder to fill or does not exist yet."""
    place = Path(out).absolute()
    first = next(path for path in (place, *place.parents) if path.exists())
    if not first.is_dir() or not os.access(first, os.W_OK | os.X_OK):
        raise InputError(f"{out} cannot be written: {first} is not a folder that may be written in.")


# --- what several commands read ----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ModelOptions(Options):
    model: StrPath = option("model folder, or hub id such as meta-llama/Llama-3.1-8B")
    dtype: str | None = option(
        "dtype of the weights (default: the file's; float32 on the CPU)", None, choices=list(DTYPES)
    )
    device: str | None = option("cpu, cuda, cuda:1, mps, ... (default: cuda where there is one, else mps)", None)


@dataclass(frozen=True, kw_only=True)
class RowsOptions(Options):
    data: StrPath = option("JSONL file of questions and reference answers")
    layout: str = option(
        "what the rows hold: two columns, those of a published data set, or messages", "columns", choices=list(LAYOUTS)
    )
    question: str = option("name of the question column", "question")
    answer: str = option("name of the answer column", "answer")
    limit: int | None = option("use only the first rows of the file", None)

    def reader(self) -> Layout:
        """What finds the question and the answer in a row of the data."""
        return get_layout(self.layout, self.question, self.answer)


# --- a model that can be asked --------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class InferenceOptions(ModelOptions):
    adapter: StrPath | None = option("adapter folder (default: the model alone)", None)
    template: str | None = option(
        "how a question becomes a prompt; chat: the model's own (default: as the adapter or model says, else alpaca)",
        None,
        choices=list(TEMPLATE_NAMES),
    )
    system: str | None = option(
        "system turn before the question, with the template chat (default: as the adapter or model says)", None
    )
    bos: bool | None = option(
        "BOS before the prompt (default: as the adapter or model says, else where the tokenizer puts one)", None
    )


class PromptSetup(NamedTuple):
    """How a model is asked: all that prompts are made of, before any weights are read."""

    folder: Path
    config: Config
    tokenizer: ModelTokenizer
    format: Format
    positions: int | None  # how many tokens the model was made for, if config.json says it
    said: Format | None  # what the adapter was trained on, or else the model made for, if its files say it


class LoadedModel(NamedTuple):
    """A model, with or without an adapter, that can be asked."""

    config: Config
    base: model.Params
    adapters: list[lora.Adapter]


def load_prompt_setup(options: InferenceOptions) -> PromptSetup:
    """The prompt's format is as given, else the adapter's own, else the model's; without any of these, `Format()`."""
    folder = resolve_model(options.model)
    config = read_config(folder / "config.json")
    said, recorded = read_format(folder / "lfu_config.json"), {}
    if options.adapter is not None:
        said = adapter_format(Path(options.adapter), folder) or said
        recorded = recorded_tokens(Path(options.adapter))
    stored = said or Format()
    form = ask_as(stored, options.template, options.bos, options.system)
    bos = wanted_bos(options.bos, stored, recorded)
    tokenizer = load_tokenizer(folder, config.vocab_size, bos, stored.template)
    if options.adapter is not None:
        require_same_tokens(Path(options.adapter), describe_tokens(tokenizer), bos=options.bos is None)
    if CHAT in (form.template, stored.template) and form.template != stored.template:
        tokenizer = load_tokenizer(folder, config.vocab_size, bos, form.template)
    return PromptSetup(folder, config, tokenizer, form, longest_context(folder), said)


def ask_as(stored: Format, template: str | None, bos: bool | None, system: str | None) -> Format:
    """A stored format with what is given in its place; None leaves what is stored."""
    template = stored.template if template is None else template
    bos = stored.bos if bos is None else bos
    return stored._replace(template=template, bos=bos, system=chosen_system(template, system, stored.system))


def note_template(model: StrPath, folder: Path, said: Format | None, template: str) -> None:
    """Print it where a model is asked otherwise than it was made for, as far as its files say."""
    if said is not None and said.template != template:
        print(f"The model was made for the template {said.template}; {template} is used.")
    if said is None and template != CHAT and template_file(folder) is not None:
        print(f"{model} has a chat template of its own; {template} is used. See --template chat.")


def chosen_system(template: str, given: str | None, stored: str | None = None) -> str | None:
    """The system turn, which the template chat alone has a place for; InputError if one is given for another."""
    if template == CHAT:
        return stored if given is None else given
    if given is not None:
        raise InputError("--system is a turn of a chat: add --template chat.")
    return None


def wanted_bos(given: bool | None, stored: Format, recorded: dict[str, Any]) -> bool | None:
    """Whether there is to be a BOS: as given, else as the adapter was trained, else (None) as the tokenizer does."""
    if given is not None or not stored.bos:
        return bool(given)
    return bool(recorded.get("bos")) if recorded else None


def encode_question(
    setup: PromptSetup, question: str, max_new_tokens: int, history: Sequence[Message] = ()
) -> list[int]:
    """A question's prompt. InputError if there is no token to continue from, or no room for as many new ones."""
    prompt, room = prompt_ids(setup.tokenizer, setup.format, question, history), setup.positions
    if not prompt:
        raise InputError("the question is empty, and neither template nor BOS puts a token before an answer.")
    if room is not None and len(prompt) + max_new_tokens > room:
        raise InputError(
            f"a prompt of {len(prompt)} tokens and {max_new_tokens} new ones are more than "
            f"{describe_positions(setup)}. Give a lower --max-new-tokens, or a shorter question."
        )
    return prompt


def describe_positions(setup: PromptSetup) -> str:
    return f"the model's max_position_embeddings, {setup.positions} ({setup.folder / 'config.json'})"


def load_model(options: InferenceOptions, setup: PromptSetup) -> LoadedModel:
    """Load what answers."""
    device, folder, adapter = choose_device(options.device), setup.folder, options.adapter
    saved = [] if adapter is None else [lora.load(Path(adapter), setup.config, device=device)]
    config, base = model.load(folder, dtype=choose_dtype(options.dtype, folder, device), device=device)
    return LoadedModel(config, base, [cast_adapter(adapter, base) for adapter in saved])


def adapter_format(adapter: Path, folder: Path) -> Format | None:
    """What the adapter was trained on; None where its files do not say it, as those of another program.

    InputError if that was another model than the one in `folder`.
    """
    if (adapter / "settings.json").is_file() and not (adapter / "adapter_config.json").is_file():
        held = [path for path in (adapter / "best", adapter / "adapter", *checkpoints(adapter)) if path.is_dir()]
        advice = f"give {' or '.join(map(str, held[:2]))}" if held else "it holds no adapter yet"
        raise InputError(f"{adapter} is the folder of a run: {advice}.")
    path = adapter / "lfu_config.json"
    settings, needed = read_optional_json(path), {"template", "bos", "model_fingerprint"}
    if not needed & set(settings):
        return None
    if not needed <= set(settings):
        raise InputError(f"{path} must name the template, the bos and the model_fingerprint of the training.")
    if not is_same_model(settings["model_fingerprint"], fingerprint(folder)):
        raise InputError(
            f"{adapter} was trained on {settings.get('model')}, whose files differ from those of {folder}. If these "
            f"hold the same weights, remove {path.name} and give the --template."
        )
    return read_format(path)


def read_format(path: Path) -> Format | None:
    """How the adapter or the model of this lfu_config.json is asked; None without one. InputError for no such way."""
    if not os.path.lexists(path):
        return None
    settings = read_json(path)
    if "template" not in settings:
        raise InputError(f"{path} must name a template: {', '.join(TEMPLATE_NAMES)}.")
    form = Format(**{name: settings[name] for name in Format._fields if name in settings})
    if form.template not in TEMPLATE_NAMES or form.loss_on not in LOSS_ON or not isinstance(form.bos, bool):
        said = quote([form.template, form.loss_on, form.bos])
        raise InputError(f"{path}: template, loss_on and bos are {said}: lfu knows no such format.")
    if not (form.system is None or isinstance(form.system, str)):
        raise InputError(f"{path}: system must be a string or null, not {quote(form.system)}.")
    return form


def recorded_tokens(adapter: Path) -> dict[str, Any]:
    """The special tokens of an adapter's training; empty where version 0.1.0, or another program, recorded none."""
    path = adapter / "lfu_config.json"
    tokens = read_optional_json(path).get("tokens", {})
    if not isinstance(tokens, dict):
        raise InputError(f"{path}: tokens must be a JSON object, not {quote(tokens)}.")
    return tokens


def require_same_tokens(adapter: Path, tokens: dict[str, Any], *, bos: bool = True) -> None:
    """InputError where an adapter was trained with other special tokens than these; BOS is compared if `bos` is set."""
    before = recorded_tokens(adapter)
    if changed := describe_changes(before, {name: tokens.get(name) for name in before if bos or name != "bos"}):
        raise InputError(
            f"{adapter} was trained with other special tokens: {changed}. Give the same --bos, or undo the change to "
            "tokenizer_config.json or generation_config.json; if it is meant, remove tokens from lfu_config.json."
        )


def format_flags(form: Format) -> str:
    """What to type to ask in this format."""
    system = "" if form.system is None else f" --system {quote(form.system)}"
    return f"--template {form.template} --{'' if form.bos else 'no-'}bos{system}"


def cast_adapter(adapter: lora.Adapter, base: model.Params) -> lora.Adapter:
    """The adapter in the dtype it is computed in."""
    tree, scale = adapter
    return tree_map(partial(Tensor.to, dtype=model.stream_dtype(base)), tree), scale


def choose_dtype(name: str | None, folder: Path, device: torch.device) -> torch.dtype:
    """The dtype of this name, or else `model.default_dtype`. InputError for float64 where the device has none."""
    dtype = DTYPES[name] if name is not None else model.default_dtype(folder, device)
    if dtype == torch.float64 and device.type == "mps":
        raise InputError("The device mps has no float64: give --dtype float32, or --device cpu.")
    return dtype


def choose_device(name: str | None) -> torch.device:
    """The device of this name, or the best there is: cuda, then mps, then cpu. InputError if it cannot be used."""
    try:
        found = torch.zeros(1, device=name or best_device())
        found.add(1).item()  # "meta" has no values to compute with
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).split("\n")[0].split(". ")[0]
        raise InputError(f"The device {quote(name)} cannot be used here: {reason}.") from error
    return found.device


def best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"

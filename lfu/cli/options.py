"""What the verbs share: options that are also command-line options, and a model that can be asked.

An options object is a frozen dataclass; each field says, through `option`, how it is typed and explained on the command
line (`main.py`). Read next: `train.py`.
"""

import argparse
import os
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from lfu import lora, model
from lfu.data.rows import LAYOUTS, Layout, get_layout
from lfu.data.tokens import TEMPLATES, Format, ModelTokenizer, load_tokenizer, prompt_ids
from lfu.errors import InputError, option_name
from lfu.io.config import Config, read_config
from lfu.io.files import read_json
from lfu.io.huggingface import fingerprint, is_same_model, resolve_model

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}


def option(help: str, default: Any = MISSING, **how: Any) -> Any:
    """A field of an options object that is also a command-line option. Without a default it is required."""
    return field(default=default, metadata={"help": help, **how})


def block_numbers(text: str) -> list[int]:
    """Block numbers such as "1-11" or "1,4,9-12"."""
    try:
        spans = [[int(end) for end in part.split("-")] for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form 1-11 or 1,4,9-12") from error
    if any(span[0] > span[-1] or len(span) > 2 for span in spans):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form 1-11 or 1,4,9-12")
    return [number for span in spans for number in range(span[0], span[-1] + 1)]


def require_counts(options: Any, *names: str, least: int = 1) -> None:
    """InputError for an option that is given and smaller than `least`."""
    for name in names:
        value = getattr(options, name)
        if value is not None and value < least:
            raise InputError(f"{option_name(name)} must be at least {least}, not {value}.")


def check_writable(out: str | Path) -> None:
    """InputError where nothing could be written at `out`, which is a folder to fill or does not exist yet."""
    place = Path(out).absolute()
    first = next(path for path in (place, *place.parents) if path.exists())
    if not first.is_dir() or not os.access(first, os.W_OK | os.X_OK):
        raise InputError(f"{out} cannot be written: {first} is not a folder that may be written in.")


IDENTITIES = {
    "model_fingerprint": "the model files differ",
    "data_sha256": "the data file differs",
    "adapter_sha256": "the adapter to continue from differs",
}
"""What is compared by checksum, which says nothing to a reader."""


def describe_changes(names: Iterable[str], before: dict[str, Any], now: dict[str, Any]) -> str:
    """In words, which of these settings are no longer what they were; empty if all are."""

    def difference(name: str) -> str:
        if name not in before:
            return f"its {option_name(name)} was not recorded"
        return IDENTITIES.get(name) or f"{option_name(name)} was {before[name]!r} and is {now[name]!r}"

    return "; ".join(difference(name) for name in names if not is_unchanged(name, before.get(name), now[name]))


def is_unchanged(name: str, before: Any, now: Any) -> bool:
    """Whether a setting is what it was."""
    return is_same_model(before, now) if name == "model_fingerprint" else before == now


# --- what several verbs read ----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    model: str = option("model folder, or hub id such as meta-llama/Llama-3.1-8B")
    dtype: str | None = option(
        "dtype of the weights (default: the file's; float32 on the CPU)", None, choices=list(DTYPES)
    )
    device: str | None = option("cpu, cuda, cuda:1, mps, ... (default: cuda where there is one, else mps)", None)


@dataclass(frozen=True, kw_only=True)
class RowsOptions:
    data: str = option("JSONL file of questions and reference answers")
    layout: str = option("what the rows of the data look like: see lfu/data/rows.py", "columns", choices=list(LAYOUTS))
    question: str = option("name of the question column", "question")
    answer: str = option("name of the answer column", "answer")
    limit: int | None = option("use only the first rows of the file", None)

    def reader(self) -> Layout:
        """What finds the question and the answer in a row of the data."""
        return get_layout(self.layout, self.question, self.answer)


# --- a model that can be asked --------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class InferenceOptions(ModelOptions):
    adapter: str | None = option("adapter folder (default: the model alone)", None)
    template: str | None = option(
        "prompt template (default: the adapter's, else alpaca)", None, choices=list(TEMPLATES)
    )
    bos: bool | None = option("BOS before the prompt (default: as the adapter was trained)", None)


class PromptSetup(NamedTuple):
    """How a model is asked: all that prompts are made of, before any weights are read."""

    folder: Path
    config: Config
    tokenizer: ModelTokenizer
    format: Format


class LoadedModel(NamedTuple):
    """A model, with or without an adapter, that can be asked."""

    config: Config
    base: model.Params
    adapters: list[lora.Adapter]


def load_prompt_setup(options: InferenceOptions) -> PromptSetup:
    """The prompt's format is the adapter's own, unless it is given; without either, `Format()`."""
    folder = resolve_model(options.model)
    config = read_config(folder / "config.json")
    stored = adapter_format(Path(options.adapter), folder) if options.adapter is not None else Format()
    form = stored._replace(
        template=stored.template if options.template is None else options.template,
        bos=stored.bos if options.bos is None else options.bos,
    )
    return PromptSetup(folder, config, load_tokenizer(folder, config.vocab_size), form)


def encode_question(setup: PromptSetup, question: str, where: str) -> list[int]:
    """A question's prompt. InputError, naming where it stands, if there is no token to continue from."""
    prompt = prompt_ids(setup.tokenizer, setup.format, question)
    if not prompt:
        raise InputError(f"{where}: the question is empty, and neither template nor BOS puts a token before an answer.")
    return prompt


def load_model(options: InferenceOptions, setup: PromptSetup) -> LoadedModel:
    """Load what answers."""
    device, folder, adapter = choose_device(options.device), setup.folder, options.adapter
    saved = [] if adapter is None else [lora.load(Path(adapter), setup.config, device=device)]
    config, base = model.load(folder, dtype=choose_dtype(options.dtype, folder, device), device=device)
    return LoadedModel(config, base, [cast_adapter(adapter, base) for adapter in saved])


def adapter_format(adapter: Path, folder: Path) -> Format:
    """What the adapter was trained on. InputError if that was another model than the one in `folder`."""
    if (adapter / "adapter" / "adapter_config.json").is_file() and not (adapter / "adapter_config.json").is_file():
        raise InputError(f"{adapter} is the folder of a run: give {adapter / 'adapter'}.")
    path = adapter / "lfu_config.json"
    if not path.is_file():
        return Format()
    settings = read_json(path)
    if not {"template", "bos", "model_fingerprint"} <= set(settings):
        raise InputError(f"{path} must name the template, the bos and the model_fingerprint of the training.")
    if not is_same_model(settings["model_fingerprint"], fingerprint(folder)):
        raise InputError(
            f"{adapter} was trained on {settings.get('model')}, whose files differ from those of {folder}. If these "
            f"hold the same weights, remove {path.name} and give the --template."
        )
    form = Format(**{name: settings[name] for name in Format._fields if name in settings})
    if not (isinstance(form.template, str) and isinstance(form.loss_on, str) and isinstance(form.bos, bool)):
        raise InputError(f"{path}: the template and loss_on must be strings, and bos true or false.")
    return form


def format_flags(form: Format) -> str:
    """What to type to ask in this format."""
    return f"--template {form.template} --{'' if form.bos else 'no-'}bos"


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
        return torch.zeros(0, device=name or best_device()).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"The device {name!r} cannot be used here: {error}") from error


def best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"

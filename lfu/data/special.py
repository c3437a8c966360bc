"""The special tokens of a model folder: which one begins a text, and which ones end an answer. Read next: `chat.py`."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from lfu.errors import InputError, quote
from lfu.io.files import read_optional_json


def bos_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """What the post-processor puts before a text."""
    bare, full = (tokenizer.encode("a", add_special_tokens=special).ids for special in (False, True))
    return tuple(full[: full.index(bare[0])])


def choose_bos(folder: Path, backend: Tokenizer, put: tuple[int, ...], wanted: bool | None) -> tuple[int, ...]:
    """BOS: what the tokenizer's post-processor puts before a text; where it puts none and one is wanted, the declared.

    InputError if there is none to put, or if nobody chose and tokenizer_config.json contradicts the post-processor: of
    Llama's tokenizers transformers 4 believes the former, of all others, and transformers 5 of all, the latter.
    """
    config, declared = tokenizer_config(folder), special_token(folder, "bos_token")
    bos = None if declared is None else backend.token_to_id(declared)
    if wanted and not put:
        if bos is None:
            raise InputError(f"{folder}: there is no BOS token to put before a text. Leave out --bos.")
        return (bos,)
    # transformers 4's own default, in the two classes that have one
    default = True if config.get("tokenizer_class") in ("LlamaTokenizer", "LlamaTokenizerFast") else None
    says = config.get("add_bos_token", default)
    if says not in (None, True, False):
        raise InputError(f"{folder}: add_bos_token must be true or false, not {quote(says)}.")
    if wanted is None and says is not None and says != bool(put) and (put or bos is not None):
        raise InputError(
            f"{folder}: tokenizer.json puts {'a' if put else 'no'} BOS before a text, but add_bos_token in "
            f"tokenizer_config.json is {json.dumps(says)}. Choose with --bos or --no-bos, or make them agree."
        )
    return put


def eos_ids(folder: Path, tokenizer: Tokenizer) -> list[int]:
    """All EOS ids the folder declares, the one that ends training answers first."""
    text = special_token(folder, "eos_token")
    found: list[int | None] = [None if text is None else tokenizer.token_to_id(text)]
    if text is not None and found == [None]:
        raise InputError(f"{folder / 'tokenizer_config.json'}: eos_token {quote(text)} is not in tokenizer.json.")
    for name in ("generation_config.json", "config.json"):
        declared = read_optional_json(folder / name).get("eos_token_id")
        found += declared if isinstance(declared, list) else [declared]
    return [token for place, token in enumerate(found) if token is not None and token not in found[:place]]


def special_token(folder: Path, name: str) -> str | None:
    """The text of tokenizer_config.json's `bos_token` or `eos_token`, if it names one."""
    token = tokenizer_config(folder).get(name)
    text = token.get("content") if isinstance(token, dict) else token
    if text is not None and not isinstance(text, str):
        raise InputError(f"{folder / 'tokenizer_config.json'}: {name} must be a text, not {quote(token)}.")
    return text or None


def tokenizer_config(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, which a folder need not have."""
    return read_optional_json(folder / "tokenizer_config.json")

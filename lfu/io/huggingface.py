"""Model folders as Hugging Face has them: found on the hub, written with merged weights, told apart by a checksum.

Read next: `lfu/runs.py`.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import Any, BinaryIO

import torch
from huggingface_hub import snapshot_download
from torch import Tensor

from lfu.errors import InputError
from lfu.io.files import first_few, new_folder, read_json, write_json, write_tensors
from lfu.io.tensors import tensor_files

MODEL_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt", "additional_chat_templates/*"]


OTHER_FORMATS = ["consolidated*", "original/*"]


def resolve_model(model: str | Path) -> Path:
    """The folder `model` names; a hub id such as "org/name" is downloaded (or found in the cache) first."""
    folder = Path(model) if Path(model).is_dir() else download(str(model))
    if (folder / "adapter_config.json").is_file():
        raise InputError(
            f"{folder} holds an adapter_config.json, by which transformers would add an adapter to the model. Move it "
            "away, or give the --model that it was made for, and this folder as the --adapter."
        )
    return folder


def download(model: str) -> Path:
    """The folder of a hub id, in the cache. InputError for what cannot be one, or that the hub does not give."""
    if Path(model).exists() or model.count("/") != 1 or model.startswith((".", "/")):
        raise InputError(f"{model} is neither a folder nor a hub id of the form 'organisation/name'.")
    if (parent := Path(model).parent).is_dir():
        raise InputError(f"{model} does not exist; what there is in {parent}: {first_few(sorted(os.listdir(parent)))}.")
    try:
        return Path(snapshot_download(model, allow_patterns=MODEL_FILES, ignore_patterns=OTHER_FORMATS))
    except Exception as error:
        # The hub client raises many kinds (network, authentication, not found), all with one remedy.
        raise InputError(
            f"There is no folder {model}, and the hub did not give it: {error}. Check the name, the network, and that "
            "you may read the repository (HF_TOKEN); or pass a folder."
        ) from error


SHARD_BYTES = 5 * 10**9


def write_model(
    target: Path, source: Path, tensors: dict[str, Tensor], rope_keys: dict[str, Any], asked: dict[str, Any] | None
) -> None:
    """A complete Hugging Face folder: these weights, and `source`'s tokenizer and configuration.

    config.json states the rotary embedding both as transformers 4 and as 5 read it (`rope_keys`): each, given only the
    other's form, would silently compute something else. `asked` goes into lfu_config.json: how the model is asked,
    where this is not as `source` says. InputError before anything is written if the disk has no room.
    """
    files, total = beside_weights(source), sum(tensor.nbytes for tensor in tensors.values())
    target.absolute().parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.absolute().parent).free
    if free < total:
        raise InputError(f"{target} needs {total / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free there.")
    with new_folder(target) as folder:
        for file in files:
            (folder / file).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / file, folder / file)
        dtype = str(reduce(torch.promote_types, [tensor.dtype for tensor in tensors.values()])).removeprefix("torch.")
        config = read_json(source / "config.json") | rope_keys | {"dtype": dtype, "torch_dtype": dtype}
        write_json(folder / "config.json", config)
        if asked is not None:
            write_json(folder / "lfu_config.json", asked)
        write_shards(folder, tensors, total)


def beside_weights(folder: Path) -> list[Path]:
    """The files of a model but its weights, relative to the folder.

    InputError for a link to elsewhere, which may be anything. Those of the hub's cache lead to its own blobs.
    """
    found = [file for pattern in MODEL_FILES for file in folder.glob(pattern) if file.is_file()]
    others = [file for file in found if not file.name.endswith((".safetensors", ".safetensors.index.json"))]
    homes = folder.resolve(), folder.resolve().parent.parent / "blobs"
    if strays := [file for file in others if not any(file.resolve().is_relative_to(home) for home in homes)]:
        raise InputError(f"{strays[0]} is a link that leads out of its folder: put the file itself there.")
    return [file.relative_to(folder) for file in others]


def write_shards(folder: Path, tensors: dict[str, Tensor], total: int) -> None:
    """One model.safetensors, or shards of at most SHARD_BYTES and their index."""
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in tensors.items():
        if shards[-1] and sum(each.nbytes for each in shards[-1].values()) + tensor.nbytes > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = tensor
    if len(shards) == 1:
        write_tensors(folder / "model.safetensors", tensors)
        return
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for file, shard in zip(names, shards, strict=True):
        write_tensors(folder / file, shard)
    weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def fingerprint(folder: Path) -> str:
    """Two checksums that tell one model folder from another without reading 16 GB. InputError if a file is missing.

    The first is of the configuration, the tokenizer, and of each file that the weights are read from its size and its
    first and last mebibyte; the second, of its header and of three pages of each tensor. So other weights are noticed
    in whichever tensor they are; a few changed values in the middle of one may not be.
    """
    small = [folder / "config.json", folder / "tokenizer.json"]
    if missing := [path for path in small if not path.is_file()]:
        raise InputError(f"{missing[0]} does not exist: a model folder holds configuration, tokenizer and weights.")
    ends, samples = hashlib.sha256(b"".join(path.read_bytes() for path in small)), hashlib.sha256()
    for path in sorted(set(tensor_files(folder, "model").values())):
        size = path.stat().st_size
        ends.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            ends.update(file.read(1 << 20))
            file.seek(max(0, size - (1 << 20)))
            ends.update(file.read())
            for page in sample_tensors(file):
                samples.update(page)
    return f"{ends.hexdigest()}:{samples.hexdigest()}"


def sample_tensors(file: BinaryIO, page: int = 4096) -> Iterator[bytes]:
    """The header of a safetensors file, and a page from the beginning, the middle and the end of each tensor."""
    file.seek(0)
    length = file.read(8)
    header = file.read(int.from_bytes(length, "little"))
    yield header
    for name, entry in json.loads(header).items():
        start, end = entry["data_offsets"] if name != "__metadata__" else (0, 0)
        for place in (start, (start + end) // 2, max(start, end - page)):
            file.seek(len(length) + len(header) + place)
            yield file.read(min(page, end - place))


def is_same_model(stored: object, found: str) -> bool:
    """Whether a stored fingerprint is this one. Version 0.1.0 stored the first of the two checksums alone."""
    return stored in (found, found.partition(":")[0])

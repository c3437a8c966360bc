"""Weights from safetensors files, read strictly: one file, or an index and its shards.

A tensor that is silently missing or misnamed costs days, so every error names the file and the tensor. Read next:
`keys.py`.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lfu.errors import InputError
from lfu.io.files import first_few, read_json, require_finite


def read_tensors(
    folder: Path,
    shapes: dict[str, tuple[int, ...]],
    *,
    optional: Iterable[str] = (),
    ignored: Iterable[str] = (),
    stem: str = "model",
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> dict[str, Tensor]:
    """Exactly the tensors `shapes` names, from `folder`/`stem`.safetensors or its index and shards, in this dtype.

    `dtype` None is each tensor's own. On the CPU those that need no conversion are views of the memory-mapped file;
    elsewhere each goes straight to the device. Names in `optional` may be absent, names that end as one of `ignored`
    are passed over. Everything else that is missing, unexpected or mis-shaped raises InputError before the first tensor
    is read; so does, after that, a value that is not finite or not in this dtype.
    """
    optional, ignored = set(optional), tuple(ignored)
    files = {name: file for name, file in tensor_files(folder, stem).items() if not name.endswith(ignored)}
    missing = [name for name in shapes if name not in files and name not in optional]
    if missing:
        raise InputError(f"{folder} lacks {len(missing)} tensors that its configuration implies: {first_few(missing)}.")
    unexpected = [name for name in files if name not in shapes]
    if unexpected:
        raise InputError(
            f"{folder} holds {len(unexpected)} tensors that the model has no place for: {first_few(unexpected)}."
        )
    opened = {file: open_safetensors(file, device) for file in sorted(set(files.values()))}
    for name, file in files.items():
        check_tensor(name, file, opened[file], shapes[name])
    # One after the other: there are never two copies of the whole model.
    tensors = {name: opened[file].get_tensor(name).to(dtype=dtype) for name, file in files.items()}
    require_finite(tensors, files)
    return tensors


def tensor_files(folder: Path, stem: str) -> dict[str, Path]:
    """Tensor name -> the file that holds it, from the single file or from the index."""
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if single.is_file():
        return dict.fromkeys(open_safetensors(single).keys(), single)
    if not index.is_file():
        raise InputError(f"{folder} has neither {single.name} nor {index.name}.")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise InputError(f"{index} has no 'weight_map' from tensor names to file names.")
    if strays := sorted({file for file in weight_map.values() if Path(file).name != file}):
        raise InputError(f"{index} names files that are not in its folder: {first_few(strays)}.")
    absent = sorted({file for file in weight_map.values() if not (folder / file).is_file()})
    if absent:
        raise InputError(f"{index} names files that are not there: {first_few(absent)}. Download them again.")
    files = {name: folder / file for name, file in weight_map.items()}
    for file in set(files.values()):
        held, promised = set(open_safetensors(file).keys()), {name for name in files if files[name] == file}
        if held != promised:
            raise InputError(
                f"{index} and {file.name} disagree about these tensors: {first_few(sorted(held ^ promised))}."
            )
    return files


def open_safetensors(file: Path, device: str | torch.device = "cpu") -> safe_open:
    """An open safetensors file; InputError if it is truncated or is not one."""
    try:
        return safe_open(file, framework="pt", device=str(device))
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error}.") from error
    except SafetensorError as error:
        raise InputError(
            f"{file} is not a complete safetensors file ({error}). It may be a partial download or a Git LFS pointer: "
            "download it again."
        ) from error


def read_all_tensors(file: Path, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """Every tensor of a safetensors file, in memory of its own."""
    opened = open_safetensors(file, device)
    return {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118, the file is not a dict


def check_tensor(name: str, file: Path, opened: safe_open, shape: tuple[int, ...]) -> None:
    """InputError unless the stored tensor has this shape and a floating-point type."""
    stored = opened.get_slice(name)
    if tuple(stored.get_shape()) != shape:
        raise InputError(f"{file}: {name} has shape {tuple(stored.get_shape())}, the configuration implies {shape}.")
    if stored.get_dtype() not in ("F64", "F32", "F16", "BF16"):
        raise InputError(f"{file}: {name} is stored as {stored.get_dtype()}; quantised weights are not supported.")


def check_tied(folder: Path, tensors: dict[str, Tensor]) -> None:
    """InputError where config.json says the output layer is the embedding, and the file holds another one."""
    head = tensors.get("lm_head.weight")
    if head is not None and not torch.equal(head, tensors["model.embed_tokens.weight"]):
        raise InputError(
            f"{folder}: config.json ties lm_head.weight to model.embed_tokens.weight, but the file holds two different "
            "tensors. Set tie_word_embeddings to false if both are meant."
        )


def stored_dtype(folder: Path, name: str) -> torch.dtype:
    """The dtype a tensor has in the file. InputError if there is no such tensor."""
    files = tensor_files(folder, "model")
    if name not in files:
        raise InputError(f"{folder} has no tensor {name}.")
    return open_safetensors(files[name]).get_tensor(name).dtype

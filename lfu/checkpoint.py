"""Files: what is read from disk is checked before it is used; what is written appears whole or not at all.

Reading is strict, because a tensor that is silently missing or misnamed costs days: every error names the file and
the tensor. Writing goes to a sibling of the target, is flushed to the disk, and is renamed into place, so a reader
(and a run that is resumed after a power cut) never sees half of anything.

Read next: `verbs/shared.py`; `bench.py` is an aside.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lfu import InputError

MODEL_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]
OTHER_FORMATS = ["consolidated*", "original/*"]


def resolve_model(model: str | Path) -> Path:
    """The folder `model` names; a hub id such as "org/name" is downloaded (or found in the cache) first."""
    folder = Path(model)
    if folder.is_dir():
        return folder
    if folder.exists() or str(model).count("/") != 1 or str(model).startswith((".", "/")):
        raise InputError(f"{model} is neither a folder nor a hub id of the form 'organisation/name'.")
    try:
        return Path(snapshot_download(str(model), allow_patterns=MODEL_FILES, ignore_patterns=OTHER_FORMATS))
    except Exception as error:
        # The hub client raises many kinds (network, authentication, not found), all with one remedy.
        raise InputError(
            f"There is no folder {model}, and the hub did not give it: {error}. Check the name, the network, and that "
            "you may read the repository (HF_TOKEN); or pass a folder."
        ) from error


def read_json(path: Path) -> dict:
    """The JSON object in `path`; InputError if the file is missing, not JSON, or not an object."""
    if not path.is_file():
        raise InputError(f"{path} does not exist.")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} must hold a JSON object, not {type(value).__name__}.")
    return value


# --- config.json, as transformers 4 and 5 write it --------------------------------------------------

ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen3": "Qwen3ForCausalLM"}


def parse_config(path: Path) -> dict[str, Any]:
    """The settings of a config.json that shape the computation, under the names of `model.Config`.

    Other keys are ignored; values that the decoder cannot compute (biases, other activations, other rope types,
    quantisation) raise InputError with the key and the value.
    """
    raw = read_json(path)
    kind = str(raw.get("model_type"))
    if kind not in ARCHITECTURES or raw.get("architectures") not in (None, [ARCHITECTURES[kind]]):
        given = f"model_type {raw.get('model_type')!r} with architectures {raw.get('architectures')!r}"
        known = ", ".join(f"{name} ({architecture})" for name, architecture in ARCHITECTURES.items())
        raise InputError(f"{path}: {given} is not supported; these are: {known}.")
    refuse_unsupported(path, raw)
    hidden_size, heads = positive(path, raw, "hidden_size"), positive(path, raw, "num_attention_heads")
    theta, scaling = read_rope(path, raw)
    settings = dict(
        model_type=kind,
        vocab_size=positive(path, raw, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=positive(path, raw, "intermediate_size"),
        num_hidden_layers=positive(path, raw, "num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=positive(path, raw, "num_key_value_heads", heads),
        head_dim=positive(path, raw, "head_dim", 128 if kind == "qwen3" else hidden_size // heads),
        rms_norm_eps=positive(path, raw, "rms_norm_eps", kind=float),
        rope_theta=theta,
        rope_scaling=scaling,
        sliding_window=read_window(path, raw),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
    )
    require_divisible(path, raw, settings)
    return settings


def positive(path: Path, raw: dict, key: str, default: float | None = None, kind: type = int) -> Any:
    """A positive number of this kind; null or an absent key mean the default, if there is one."""
    value = default if raw.get(key) is None else raw[key]
    accepted = (int,) if kind is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, accepted) or not value > 0:
        raise InputError(
            f"{path}: {key} must be a positive {'integer' if kind is int else 'number'}, not {raw.get(key)!r}."
        )
    return kind(value)


def refuse_unsupported(path: Path, raw: dict) -> None:
    """InputError for settings that change the computation in ways this decoder does not know."""
    accepted = {
        "hidden_act": ("silu", None),
        "attention_bias": (False, None),
        "mlp_bias": (False, None),
        "use_sliding_window": (False, None),
        "quantization_config": (None,),
    }
    for key, values in accepted.items():
        if raw.get(key) not in values:
            raise InputError(f"{path}: {key} = {raw[key]!r} is not supported.")
    kinds = set(raw.get("layer_types") or ["full_attention"])
    if raw["model_type"] != "mistral" and kinds != {"full_attention"}:
        raise InputError(f"{path}: layer_types {sorted(kinds)} are not supported; every layer must be full_attention.")


def require_divisible(path: Path, raw: dict, settings: dict[str, Any]) -> None:
    """InputError for heads that do not divide what they share."""
    hidden_size, heads, shared = (
        settings[key] for key in ("hidden_size", "num_attention_heads", "num_key_value_heads")
    )
    if heads % shared:
        raise InputError(
            f"{path}: {heads} attention heads cannot share {shared} key/value heads evenly (num_attention_heads, "
            "num_key_value_heads)."
        )
    if raw.get("head_dim") is None and settings["model_type"] != "qwen3" and hidden_size % heads:
        raise InputError(f"{path}: hidden_size {hidden_size} is no multiple of num_attention_heads.")
    if settings["head_dim"] % 2:
        raise InputError(f"{path}: head_dim must be even for rotary embedding, not {settings['head_dim']}.")


def read_window(path: Path, raw: dict) -> int | None:
    """Mistral's window: 4096 where the key is absent, none where it is null. Other families have none."""
    if raw["model_type"] != "mistral" or raw.get("sliding_window", 4096) is None:
        return None
    return positive(path, raw, "sliding_window", 4096)


LLAMA3 = {
    "factor": float,
    "low_freq_factor": float,
    "high_freq_factor": float,
    "original_max_position_embeddings": int,
}


def read_rope(path: Path, raw: dict) -> tuple[float, dict[str, float] | None]:
    """Base and scaling of the rotary embedding, from `rope_theta` and `rope_scaling` (transformers 4),
    `rope_parameters` (5), or both where they agree."""
    blocks = {key: raw[key] for key in ("rope_scaling", "rope_parameters") if raw.get(key)}
    scalings = [read_scaling(path, key, block) for key, block in blocks.items()]
    holders = [raw, *blocks.values()]
    thetas = [positive(path, each, "rope_theta", kind=float) for each in holders if each.get("rope_theta") is not None]
    if any(each != scalings[0] for each in scalings) or any(each != thetas[0] for each in thetas):
        raise InputError(
            f"{path}: rope_theta, rope_scaling and rope_parameters disagree. Keep one, or make them equal."
        )
    return thetas[0] if thetas else 10000.0, scalings[0] if scalings else None


def read_scaling(path: Path, key: str, block: Any) -> dict[str, float] | None:
    """One block of rotary settings; only the types `default` and `llama3` are known."""
    if not isinstance(block, dict):
        raise InputError(f"{path}: {key} must be an object, not {block!r}.")
    kind = block.get("rope_type") or block.get("type") or "default"
    if kind not in ("default", "llama3"):
        raise InputError(f"{path}: {key} has rope type {kind!r}; supported are 'default' and 'llama3'.")
    unknown = set(block) - {"rope_type", "type", "rope_theta", *LLAMA3}
    if unknown:
        raise InputError(f"{path}: {key} has keys that are not known here: {', '.join(sorted(unknown))}.")
    if kind == "default":
        return None
    scaling = {name: positive(path, block, name, kind=number) for name, number in LLAMA3.items()}
    if scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise InputError(f"{path}: {key} must have a low_freq_factor below its high_freq_factor.")
    return scaling


# --- reading tensors ------------------------------------------------------------------------------


def read_tensors(
    folder: Path,
    shapes: dict[str, tuple[int, ...]],
    *,
    optional: Iterable[str] = (),
    ignored: Iterable[str] = (),
    stem: str = "model",
    device: str | torch.device = "cpu",
) -> dict[str, Tensor]:
    """Exactly the tensors `shapes` names, from `folder`/`stem`.safetensors or its index and shards.

    On the CPU the tensors are views of the memory-mapped file; elsewhere each goes straight to the device. Names in
    `optional` may be absent, names that end as one of `ignored` are passed over. Everything else that is missing,
    unexpected or mis-shaped raises InputError before the first tensor is read.
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
    return {name: opened[file].get_tensor(name) for name, file in files.items()}


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


def first_few(names: list[str], count: int = 4) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


# --- writing --------------------------------------------------------------------------------------


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A temporary sibling to write into; on success it takes the place of `target`, on an error it vanishes.

    A folder that was there before is set aside by one rename and put back if the next one fails.
    """
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for path in (*temporary.rglob("*"), temporary):
            fsync(path)
        replace_folder(temporary, target)
        fsync(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def replace_folder(new: Path, target: Path) -> None:
    """Rename `new` to `target`, which may exist."""
    before = target.with_name(f"{target.name}.{os.getpid()}.old.tmp")
    existed = target.exists()
    if existed:
        target.rename(before)
    try:
        new.rename(target)
    except BaseException:  # Ctrl-C too
        if existed:
            before.rename(target)
        raise
    shutil.rmtree(before, ignore_errors=True)


def write_text(target: Path, text: str) -> None:
    """Write a text file that appears whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        fsync(temporary)
        temporary.replace(target)
        fsync(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(target: Path, value: dict) -> None:
    """Write a JSON object that appears whole or not at all."""
    write_text(target, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_tensors(target: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file readable by whoever may read its folder (the library itself would say 0600)."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(contiguous, target, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{target} could not be written: {error}. Is the disk full?") from error
    umask = os.umask(0)
    os.umask(umask)
    target.chmod(0o666 & ~umask)


def fsync(path: Path) -> None:
    """Ask the system to put a file, or a folder's list of names, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """The checksum of a file; safetensors itself has none."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for part in iter(partial(file.read, 2**20), b""):
            digest.update(part)
    return digest.hexdigest()


def stored_dtype(folder: Path, name: str) -> torch.dtype:
    """The dtype a tensor has in the file."""
    return open_safetensors(tensor_files(folder, "model")[name]).get_tensor(name).dtype


SHARD_BYTES = 5 * 10**9


def write_model(target: Path, source: Path, tensors: dict[str, Tensor], rope_keys: dict) -> None:
    """A complete Hugging Face folder: these weights, and `source`'s tokenizer and configuration.

    config.json states the rotary embedding both as transformers 4 and as 5 read it (`rope_keys`): each, given only the
    other's form, would silently compute something else. InputError before anything is written if the disk has no room.
    """
    total = sum(tensor.nbytes for tensor in tensors.values())
    target.absolute().parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.absolute().parent).free
    if free < total:
        raise InputError(f"{target} needs {total / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free there.")
    with new_folder(target) as folder:
        for pattern in MODEL_FILES:
            for file in source.glob(pattern):
                if not file.name.endswith((".safetensors", ".safetensors.index.json")):
                    shutil.copyfile(file, folder / file.name)
        dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
        config = read_json(source / "config.json") | rope_keys | {"dtype": dtype, "torch_dtype": dtype}
        write_json(folder / "config.json", config)
        write_shards(folder, tensors, total)


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


# --- training runs ---------------------------------------------------------------------------------


def fingerprint(folder: Path) -> str:
    """A checksum that tells one model folder from another without reading 16 GB: the configuration, the tokenizer, and
    of each file that the weights are read from its size and its first and last mebibyte. InputError if one is missing.
    """
    small = [folder / "config.json", folder / "tokenizer.json"]
    if missing := [path for path in small if not path.is_file()]:
        raise InputError(f"{missing[0]} does not exist: a model folder holds configuration, tokenizer and weights.")
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in small))
    for path in sorted(set(tensor_files(folder, "model").values())):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(1 << 20))
            file.seek(max(0, size - (1 << 20)))
            digest.update(file.read())
    return digest.hexdigest()


def save_optimizer(folder: Path, optimizer: torch.optim.Optimizer, step: int) -> None:
    """The optimizer's moments, the number of steps done, and checksums of every tensor file in the folder."""
    moments = optimizer.state_dict()["state"]
    write_tensors(
        folder / "optimizer.safetensors",
        {f"{index}.{name}": value for index, state in moments.items() for name, value in state.items()},
    )
    checksums = {str(file.relative_to(folder)): sha256(file) for file in sorted(folder.rglob("*.safetensors"))}
    write_json(folder / "state.json", {"step": step, "sha256": checksums})


def load_optimizer(folder: Path, optimizer: torch.optim.Optimizer) -> int:
    """Put the saved moments back into a fresh optimizer; returns the number of steps done."""
    state = read_json(folder / "state.json")
    if not isinstance(state.get("step"), int) or not isinstance(state.get("sha256"), dict):
        raise InputError(f"{folder / 'state.json'} must name a step and the checksums of the tensor files.")
    for name, checksum in state["sha256"].items():
        if not (folder / name).is_file() or sha256(folder / name) != checksum:
            raise InputError(
                f"{folder / name} is damaged: its checksum is not the one in state.json. Remove {folder} to continue "
                "from the checkpoint before it, or from the start."
            )
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in read_all_tensors(folder / "optimizer.safetensors").items():
        index, name = key.split(".")
        moments.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})
    return state["step"]


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = (path for path in (run / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d+", path.name))
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def prune_checkpoints(run: Path, count: int) -> None:
    """Remove all but the last `count` checkpoints, and what an interrupted write left behind."""
    for old in [*checkpoints(run)[:-count], *(run / "checkpoints").glob("*.tmp")]:
        shutil.rmtree(old)


def truncate_log(path: Path, step: int) -> None:
    """Drop the log lines of steps after `step`: a resumed run will write them again."""
    if path.is_file():
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
        write_text(path, "".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= step))

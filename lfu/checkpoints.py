"""Checkpoints of a run: an adapter folder with the optimizer's moments beside it, written whole or not at all.

So a run that is continued from one is the run that was never interrupted. Read next: `runs.py`.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lfu import lora
from lfu.errors import InputError, option_name, quote
from lfu.io.files import new_folder, read_json, remove_leftovers, require_finite, sha256, write_json, write_tensors
from lfu.io.huggingface import is_same_model
from lfu.io.tensors import read_all_tensors
from lfu.model import Config
from lfu.validation import History, best

ADAPTER, OPTIMIZER, METHOD_STATE = "adapter_model.safetensors", "optimizer.safetensors", "method.safetensors"
EMA, BEST = "ema", "best"


@dataclass(frozen=True)
class Run:
    """Where a run is kept and how often, all that moves in it, and the record of what decides its result."""

    out: Path
    record: dict[str, Any]  # what settings.json and lfu_config.json say
    adapter: lora.Adapter
    optimizer: torch.optim.Optimizer
    state: dict[str, Tensor]  # what the method carries from one micro-batch to the next
    average: lora.Lora | None
    decay: float | None  # of the average
    save_every: int
    keep: int
    history: History  # of validation


# --- writing --------------------------------------------------------------------------------------


def save(run: Run, step: int) -> None:
    """A complete checkpoint, itself an adapter folder; then the oldest are removed.

    FileNotFoundError where the run's folder is gone: a new one of that name would hold half a run.
    """
    if not (run.out / "settings.json").is_file():
        raise FileNotFoundError(f"{run.out} was moved or removed while the run went on: there is nowhere to save to.")
    with new_folder(checkpoint_folder(run.out, step)) as folder:
        save_adapter(folder, run.adapter, run.record)
        if run.average is not None:
            (folder / EMA).mkdir()
            save_adapter(folder / EMA, (run.average, run.adapter[1]), run.record)
        if run.state:
            write_tensors(folder / METHOD_STATE, run.state)
        save_optimizer(folder, run.optimizer, step)
    prune_checkpoints(run.out, run.keep)


def checkpoint_folder(out: Path, step: int) -> Path:
    return out / "checkpoints" / f"step-{step}"


def save_best(run: Run) -> None:
    """OUT/best: the adapter as it is now; its lfu_config.json also says at which step, and with which NLL."""
    step, value = best(run.history)
    with new_folder(run.out / BEST) as folder:
        save_adapter(folder, run.adapter, run.record | {"best_step": step, "best_valid": value})


def save_adapter(folder: Path, adapter: lora.Adapter, record: dict[str, Any]) -> None:
    """PEFT's two files, and lfu_config.json: the format to prompt with, and how the adapter came to be."""
    lora.save(folder, adapter, base=record.get("model", ""))
    write_json(folder / "lfu_config.json", record)


def save_optimizer(folder: Path, optimizer: torch.optim.Optimizer, step: int) -> None:
    """The optimizer's moments, the number of steps done, and checksums of every tensor file in the folder."""
    moments = optimizer.state_dict()["state"]
    write_tensors(
        folder / OPTIMIZER,
        {f"{index}.{name}": value for index, state in moments.items() for name, value in state.items()},
    )
    write_json(folder / "state.json", {"step": step, "sha256": {name: sha256(folder / name) for name in files(folder)}})


def files(folder: Path) -> list[str]:
    """The tensor files in a checkpoint."""
    return [str(file.relative_to(folder)) for file in sorted(folder.rglob("*.safetensors"))]


def checkpoints(out: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = (path for path in (out / "checkpoints").glob("step-*") if re.fullmatch(r"step-[1-9]\d*", path.name))
    return sorted((path for path in found if path.is_dir() and not path.is_symlink()), key=number)


def number(checkpoint: Path) -> int:
    """The step after which a checkpoint was written."""
    return int(checkpoint.name.removeprefix("step-"))


def prune_checkpoints(out: Path, count: int) -> None:
    """Remove all but the last `count` checkpoints: each is first renamed, so that none is ever seen in part."""
    for old in checkpoints(out)[:-count]:
        old.rename(old.with_name(f"{old.name}.{os.getpid()}.tmp"))
    sweep(out)


def sweep(out: Path) -> None:
    """Remove what interrupted writes left in a run's folder, which this process alone writes into."""
    for folder in (out, out / "checkpoints"):
        remove_leftovers(folder, alone=True)


# --- reading --------------------------------------------------------------------------------------


def restore(run: Run, config: Config) -> int:
    """Copy the last checkpoint, if there is one, into all that the run moves; returns the steps done."""
    if not (saved := checkpoints(run.out)):
        return 0
    folder, (task, _) = saved[-1], run.adapter
    if changed := describe_changes(run.record | read_json(folder / "lfu_config.json"), deciding(run.record)):
        raise InputError(f"{folder} is a checkpoint of another run: {changed}. Remove it to continue this one.")
    step = load_optimizer(folder, run.optimizer)
    if (folder / METHOD_STATE).is_file():
        run.state.update(read_all_tensors(folder / METHOD_STATE, tree_leaves(task)[0].device))
    copy_adapter(folder, config, task)
    if run.average is not None:
        copy_adapter(folder / EMA, config, run.average)
    print(f"Resuming after step {step}.")
    return step


def load_optimizer(folder: Path, optimizer: torch.optim.Optimizer) -> int:
    """Put the saved moments back into a fresh optimizer; returns the number of steps done.

    InputError where anything in the checkpoint is not what was written.
    """
    state = read_json(folder / "state.json")
    step, checksums = state.get("step"), state.get("sha256")
    if type(step) is not int or not isinstance(checksums, dict) or not {ADAPTER, OPTIMIZER} <= set(checksums):
        raise InputError(f"{folder / 'state.json'} must name a step and the checksums of the tensor files.")
    if step != number(folder):
        raise InputError(f"{folder / 'state.json'} says step {step}, but its folder is {folder.name}: remove {folder}.")
    for name in [*checksums, *files(folder)]:
        if not (folder / name).is_file() or sha256(folder / name) != checksums.get(name):
            raise InputError(
                f"{folder / name} is damaged: its checksum is not the one in state.json. Remove {folder} to continue "
                "from the checkpoint before it, or from the start."
            )
    tensors = read_all_tensors(folder / OPTIMIZER)
    require_moments(folder / OPTIMIZER, optimizer, tensors)
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".")
        moments.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})
    return step


def require_moments(file: Path, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """InputError unless a file holds both moments of every parameter: what is missing would begin anew in silence."""
    expected: dict[str, torch.Size] = {}
    for index, parameter in enumerate(optimizer.param_groups[0]["params"]):
        moments = {"exp_avg": parameter.shape, "exp_avg_sq": parameter.shape, "step": torch.Size()}
        expected |= {f"{index}.{name}": shape for name, shape in moments.items()}
    if {name: tensor.shape for name, tensor in tensors.items()} != expected:
        raise InputError(f"{file} does not hold the moments of this adapter: remove {file.parent}.")
    require_finite(tensors, dict.fromkeys(tensors, file))


def copy_adapter(folder: Path, config: Config, task: lora.Lora) -> None:
    """Copy a saved adapter into `task`."""
    saved, _ = lora.load(folder, config, dtype=tree_leaves(task)[0].dtype)
    for tensor, value in zip(tree_leaves(task), tree_leaves(saved), strict=True):
        tensor.copy_(value)


# --- whether it is the same run -------------------------------------------------------------------

MAY_CHANGE = (
    "model",
    "data",
    "valid",
    "adapter",
    "reference",
    "out",
    "device",
    "remat",
    "save_every",
    "keep",
    "resume",
)
"""What a resumed run may give anew: what they point to is compared by checksum instead, or does not matter."""
IDENTITIES = {
    "model_fingerprint": "the model files differ",
    "data_sha256": "the data file differs",
    "valid_sha256": "the validation file differs",
    "adapter_sha256": "the adapter to continue from differs",
    "reference_sha256": "the reference differs",
    "adapter_files": "the adapter differs",
    "chat_template": "the chat template differs",
    "shots_sha256": "the file of worked examples differs",
}
"""What is compared by checksum, which says nothing to a reader."""


def deciding(record: dict[str, Any]) -> dict[str, Any]:
    """The part of a record that decides the result of a run."""
    return {name: value for name, value in record.items() if name not in MAY_CHANGE}


def describe_changes(before: dict[str, Any], now: dict[str, Any]) -> str:
    """In words, which of the settings of `now` are no longer what they were; empty if all are."""

    def difference(name: str) -> str:
        if name not in before:
            return f"its {option_name(name)} was not recorded"
        return IDENTITIES.get(name) or f"{option_name(name)} was {quote(before[name])} and is {quote(now[name])}"

    return "; ".join(difference(name) for name in now if not is_unchanged(name, before.get(name), now[name]))


def is_unchanged(name: str, before: Any, now: Any) -> bool:
    return is_same_model(before, now) if name == "model_fingerprint" else before == now

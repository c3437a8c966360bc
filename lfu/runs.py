"""One run on disk: its log, its checkpoints, its moving average, and how it is resumed. It needs no command line.

A checkpoint is an adapter folder with the optimizer's moments beside it, written whole or not at all; so a run that is
continued from it is the run that was never interrupted. Read next: `distributed.py`.
"""

import json
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from lfu import lora
from lfu.baselines.averages import ema
from lfu.errors import InputError
from lfu.io.files import new_folder, read_json, sha256, write_json, write_tensors, write_text
from lfu.io.tensors import read_all_tensors
from lfu.model import Config


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


@dataclass(frozen=True)
class Run:
    """Where a run is kept, and how often; what its method carries along, and the moving average, if there is one."""

    out: Path
    settings: dict[str, Any]
    save_every: int
    keep: int
    state: dict[str, Tensor]
    average: lora.Lora | None


METHOD_STATE = "method.safetensors"


EMA = "ema"


def log_and_save(
    run: Run,
    steps: Iterator[dict[str, float]],
    task: lora.Lora,
    optimizer: torch.optim.Optimizer,
    start_step: int,
    last: int,
) -> None:
    """Take the steps one by one, logging and saving; Ctrl-C ends the run after the step it is in, resumable."""
    log = run.out / "log.jsonl"
    truncate_log(log, start_step)
    with (
        interruptible() as interrupted,
        tqdm(total=last, initial=start_step, unit="step") as bar,
        log.open("a") as file,
    ):
        clock = time.perf_counter()
        for metrics in save_on_failure(run, steps, task, optimizer, start_step):
            seconds = time.perf_counter() - clock
            metrics |= {"seconds": round(seconds, 4), "tokens_per_second": round(metrics["tokens"] / seconds, 1)}
            file.write(json.dumps(metrics) + "\n")
            file.flush()
            bar.set_postfix_str(summary(metrics), refresh=False)
            bar.update()
            done, stop = int(metrics["step"]), bool(interrupted)  # read once: no end without its checkpoint
            if run.average is not None:
                update_ema(run.average, task, run.settings["ema"])
            if done % run.save_every == 0 or done == last or stop:
                save(run, task, optimizer, done)
            if stop and done < last:
                raise KeyboardInterrupt(f"Stopped after step {done} of {last}; continue with --resume.")
            clock = time.perf_counter()
    for name, tree in {"adapter": task, EMA: run.average}.items():
        if tree is not None:
            with new_folder(run.out / name) as folder:
                save_adapter(folder, tree, run.settings)
    print(f"Done: {run.out / 'adapter'}")


def save_on_failure(
    run: Run, steps: Iterator[dict[str, float]], task: lora.Lora, optimizer: torch.optim.Optimizer, done: int
) -> Iterator[dict[str, float]]:
    """The steps as they come. Where memory or a process fails the next one, a checkpoint of those before is left.

    Such a step ends before its update, so all is as the last one left it, but for what a method carries from one
    micro-batch to the next: a run with such a method keeps the checkpoint it has. So does one whose loss is not finite:
    to be resumed from the step before would only meet the same loss.
    """
    try:
        for metrics in steps:
            done = int(metrics["step"])
            yield metrics
    except (MemoryError, ConnectionError):
        if done > 0 and not run.state and not checkpoint_folder(run, done).exists():
            try:
                save(run, task, optimizer, done)
            except OSError as error:
                print(f"There is no checkpoint of step {done}: {error}", file=sys.stderr)
        raise


def summary(metrics: dict[str, float]) -> str:
    parts = [f"loss {metrics['sft']:.4f}"]
    if "consistency" in metrics:
        parts.append(f"consistency {metrics['consistency']:.3g}")
    parts += [f"lr {metrics['learning_rate']:.2e}", f"{metrics['tokens_per_second']:.0f} tokens/s"]
    if torch.cuda.is_initialized():  # the run is on a GPU
        parts.append(f"peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    return ", ".join(parts)


@contextmanager
def interruptible() -> Iterator[list[int]]:
    """A list that stays empty until Ctrl-C (or a polite kill) is received once; the second time stops at once."""
    received: list[int] = []

    def note(number: int, frame: Any) -> None:
        if received:
            raise KeyboardInterrupt("Stopped in the middle of a step; continue from the last checkpoint with --resume.")
        received.append(number)
        print("\nStopping after this step; press Ctrl-C again to stop at once.", file=sys.stderr)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def update_ema(average: lora.Lora, task: lora.Lora, decay: float) -> None:
    """One step of the moving average, in place."""
    for tensor, value in zip(tree_leaves(average), tree_leaves(ema(average, task, decay)), strict=True):
        tensor.copy_(value)


def save(run: Run, task: lora.Lora, optimizer: torch.optim.Optimizer, step: int) -> None:
    """A complete checkpoint, itself an adapter folder; then the oldest are removed."""
    with new_folder(checkpoint_folder(run, step)) as folder:
        save_adapter(folder, task, run.settings)
        if run.average is not None:
            (folder / EMA).mkdir()
            save_adapter(folder / EMA, run.average, run.settings)
        if run.state:
            write_tensors(folder / METHOD_STATE, run.state)
        save_optimizer(folder, optimizer, step)
    prune_checkpoints(run.out, run.keep)


def checkpoint_folder(run: Run, step: int) -> Path:
    return run.out / "checkpoints" / f"step-{step}"


def save_adapter(folder: Path, task: lora.Lora, settings: dict[str, Any]) -> None:
    """PEFT's two files, and lfu_config.json: the format to prompt with, and how the adapter came to be."""
    lora.save(folder, (task, settings["lora_alpha"] / settings["rank"]), base=settings["model"])
    write_json(folder / "lfu_config.json", settings)


def restore(run: Run, config: Config, task: lora.Lora, optimizer: torch.optim.Optimizer) -> int:
    """Copy the last checkpoint, if there is one, into all that the run moves; returns the steps done."""
    if not (saved := checkpoints(run.out)):
        return 0
    folder = saved[-1]
    step = load_optimizer(folder, optimizer)
    if (folder / METHOD_STATE).is_file():
        run.state.update(read_all_tensors(folder / METHOD_STATE, tree_leaves(task)[0].device))
    copy_adapter(folder, config, task)
    if run.average is not None:
        copy_adapter(folder / EMA, config, run.average)
    print(f"Resuming after step {step}.")
    return step


def copy_adapter(folder: Path, config: Config, task: lora.Lora) -> None:
    """Copy a saved adapter into `task`."""
    saved, _ = lora.load(folder, config, dtype=tree_leaves(task)[0].dtype)
    for tensor, value in zip(tree_leaves(task), tree_leaves(saved), strict=True):
        tensor.copy_(value)

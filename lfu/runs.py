"""One run on disk: its log, its checkpoints, its moving average, Ctrl-C, and how it is resumed.

The command line is not needed for it. In a notebook, with a `config` and a `base` from `lfu.load` and some `examples`:

    method, _ = bind("lfu-lora", config, scale=2.0)
    adapter = init(config, 8, generator=torch.Generator().manual_seed(42)), 2.0
    train_run("runs/mine", config, base, adapter, examples, method, Settings(epochs=1))

Interrupted, it goes on from its last checkpoint with `resume=True`. Read next: `cli/`.
"""

import fcntl
import json
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torch.utils._pytree import tree_leaves, tree_map
from tqdm import tqdm

from lfu.baselines.anchored import train_in_stages
from lfu.baselines.averages import ema
from lfu.checkpoints import (
    BEST,
    EMA,
    Run,
    checkpoint_folder,
    deciding,
    describe_changes,
    prune_checkpoints,
    restore,
    save,
    save_adapter,
    save_best,
    sweep,
)
from lfu.data.batches import Example
from lfu.distributed import rank_and_world_size
from lfu.errors import InputError
from lfu.evaluation.nll import answer_nll
from lfu.io.files import named, new_folder, read_json, write_json, write_text
from lfu.lora import Adapter, Lora
from lfu.model import Config, Params
from lfu.schedule import Settings, steps_per_epoch, total_steps
from lfu.train import Method, StepMetrics, adamw
from lfu.validation import History, Validation, best, watch


def train_run(
    out: str | Path, config: Config, base: Params, adapter: Adapter, examples: Sequence[Example], method: Method,
    settings: Settings, *,
    record: dict[str, Any] | None = None, validation: Validation | None = None, save_every: int | None = None,
    keep: int = 1, decay: float | None = None, resume: bool = False,
) -> Path:  # fmt: skip
    """Train `adapter`, in place, and keep the run in the folder `out`; returns OUT/adapter.

    `record` is what settings.json and, with the adapter, lfu_config.json say: what decides the result. Every
    `save_every` steps (None: an epoch) there is a checkpoint, of which the last `keep` stay. With a `decay`, OUT/ema is
    the moving average of the adapter; with a `validation`, OUT/best is the adapter of its best step. Several processes
    share one run: the first alone writes. InputError if `out` holds something else, if another process is writing into
    it, and as in `train`; KeyboardInterrupt after Ctrl-C, once the step in hand is done and saved.
    """
    (task, scale), first = adapter, rank_and_world_size()[0] == 0
    record = describe_run(task, scale, settings) if record is None else record
    average = tree_map(Tensor.clone, task) if decay is not None and first else None
    epoch = steps_per_epoch(len(examples), settings)
    last = total_steps(len(examples), settings) * getattr(method, "stages", 1)
    run = Run(
        Path(out), record, adapter, adamw(task, settings), getattr(method, "state", {}), average, decay,
        save_every or epoch, keep, [],
    )  # fmt: skip
    with lock(run.out) if first else nullcontext():
        start_step = start(run, config, resume, first)
        steps = train_in_stages(config, base, task, run.optimizer, examples, method, settings, start_step)
        if validation is not None:
            measure = partial(held_back_nll, config, base, adapter, validation.examples, settings.micro_batch_size)
            every = validation.every or epoch
            steps = watch(steps, measure, run.history, every, validation.patience, start_step, last)
        log_and_save(run, steps, start_step, last) if first else deque(steps, maxlen=0)
    return run.out / "adapter"


def describe_run(task: Lora, scale: float, settings: Settings) -> dict[str, Any]:
    """The record of a run whose caller gives none."""
    rank = len(next(iter(task[0].values())).A)
    return {"rank": rank, "lora_alpha": scale * rank, **settings._asdict()}


def start(run: Run, config: Config, resume: bool, first: bool) -> int:
    """Open the run's folder and restore what is in it; returns the steps done."""
    if first:
        open_folder(run.out, run.record, resume)
    start_step = restore(run, config) if resume else 0
    if rank_and_world_size()[1] > 1:
        require_same_start(start_step, run.record)
    if first:
        prune_checkpoints(run.out, run.keep)  # where a run was killed before it could
        truncate_log(run.out / "log.jsonl", start_step)
        run.history[:] = read_history(run.out / "log.jsonl")
    return start_step


def held_back_nll(config: Config, base: Params, adapter: Adapter, examples: Sequence[Example], size: int) -> float:
    """The mean NLL per answer token of rows held back. The first process measures for all."""
    return answer_nll(config, base, examples, [adapter], batch_size=size).mean if rank_and_world_size()[0] == 0 else 0.0


def require_same_start(start_step: int, record: dict[str, Any]) -> None:
    """InputError unless all processes start from the same step of the same run: their gradients are added up."""
    own = start_step, deciding(record)
    starts: list[Any] = [None] * rank_and_world_size()[1]
    distributed.all_gather_object(starts, own)
    if any(start != own for start in starts):
        raise InputError(
            f"The processes of this run start after the steps {[step for step, _ in starts]}, or with other settings: "
            "give all of them the same options and data, and an --out that they share."
        )


# --- its folder -----------------------------------------------------------------------------------


@contextmanager
def lock(out: Path) -> Iterator[None]:
    """One writer at a time: InputError where another process is writing into `out`. A dead process holds no lock."""
    out.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(out, os.O_RDONLY)
    try:
        take_lock(descriptor, out)
        yield
    finally:
        os.close(descriptor)


def take_lock(descriptor: int, out: Path) -> None:
    try:
        with suppress(PermissionError):  # file systems without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(
            f"{out} is in use: process {holder(descriptor)} trains into it. Wait for its end, or choose another --out."
        ) from None


def is_locked(out: Path) -> bool:
    """Whether a living process is writing into a run's folder."""
    try:
        with lock(out):
            return False
    except InputError:
        return True


def holder(descriptor: int) -> str:
    """The number of the process that holds the lock, where the system tells."""
    inode = f":{os.fstat(descriptor).st_ino}"
    with suppress(OSError, IndexError):
        locks = [line.split() for line in Path("/proc/locks").read_text().splitlines() if inode in line]
        return locks[0][4]
    return "unknown"


def open_folder(out: Path, record: dict[str, Any], resume: bool) -> None:
    """Write settings.json into a folder where nothing else is, or, to resume, check that it holds this very run."""
    check_folder(out, record, resume)
    if not resume:
        write_json(out / "settings.json", record)


def check_folder(out: Path, record: dict[str, Any], resume: bool, assumed: dict[str, Any] | None = None) -> None:
    """InputError unless the folder is empty, or, to resume, holds this very run.

    What an interrupted write, a file browser or a file system leaves in a folder does not count. `assumed` is what held
    where a run recorded nothing (None: what this one says).
    """
    if not resume:
        if out.exists() and (not out.is_dir() or any(map(is_content, out.iterdir()))):
            raise InputError(f"{out} is not empty. Choose another --out, or continue the run in it with --resume.")
        return
    if not (out / "settings.json").is_file():
        raise InputError(f"{out / 'settings.json'} does not exist: there is no run to continue. Leave out --resume.")
    for name, kind in (("checkpoints", Path.is_dir), ("log.jsonl", Path.is_file)):
        if os.path.lexists(out / name) and ((out / name).is_symlink() or not kind(out / name)):
            raise InputError(f"{out / name} is not of this run, which keeps its own there: remove it.")
    before = (record if assumed is None else assumed) | read_json(out / "settings.json")
    if changed := describe_changes(before, deciding(record)):
        raise InputError(f"{out} holds another run: {changed}. Give the same settings, or another --out.")


def is_content(path: Path) -> bool:
    return not (path.name.startswith(".") or path.name == "lost+found" or path.name.endswith(".tmp"))


# --- its log and its end --------------------------------------------------------------------------


def log_and_save(run: Run, steps: Iterator[StepMetrics], start_step: int, last: int) -> None:
    """Take the steps one by one, logging and saving; Ctrl-C ends the run after the step it is in, resumable."""
    path, done, saved = run.out / "log.jsonl", start_step, start_step
    bar = tqdm(total=last, initial=start_step, unit="step", file=Screen())
    with interruptible() as interrupted, bar, path.open("a", encoding="utf-8") as log:
        clock = time.perf_counter()
        for metrics in save_on_failure(run, steps, start_step):
            line = log_line(metrics, time.perf_counter() - clock)
            with named(path):
                log.write(json.dumps(line) + "\n")
                log.flush()
            show(bar, line)
            if run.average is not None and run.decay is not None and metrics.step > 0:
                update_ema(run.average, run.adapter[0], run.decay)
            if "valid" in line and best(run.history)[0] == metrics.step:
                save_best(run)
            done, stop = metrics.step, bool(interrupted)  # read once: no end without its checkpoint
            if done > 0 and (done % run.save_every == 0 or done == last or stop):
                os.fsync(log.fileno())  # before the checkpoint that says these steps are done
                save(run, saved := done)
            if stop and done < last:
                raise KeyboardInterrupt(f"Stopped after step {done} of {last}; continue with --resume.")
            clock = time.perf_counter()
    if done > saved:  # out of patience
        save(run, done)
    save_adapters(run)
    sweep(run.out)
    print_end(run, done)


def log_line(metrics: StepMetrics, seconds: float) -> dict[str, float]:
    """What log.jsonl says of a step, or of the validation before the first."""
    if metrics.step == 0:
        return {"step": 0, **metrics.losses}
    seconds -= metrics.losses.get("valid_seconds", 0.0)
    counts = {"step": metrics.step, "epoch": metrics.epoch, "tokens": metrics.tokens}
    update = {"gradient_norm": metrics.gradient_norm, "learning_rate": metrics.learning_rate}
    speed = {"seconds": round(seconds, 4), "tokens_per_second": round(metrics.tokens / seconds, 1)}
    return {**counts, **metrics.losses, **update, **speed}


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log that tell of a step, or of the validation before the first."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    return [found for line in text.split("\n") if (found := parse_log_line(line)) is not None]


def parse_log_line(line: str) -> dict[str, Any] | None:
    """What a line of the log says; None if it tells of no step."""
    with suppress(ValueError, TypeError, LookupError, RecursionError):
        found = json.loads(line)
        if type(found["step"]) is int and found["step"] >= 0:
            return found
    return None


def read_history(path: Path) -> History:
    """What validation found, from the log."""
    return [(line["step"], line["valid"]) for line in read_log(path) if "valid" in line]


def truncate_log(path: Path, step: int) -> None:
    """Drop the log lines of steps after `step`, which a resumed run will write again, and what is no line of a step."""
    if not path.is_file():
        return
    lines = [line for line in read_log(path) if line["step"] <= step]
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
    if lost := step - sum(line["step"] > 0 for line in lines):
        print(f"{path} lacks {lost} of the {step} steps before: it was damaged. The run is not.")


def save_on_failure(run: Run, steps: Iterator[StepMetrics], done: int) -> Iterator[StepMetrics]:
    """The steps as they come. Where memory or a process fails the next one, a checkpoint of those before is left.

    Such a step ends before its update, so all is as the last one left it, but for what a method carries from one
    micro-batch to the next: a run with such a method keeps the checkpoint it has. So does one whose loss is not finite:
    to be resumed from the step before would only meet the same loss. If that was the first step, nothing is left.
    """
    try:
        for metrics in steps:
            done = metrics.step
            yield metrics
    except FloatingPointError:
        if done == 0:
            for name in ("settings.json", "log.jsonl"):
                (run.out / name).unlink(missing_ok=True)
            with suppress(OSError):  # there is something else in it
                run.out.rmdir()
        raise
    except (MemoryError, ConnectionError):
        if done > 0 and not run.state and not checkpoint_folder(run.out, done).exists():
            try:
                save(run, done)
            except OSError as error:
                print(f"There is no checkpoint of step {done}: {error}", file=sys.stderr)
        raise


def save_adapters(run: Run) -> None:
    """OUT/adapter and, where there is an average, OUT/ema."""
    trees = {"adapter": run.adapter[0]} | ({EMA: run.average} if run.average is not None else {})
    for name, tree in trees.items():
        with new_folder(run.out / name) as folder:
            save_adapter(folder, (tree, run.adapter[1]), run.record)


def print_end(run: Run, done: int) -> None:
    """Where the adapters are, and what validation found."""
    if run.history:
        (step, lowest), (_, first), (end, last) = best(run.history), run.history[0], run.history[-1]
        print(
            f"Validation: NLL {first:.4f} before, {last:.4f} after step {end}; lowest {lowest:.4f}, after step {step}: "
            f"{run.out / BEST}"
        )
    print(f"Done: {run.out / 'adapter'}")


def show(bar: "tqdm[Any]", line: dict[str, float]) -> None:
    """Move the progress bar on, and write beside it what a step found."""
    if line["step"] == 0:
        return
    parts = [f"loss {line['sft']:.4f}"]
    if "consistency" in line:
        parts.append(f"consistency {line['consistency']:.3g}")
    if "valid" in line:
        parts.append(f"valid {line['valid']:.4f}")
    parts += [f"lr {line['learning_rate']:.2e}", f"{line['tokens_per_second']:.0f} tokens/s"]
    if torch.cuda.is_initialized():  # the run is on a GPU
        parts.append(f"peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    bar.set_postfix_str(", ".join(parts), refresh=False)
    bar.update()


class Screen:
    """Standard error, for the progress bar: a run does not end because nobody can read it."""

    def write(self, text: str) -> None:
        with suppress(OSError, ValueError, AttributeError):
            sys.stderr.write(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError, AttributeError):
            sys.stderr.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)


@contextmanager
def interruptible() -> Iterator[list[int]]:
    """A list that stays empty until Ctrl-C (or a polite kill) is received once; the second time stops at once."""
    received: list[int] = []

    def note(number: int, frame: Any) -> None:
        if received:
            raise KeyboardInterrupt("Stopped in the middle of a step; continue from the last checkpoint with --resume.")
        received.append(number)
        with suppress(OSError, ValueError, RuntimeError):  # as when the signal came in the middle of writing there
            print("\nStopping after this step; press Ctrl-C again to stop at once.", file=sys.stderr)

    before = {each: signal.signal(each, note) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def update_ema(average: Lora, task: Lora, decay: float) -> None:
    """One step of the moving average, in place."""
    for tensor, value in zip(tree_leaves(average), tree_leaves(ema(average, task, decay)), strict=True):
        tensor.copy_(value)

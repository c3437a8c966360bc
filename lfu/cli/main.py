"""The `lfu` command: train, eval, generate, merge, distill, plot, runs, bench.

Each command is a function of one options object, in a file of its own, so `lfu train --model M --data D --out O` and
`train(TrainOptions(model=M, data=D, out=O))` are the same thing. The command line is made from the options objects.
This is the last chapter.
"""

import argparse
import ctypes
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import MISSING, Field, fields
from io import TextIOWrapper
from typing import Any

from lfu import __version__
from lfu.cli.bench import BenchOptions, bench
from lfu.cli.distill import DistillOptions, distill
from lfu.cli.evaluate import EvalOptions, evaluate
from lfu.cli.generate import GenerateOptions, generate
from lfu.cli.merge import MergeOptions, merge
from lfu.cli.plot import PlotOptions, plot
from lfu.cli.runs import RunsOptions, runs
from lfu.cli.train import TrainOptions, train
from lfu.errors import InputError, is_out_of_memory, option_name, quote
from lfu.evaluation import loglikelihood as likelihoods
from lfu.methods import METHODS

COMMANDS: dict[str, tuple[type, Callable[[Any], Any], str]] = {
    "train": (TrainOptions, train, "fine-tune an adapter"),
    "eval": (EvalOptions, evaluate, "score a model or an adapter"),
    "generate": (GenerateOptions, generate, "answer a question"),
    "merge": (MergeOptions, merge, "write a model folder with the adapter merged in"),
    "distill": (DistillOptions, distill, "rewrite the answers of a data file in the words of the model"),
    "plot": (PlotOptions, plot, "draw the curves of runs"),
    "runs": (RunsOptions, runs, "list the runs in a folder, and how far they are"),
    "bench": (BenchOptions, bench, "measure what a step costs"),
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status. Input that cannot be used ends in one sentence and status 2."""
    keep_freed_memory()
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # not every terminal knows the letters of an answer, or ±
    parsed = vars(parser().parse_args(arguments))
    options, run, _ = COMMANDS[parsed.pop("command")]
    try:
        require_usable(parsed)
        run(options(**parsed))
    except (InputError, FloatingPointError, OSError) as error:
        say(str(error))
        return 2
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not is_out_of_memory(error):
            raise
        say(f"{str(error) or 'Out of memory.'} What helps: {memory_advice(options(**parsed))}.")
        return 2
    except KeyboardInterrupt as interrupt:
        say(str(interrupt) or "Interrupted.")
        return 130
    return 0


LONGEST = 480
"""Characters of a message."""


def say(message: str) -> None:
    """Print one sentence. What it quotes of names and libraries cannot act on the terminal, nor fill it."""
    shown = "".join(each if each.isprintable() else ascii(each)[1:-1] for each in message)
    cut = shown if len(shown) <= LONGEST else f"{shown[: LONGEST // 2]} ... {shown[-LONGEST // 2 :]}"
    with suppress(OSError):  # nobody is there to read it
        print(f"lfu: {cut}", file=sys.stderr)


def require_usable(parsed: dict[str, Any]) -> None:
    """InputError for text that no file could record, and for an empty path: the working folder, or no adapter."""
    for name, value in parsed.items():
        if isinstance(value, str) and ("\0" in value or value != value.encode(errors="ignore").decode()):
            raise InputError(f"--{option_name(name)} is not UTF-8 text without NUL: {quote(value)}.")
        if value == "" and name in ("model", "adapter", "data", "valid", "shots_data", "out", "folder"):
            raise InputError(f"--{option_name(name)} is empty, as if from an unset shell variable: give a path.")


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_memory() -> None:
    """Let this process keep what PyTorch frees on the CPU, unless the environment tells glibc's malloc what to do.

    By default each large tensor is mapped from the system and given back, and the system clears every page anew: in one
    step of a small model 100,000 times.
    """
    told = any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ)
    if sys.platform != "linux" or told or not hasattr(libc := ctypes.CDLL(None), "mallopt"):
        return
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, -1)  # never


def memory_advice(options: Any) -> str:
    """The options that would lower a command's memory and are not used yet."""
    dtype = getattr(options, "dtype", "bfloat16")
    lower = "--dtype bfloat16" if dtype else "--dtype bfloat16 (unless the weights are in it)"
    ways = [] if dtype in ("bfloat16", "float16") else [lower]
    if isinstance(options, TrainOptions):
        free = not (options.remat or options.compile or METHODS[options.method].released)
        anew = [*ways, "a lower --max-length", "a lower --micro-batch-size (for LfU a setting of the method)"]
        ways = ["--remat (also with --resume)"] * free + [f"in a new run: {anew[0]}", *anew[1:]]
    elif isinstance(options, EvalOptions):
        ways += ["a lower --batch-size"] + ["a lower --max-length"] * (options.score in likelihoods.SCORES)
    elif isinstance(options, DistillOptions):
        ways += ["a lower --batch-size"]
    elif isinstance(options, BenchOptions):
        ways += ["fewer --rows", "a lower --length"]
    return ", ".join(ways) or "a device with more memory"


def parser() -> argparse.ArgumentParser:
    """The command line, made from the options objects."""
    root = argparse.ArgumentParser(
        prog="lfu", description="Fine-tune language models with Learning from the Undesirable."
    )
    root.add_argument("--version", action="version", version=f"lfu {__version__}")
    commands = root.add_subparsers(dest="command", required=True)
    for name, (options, _, help) in COMMANDS.items():
        command = commands.add_parser(name, help=help, description=f"{help.capitalize()}.", allow_abbrev=False)
        for each in fields(options):
            add_option(command, each)
    return root


def add_option(command: argparse.ArgumentParser, each: Field[Any]) -> None:
    how = dict(each.metadata)
    if how.pop("positional", False):
        command.add_argument(each.name, nargs="+" if "list" in str(each.type) else None, help=how["help"])
        return
    flag, text = f"--{option_name(each.name)}", how.pop("help")
    if "bool" in str(each.type):
        command.add_argument(
            flag, dest=each.name, action=argparse.BooleanOptionalAction, default=each.default, help=text
        )
        return
    required = each.default is MISSING
    if not required and each.default is not None:
        text += f" (default: {each.default})"
    kind = next(kind for kind in (float, int, str) if kind.__name__ in str(each.type))
    how = {"type": kind, "required": required, "default": None if required else each.default, "help": text} | how
    command.add_argument(flag, dest=each.name, **how)

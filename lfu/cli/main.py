"""The `lfu` command: train, eval, generate, merge, distill, plot, runs, methods, bench.

Each command is a function of one options object, in a file of its own, so `lfu train --model M --data D --out O` and
`train(TrainOptions(model=M, data=D, out=O))` are the same thing. The command line is made from the options objects.
This is the last chapter.
"""

import argparse
import ctypes
import difflib
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import MISSING, Field, fields
from io import TextIOWrapper
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, cast

import torch

from lfu import __version__
from lfu.cli.bench import BenchOptions, bench
from lfu.cli.distill import DistillOptions, distill
from lfu.cli.evaluate import EvalOptions, evaluate
from lfu.cli.generate import GenerateOptions, generate
from lfu.cli.merge import MergeOptions, merge
from lfu.cli.methods import MethodsOptions, print_methods
from lfu.cli.options import best_device
from lfu.cli.plot import PlotOptions, plot
from lfu.cli.runs import RunsOptions, runs
from lfu.cli.train import TrainOptions, train
from lfu.errors import InputError, escape, is_out_of_memory, option_name, quote
from lfu.evaluation import loglikelihood as likelihoods
from lfu.methods import METHODS


class Command(NamedTuple):
    """One command: its options, what it does, what its help says, and how it is typed."""

    options: type
    run: Callable[[Any], Any]
    help: str
    examples: str


COMMANDS = {
    "train": Command(
        TrainOptions, train, "fine-tune an adapter",
        "lfu train --model meta-llama/Llama-3.1-8B --data train.jsonl --out runs/lfu\n"
        "lfu train --model M --data train.jsonl --method sft --hold-back 64 --patience 3 --out runs/sft",
    ),
    "eval": Command(
        EvalOptions, evaluate, "score a model or an adapter",
        "lfu eval --model M --adapter runs/lfu/adapter --data test.jsonl --out runs/lfu/predictions.jsonl\n"
        "lfu eval --model M --data test.jsonl --prompt harness --shots 5 --shots-data train.jsonl",
    ),
    "generate": Command(
        GenerateOptions, generate, "answer a question",
        "lfu generate --model M --adapter runs/lfu/adapter --question 'What is 6 times 7?'\n"
        "lfu generate --model M --template plain --question 'Once upon a time'",
    ),
    "merge": Command(
        MergeOptions, merge, "write a model folder with the adapter merged in",
        "lfu merge --model M --adapter runs/lfu/adapter --out merged\n"
        "lfu merge --model M --adapter runs/lfu/adapter --weight 0.5 --out halfway",
    ),
    "distill": Command(
        DistillOptions, distill, "rewrite the answers of a data file in the words of the model",
        "lfu distill --model M --data train.jsonl --out distilled.jsonl\n"
        "lfu distill --model M --data train.jsonl --out distilled.jsonl --resume",
    ),
    "plot": Command(
        PlotOptions, plot, "draw the curves of runs",
        "lfu plot runs/sft runs/lfu --out curves.svg\nlfu plot runs/lfu --out curves.png",
    ),
    "runs": Command(
        RunsOptions, runs, "list the runs in a folder, and how far they are", "lfu runs runs\nlfu runs runs/lfu"
    ),
    "methods": Command(
        MethodsOptions, print_methods, "list the methods and their published settings",
        "lfu methods\nlfu train --method neftune --alpha 5 --model M --data train.jsonl --out runs/neftune",
    ),
    "bench": Command(
        BenchOptions, bench, "measure what a step costs",
        "lfu bench --model M --dtype bfloat16\nlfu bench --model M --rows 1 --length 512 --compile",
    ),
}  # fmt: skip
GROUPS = {
    "model": "model dtype device adapter template system bos",
    "data": "data layout question answer limit drop max_length loss_on shots shots_data",
    "validation": "valid hold_back eval_every patience",
    "method": "method alpha lam beta layers norm reference anchor_alpha space stages rank lora_alpha recipe",
    "optimisation": "epochs batch_size micro_batch_size learning_rate warmup weight_decay max_grad_norm ema seed",
    "memory and speed": "remat compile",
    "run": "out save_every keep resume",
}
"""Titles of help and their options. Where a command lacks a title's first option, the others stand under `others`."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status. Input that cannot be used ends in one sentence and status 2."""
    keep_freed_memory()
    os.environ["RUST_BACKTRACE"] = "0"  # of tokenizers, whose panics `data/tokens.py` turns into a sentence
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # not every terminal knows the letters of an answer, or ±
    parsed = vars(parse(arguments))
    options, run, *_ = COMMANDS[parsed.pop("command")]
    try:
        require_usable(parsed)
        choose_threads(parsed)
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
    with suppress(OSError):  # nobody is there to read it
        print(f"lfu: {cut(message)}", file=sys.stderr)


def cut(message: str) -> str:
    shown = "".join(each if each.isprintable() else ascii(each)[1:-1] for each in message)
    return shown if len(shown) <= LONGEST else f"{shown[: LONGEST // 2]} ... {shown[-LONGEST // 2 :]}"


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


SMALL = 64 * 2**20
"""Bytes of weights up to which more threads cost more than they bring: on the miniature a step takes a tenth."""


def choose_threads(parsed: dict[str, Any]) -> None:
    """One thread for a small model on the CPU, unless OMP_NUM_THREADS says otherwise."""
    weights = Path(parsed.get("model") or "") / "model.safetensors"
    on_cpu = (parsed.get("device") or best_device()).startswith("cpu")
    if "OMP_NUM_THREADS" in os.environ or not on_cpu or not weights.is_file() or weights.stat().st_size > SMALL:
        return
    if torch.get_num_threads() > 1:
        print("One thread, as the model is small; OMP_NUM_THREADS=2 makes it two.")
        torch.set_num_threads(1)


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


# --- what is typed --------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence, with the choice that was probably meant."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {cut(message)}\n")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            raise argparse.ArgumentError(action, error.message + nearest(str(value), action.choices or ())) from None


def nearest(value: str, choices: Iterable[Any]) -> str:
    """The end of a sentence: the choice that is most like a value, if one is."""
    found = difflib.get_close_matches(value, list(map(str, choices)), 1)
    return f"; did you mean {found[0]}?" if found else ""


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """What was typed; ends the program with status 2 where that is no command of ours."""
    root = parser()
    parsed, rest = root.parse_known_args(arguments)
    if rest:
        command = command_parsers(root)[parsed.command]
        close = nearest(rest[0].partition("=")[0], command._option_string_actions)
        command.error(f"unrecognized arguments: {escape(' '.join(rest))}{close}")
    return parsed


def parser() -> Parser:
    """The command line, made from the options objects."""
    root = Parser(prog="lfu", description="Fine-tune language models with Learning from the Undesirable.")
    root.add_argument("--version", action="version", version=f"lfu {__version__}")
    commands = root.add_subparsers(dest="command", required=True)
    for name, each in COMMANDS.items():
        add_command(commands, name, each)
    return root


def command_parsers(root: argparse.ArgumentParser) -> Mapping[str, argparse.ArgumentParser]:
    """The parser of each command."""
    (found,) = (action.choices for action in root._actions if action.dest == "command")
    return cast(Mapping[str, argparse.ArgumentParser], found)


def add_command(commands: Any, name: str, each: Command) -> None:
    """One command's own parser, its options under the titles of GROUPS."""
    examples = "".join(f"\n  {line}" for line in each.examples.splitlines())
    needed = [
        field.name.upper() if field.metadata.get("positional") else f"--{option_name(field.name)} {field.name.upper()}"
        for field in fields(each.options)
        if field.default is MISSING
    ]
    command = commands.add_parser(
        name, usage=f"lfu {' '.join([name, *needed])} [options]", help=each.help,
        description=f"{each.help.capitalize()}.", epilog=f"examples:{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    known = {field.name for field in fields(each.options)}
    shown = {title: names.split() for title, names in GROUPS.items() if names.split()[0] in known}
    titles = {option: title for title, names in shown.items() for option in names}
    groups = {title: command.add_argument_group(title) for title in (*GROUPS, "others")}
    for field in fields(each.options):
        bare = field.metadata.get("positional", False)
        add_option(command if bare else groups[titles.get(field.name, "others")], field)


def add_option(command: Any, each: Field[Any]) -> None:
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
    shown = {int: "N", float: "X"}.get(kind)
    how = {"type": kind, "required": required, "default": None if required else each.default, "metavar": shown} | how
    command.add_argument(flag, dest=each.name, help=text, **how)

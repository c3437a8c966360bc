"""Everything that a GPU has to tell, in one command: is it right there, what does it cost, what does it learn?

    python -m experiments.gpu --out DIR --model SMOLLM2 --gsm8k FOLDER --wikitext FILE
    python -m experiments.gpu --out DIR --device cpu --small          # every part, in a minute, on the CPU

The parts come in order of worth: `right` compares gradients, decoding, runs and scores on the device with those on
the CPU; `steps`, `profile` and `decoding` measure at the true shape of Llama-3.1-8B, with random weights drawn on the
device; `real` fine-tunes SmolLM2-135M on GSM8K (it needs the last three options). Each part is a process of its own
with a limit of time, so one that fails or hangs costs no other. Every table is printed and saved as soon as it is
known, in DIR/results.md and DIR/results.json. All of it takes at most eight minutes: the parts that are run share them
in proportion to their limits, and `--only real` has all of them.

Read next: `gpu_right.py`.
"""

import argparse
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from experiments import gpu_costs, gpu_real, gpu_right
from experiments.gpu_tables import LIMITS, SECONDS, Run, command, tell
from lfu.cli.options import choose_device
from lfu.errors import InputError


def main(arguments: Sequence[str] | None = None) -> int:
    parsed = parser().parse_args(arguments)
    if parsed.part:
        return run_part(parsed)
    try:
        parsed.out.mkdir(parents=True)
    except FileExistsError:
        print(f"{parsed.out} exists: give another --out.", file=sys.stderr)
        return 2
    start, failed, parts = time.time(), [], parsed.only or [*LIMITS]
    for index, part in enumerate(parts):
        if fault := run_apart(part, parsed, share(start + SECONDS - time.time(), parts[index:])):
            failed.append(part)
            tell(parsed.out, f"{part}: {fault}")
    tell(parsed.out, f"{time.time() - start:.0f} seconds. Parts that failed: {', '.join(failed) or 'none'}.")
    return 1 if failed else 0


def share(left: float, parts: Sequence[str]) -> float:
    """The seconds of the first of these parts, of those that are left for all of them."""
    return left * LIMITS[parts[0]] / sum(LIMITS[part] for part in parts)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the tables; must not exist")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny shapes and few rounds: a rehearsal")
    parser.add_argument("--only", nargs="+", choices=LIMITS, help="these parts alone, with all of the time")
    parser.add_argument("--model", type=Path, help="folder of SmolLM2-135M, for real")
    parser.add_argument("--gsm8k", type=Path, help="folder with GSM8K's train.jsonl and test.jsonl, for real")
    parser.add_argument("--wikitext", type=Path, help="WikiText-2's validation text, for real")
    parser.add_argument("--micro-batch-size", type=int, default=16, help="for real; fewer rows take longer")
    for name, kind in (("--part", str), ("--until", float)):  # what a process of its own is started with
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    return parser


def run_apart(part: str, parsed: argparse.Namespace, limit: float) -> str | None:
    """Run one part in a process of its own; returns what went wrong, if anything did."""
    own = {"part": part, "until": time.time() + limit, "only": None}
    try:
        done = subprocess.run(command(**vars(parsed) | own), timeout=limit)
    except subprocess.TimeoutExpired:
        return f"stopped at its limit of {limit:.3g} seconds."
    return None if done.returncode == 0 else "failed, as said above."


def run_part(parsed: argparse.Namespace) -> int:
    """One part, here. An error is one line of the results: the next part is to be run all the same."""
    parts: dict[str, Callable[[Run], None]] = {
        "right": gpu_right.right,
        "steps": gpu_costs.steps,
        "profile": gpu_costs.profile,
        "decoding": gpu_costs.decoding,
        "real": gpu_real.real,
        **{f"real-{name}": partial(gpu_real.one, name=name) for name in gpu_real.METHODS},
    }
    if parsed.small:
        torch.set_num_threads(1)  # models so small are slower with more
    try:
        given = vars(parsed) | {"device": choose_device(parsed.device)}
        parts[parsed.part](Run(**{name: given[name] for name in Run._fields}))
    except InputError as error:
        tell(parsed.out, f"{parsed.part}: {error}")
        return 1
    except Exception as error:
        traceback.print_exc()
        tell(parsed.out, f"{parsed.part}: {type(error).__name__}: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Everything that a GPU has to tell, in one command: is it right there, what does it cost, what does it learn?

    python -m experiments.gpu --out DIR --model SMOLLM2 --gsm8k FOLDER --wikitext FILE
    python -m experiments.gpu --out DIR --device cpu --small          # every part, in a minute, on the CPU

The parts come in order of worth: `right` compares gradients, decoding, runs and scores on the device with those on
the CPU; `steps`, `profile` and `decoding` measure at the true shape of Llama-3.1-8B, with random weights drawn on the
device; `real` fine-tunes SmolLM2-135M on GSM8K (it needs the last three options). Each part is a process of its own
with a limit of time, so one that fails or hangs costs no other. Every table is printed and saved as soon as it is
known, in DIR/results.md and DIR/results.json. All of it takes at most eight minutes.

Read next: `gpu_right.py`.
"""

import argparse
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch

from experiments import gpu_costs, gpu_real, gpu_right
from experiments.gpu_tables import LIMITS, Run, tell
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
    start, failed = time.perf_counter(), []
    for part in parsed.only or LIMITS:
        if fault := run_apart(part, parsed):
            failed.append(part)
            tell(parsed.out, f"{part}: {fault}")
    tell(parsed.out, f"{time.perf_counter() - start:.0f} seconds. Parts that failed: {', '.join(failed) or 'none'}.")
    return 1 if failed else 0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the tables; must not exist")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny shapes and few rounds: a rehearsal")
    parser.add_argument("--only", nargs="+", choices=LIMITS, help="these parts alone")
    parser.add_argument("--model", type=Path, help="folder of SmolLM2-135M, for real")
    parser.add_argument("--gsm8k", type=Path, help="folder with GSM8K's train.jsonl and test.jsonl, for real")
    parser.add_argument("--wikitext", type=Path, help="WikiText-2's validation text, for real")
    parser.add_argument("--micro-batch-size", type=int, default=16, help="for real; fewer rows take longer")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # what a process of its own is started with
    return parser


def run_apart(part: str, parsed: argparse.Namespace) -> str | None:
    """Run one part in a process of its own; returns what went wrong, if anything did."""
    given = {name: value for name, value in vars(parsed).items() if name not in ("only", "part", "small")}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in given.items() if value is not None]
    command = [sys.executable, "-m", "experiments.gpu", *options, f"--part={part}", *(["--small"] * parsed.small)]
    try:
        return None if subprocess.run(command, timeout=LIMITS[part]).returncode == 0 else "failed, as said above."
    except subprocess.TimeoutExpired:
        return f"stopped at its limit of {LIMITS[part]} seconds."


def run_part(parsed: argparse.Namespace) -> int:
    """One part, here. An error is one line of the results: the next part is to be run all the same."""
    parts = {
        "right": gpu_right.right,
        "steps": gpu_costs.steps,
        "profile": gpu_costs.profile,
        "decoding": gpu_costs.decoding,
        "real": gpu_real.real,
        **{f"real-{name}": lambda run, name=name: gpu_real.one(run, name) for name in gpu_real.METHODS},
    }
    if parsed.small:
        torch.set_num_threads(1)  # models so small are slower with more
    try:
        device = choose_device(parsed.device)
        run = Run(
            parsed.out, device, parsed.small, parsed.model, parsed.gsm8k, parsed.wikitext, parsed.micro_batch_size
        )
        parts[parsed.part](run)
    except InputError as error:
        tell(parsed.out, f"{parsed.part}: {error}")
        return 1
    except Exception as error:
        traceback.print_exc()
        tell(parsed.out, f"{parsed.part}: {type(error).__name__}: {error}")
        return 1
    return 0


# --- what is found --------------------------------------------------------------------------------


if __name__ == "__main__":
    sys.exit(main())

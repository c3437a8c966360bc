"""A command that is killed, or whose disk fails, at each of its file operations: can the work be continued?

    python -m experiments.crash                        # train, eval, merge and distill: about ten minutes on one core
    python -m experiments.crash --only train --faults SIGKILL --every 5

One undisturbed run of a command lists its file operations (`crash_faults.py`). Then, for every operation and fault, the
command runs anew, is struck there, and is given again as a user would: with --resume where there is such an option, and
otherwise as its message says. What is there in the end is compared byte for byte with the undisturbed run, but for the
times in the log and whether --resume was given:

    same         the next command finishes the work, and every file is as it should be
    sentence     it refuses, and its message says what to do instead, which works, or that all is there, as it is

All else is a fault: `traceback`; `stuck`, no command goes on; `different` files; `half`, for a moment a final name held
something incomplete; `left over`, more files than there should be. A table is printed, then each point that failed.
"""

import argparse
import importlib
import itertools
import json
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from experiments.children import SCRATCH, Ended, prepare, run
from experiments.crash_faults import CREATING, FAULTS, Watch
from experiments.fuzz_inputs import BARE, MODEL, PROMPT, arguments, build
from experiments.markdown import markdown
from lfu.cli.main import COMMANDS
from lfu.io.files import write_json

TYPED = {
    "train": arguments(["train", *MODEL, "--keep=1"]),
    "train-ema": arguments(["train", *MODEL, "--keep=1", "--ema=0.5"]),
    "eval": arguments(["eval", *MODEL, *PROMPT, "--batch-size=2"]),
    "merge": arguments(["merge", *MODEL, *BARE]),
    "distill": arguments(["distill", *MODEL, "--batch-size=2"]),
}
GOOD = ("same", "sentence")
BAD = ("traceback", "stuck", "different", "half", "left over")


class Point(NamedTuple):
    """One fault at one operation, and what came of it."""

    command: str
    number: int
    operation: str
    fault: str
    outcome: str
    said: list[str]  # by the command that was struck, and by those given afterwards


# --- one point ------------------------------------------------------------------------------------


def try_command(world: Path, name: str, faults: Iterable[str], every: int) -> list[Point]:
    """All points of a command, or every so many of them."""
    operations, expected = undisturbed(world, name)
    return [
        try_point(world, name, number, operation, fault, expected)
        for number, operation in list(enumerate(operations))[::every]
        for fault in faults
        if fault != "ENOSPC" or operation.split()[0] in CREATING
    ]


def undisturbed(world: Path, name: str) -> tuple[list[str], dict[str, Any]]:
    """The file operations of a command, and what it leaves."""
    clear(world)
    notes = world.with_name("operations")
    ended = run(TYPED[name], world, first=Watch(world, notes).begin)
    if ended.code != 0:
        raise SystemExit(f"lfu {name} does not work undisturbed: {ended.err}")
    return notes.read_text().splitlines(), contents(world)


def try_point(world: Path, name: str, number: int, operation: str, fault: str, expected: dict[str, Any]) -> Point:
    """Strike, look, go on, compare."""
    clear(world)
    struck = run(TYPED[name], world, first=Watch(world, world.with_name("struck"), number, fault).begin, seconds=60)
    half = incomplete(world, expected)
    tried = [] if struck.code == 0 else go_on(world, TYPED[name])
    outcome = judge([struck, *tried], half, expected, contents(world))
    said = [last_words(ended).replace(f"{world}/", "") for ended in (struck, *tried)]
    return Point(name, number, operation, fault, outcome, said)


def go_on(world: Path, typed: list[str]) -> list[Ended]:
    """What a user types next, up to three times: with --resume if there is such an option, then as the message says."""
    resumable = any(each.name == "resume" for each in fields(COMMANDS[typed[0]][0]))
    resume, tried = resumable, []
    for _ in range(3):
        ended = run([*typed, "--resume"] if resume else typed, world, seconds=60)
        tried.append(ended)
        if ended.code != 2:
            break
        if not remove_as_told(world, ended.err):
            if not resumable or "--resume" not in ended.err:
                break
            resume = not resume
    return tried


def remove_as_told(world: Path, message: str) -> bool:
    """Remove what the message says is to be removed; whether it says so."""
    told = re.search(r"[Rr]emove (?!it\b)(\S+?)[.,]?(?:\s|$)", message) or re.search(r"lfu: (\S+) .*remove it", message)
    if told is None or not told[1].startswith("out-o") or not (path := world / told[1]).exists():
        return False
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    return True


def judge(ended: list[Ended], half: str, expected: dict[str, Any], found: dict[str, Any]) -> str:
    """The worst that happened."""
    if any("Traceback" in each.err for each in ended):
        return "traceback"
    if ended[-1].code != 0:
        return "sentence" if found == expected else "stuck"
    if any(found.get(name) != content for name, content in expected.items()):
        return "different"
    if half:
        return "half"
    if found.keys() != expected.keys():
        return "left over"
    return "sentence" if len(ended) > 2 else "same"


# --- what lies there ------------------------------------------------------------------------------


def clear(world: Path) -> None:
    """Remove what commands write, beside the inputs."""
    for path in world.glob("out-o*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def contents(world: Path) -> dict[str, Any]:
    """All that a command left, by name: bytes, but logs without times, and settings without --resume."""
    return {str(path.relative_to(world)): content(path) for out in world.glob("out-o*") for path in tree(out)}


def tree(path: Path) -> list[Path]:
    return [path, *path.rglob("*")]


def content(path: Path) -> Any:
    if path.is_dir():
        return None
    try:
        if path.suffix == ".json":
            return {key: value for key, value in json.loads(path.read_text()).items() if key != "resume"}
        if path.name == "log.jsonl":
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            return [
                [item for item in line.items() if item[0] not in ("seconds", "tokens_per_second")] for line in lines
            ]
    except ValueError:
        pass  # half of one
    return path.read_bytes()


def incomplete(world: Path, expected: dict[str, Any]) -> str:
    """The first final name whose file, or folder, is not whole; empty if all are.

    A folder is whole if it has the files that the undisturbed run's has; every checkpoint those of the last one. What
    grows line by line may end anywhere.
    """
    for out in sorted(world.glob("out-o*")):
        for path in tree(out):
            name = str(path.relative_to(world))
            if ".tmp" not in name and not (is_whole(path) and has_all_files(name, path, expected)):
                return name
    return ""


def is_whole(path: Path) -> bool:
    try:
        if path.suffix == ".json":
            json.loads(path.read_text())
        if path.suffix == ".safetensors":
            safe_open(path, framework="pt")
    except (ValueError, SafetensorError):
        return False
    return True


def has_all_files(name: str, path: Path, expected: dict[str, Any]) -> bool:
    """Of what is renamed into place whole: adapters, checkpoints, merged models."""
    last = max((each for each in expected if re.fullmatch(r".*/step-\d+", each)), default="")
    model = re.sub(r"^.*/step-\d+", last, name)
    grows = name.endswith("/checkpoints") or (name == "out-o" and "out-o/settings.json" in expected)
    files = {each.removeprefix(model) for each in expected if each.startswith(f"{model}/")}
    return not path.is_dir() or grows or files == {str(each).removeprefix(str(path)) for each in path.rglob("*")}


def last_words(ended: Ended) -> str:
    lines = [line for line in re.split(r"[\r\n]+", ended.err) if line.strip() and "%|" not in line]
    return f"{ended.code}: {lines[-1][:200] if lines else ''}"


# --- all points -----------------------------------------------------------------------------------


def summary(points: list[Point]) -> str:
    """Counts by command, fault and outcome, as a table; then the points that failed."""
    counts = Counter((point.command, point.fault, point.outcome) for point in points)
    pairs = list(dict.fromkeys((point.command, point.fault) for point in points))
    rows = [[*pair, *(str(counts[(*pair, outcome)] or "") for outcome in (*GOOD, *BAD))] for pair in pairs]
    failed = [point for point in points if point.outcome not in GOOD]
    total = f"{len(failed)} of {len(points)} points failed."
    return "\n".join([markdown(["command", "fault", *GOOD, *BAD], rows), "", total, *map(describe, grouped(failed))])


def grouped(points: list[Point]) -> list[list[Point]]:
    """Points that failed alike, one after another."""

    def kind(point: Point) -> tuple[str, ...]:
        return point.command, point.fault, point.outcome, *(each.split(":")[0] for each in point.said)

    points = sorted(points, key=lambda point: (point.command, point.fault))  # stable: by number within
    return [list(group) for _, group in itertools.groupby(points, kind)]


def describe(group: list[Point]) -> str:
    """What happened at the points of a group, on one line."""
    first, last = group[0], group[-1]
    numbers = f"{first.number} to {last.number}" if len(group) > 1 else str(first.number)
    until = f" ... {last.operation}" if len(group) > 1 else ""
    said = " | ".join(first.said)
    return f"{first.command}, {first.fault}, {numbers}: {first.outcome} ({first.operation}{until}) <- {said}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(TYPED), default=list(TYPED), help="only these commands")
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=FAULTS, help="only these faults")
    parser.add_argument("--every", type=int, default=1, help="only every so many operations")
    parser.add_argument("--out", type=Path, help="JSON file for all points")
    parsed = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="crash-", dir=SCRATCH) as folder:
        prepare()
        forecast: Any = importlib.import_module("lfu.cli.train")
        forecast.print_peak = lambda *_: None  # half of the time, and touches no file
        world = Path(folder) / "world"
        build(world, layers=1)
        points = [point for name in parsed.only for point in try_command(world, name, parsed.faults, parsed.every)]
    print(summary(points))
    if parsed.out:
        write_json(parsed.out, {"points": [point._asdict() for point in points]})


if __name__ == "__main__":
    main()

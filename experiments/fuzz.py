"""Damaged input files and strange options: does each end in the right numbers or in one sentence?

    python -m experiments.fuzz                         # 10,000 cases, about 15 minutes on one core
    python -m experiments.fuzz --count 500 --only config.json options
    python -m experiments.fuzz --case 1234             # one case again: what was changed, and what was said

Each case is drawn from its number: a file that some command reads, a mistake in it (`fuzz_mistakes.py`) or an option's
value, and a command, which then runs in a process of its own (`children.py`) with ten seconds and 1 GiB. It may

    same       succeed, with the result of the undamaged files
    changed    succeed with another result, where the mistake may be meant: another weight, text or usual number
    refused    refuse: status 2, one printable sentence of at most 500 characters that names the file or the option,
               and nothing written

All else is a fault: `traceback`, `hang`, `memory`, `killed`; a message that is `long`, `unprintable` or `unclear`
(names nothing); `written` although refused; `nonfinite` numbers, `silent` success where there should be none, and
`different` numbers for no reason. Counts are printed by file; --out takes every faulty case, with the last place in lfu
of its traceback.
"""

import argparse
import json
import math
import re
import shutil
import signal
import tempfile
from collections import Counter
from dataclasses import fields
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from experiments.children import SCRATCH, Ended, prepare, run
from experiments.fuzz_inputs import BY_RESUMING, OFTEN, READERS, ROWS, arguments, build
from experiments.fuzz_mistakes import NASTY, all_finite, mutate
from experiments.markdown import markdown
from lfu.cli.main import COMMANDS
from lfu.errors import option_name
from lfu.io.files import read_json, sha256, write_json

GOOD = ("same", "changed", "refused")
FAULTS = (
    "traceback", "hang", "memory", "killed", "long", "unprintable", "unclear", "written", "nonfinite", "silent",
    "different",
)  # fmt: skip

# --- one case -------------------------------------------------------------------------------------


class Case(NamedTuple):
    """What is damaged, which command meets it, and what came of it."""

    number: int
    target: str
    command: list[str]
    mistake: str
    outcome: str
    ended: Ended


class Bench(NamedTuple):
    """Where cases are tried, and the results of all commands on undamaged files."""

    world: Path
    place: Path
    results: dict[str, Any]


def prepare_bench(folder: Path) -> Bench:
    """Everything that the cases need; the second run of a command is as fast as they are."""
    prepare()
    build(folder / "world")
    bench = Bench(folder / "world", folder / "case", {})
    commands = {" ".join(command): command for readers in READERS.values() for command in readers}
    for name, command in commands.items():
        set_out(bench, arguments(command))
        ended = run(arguments(command), bench.place)
        if ended.code != 0:
            raise SystemExit(f"lfu {' '.join(arguments(command))} does not work undamaged: {ended.err}")
        bench.results[name] = result(bench.place, ended)
    return bench


def set_out(bench: Bench, typed: list[str]) -> None:
    """Lay out anew the undamaged files that a command names."""
    shutil.rmtree(bench.place, ignore_errors=True)
    unnamed = {entry.name for entry in bench.world.iterdir() if not any(entry.name in word for word in typed)}
    shutil.copytree(bench.world, bench.place, ignore=lambda folder, names: unnamed & set(names))


def draw(number: int) -> tuple[str, list[str], Random]:
    """The target and the command of a case, and the generator that draws its mistake."""
    random = Random(number)
    target = random.choices(list(READERS), [3 if name in OFTEN else 1 for name in READERS])[0]
    return target, random.choice(READERS[target]), random


def try_case(bench: Bench, number: int) -> Case:
    """Damage, run, judge."""
    target, command, random = draw(number)
    typed = arguments(command)
    set_out(bench, typed)
    path = bench.place / target
    if target == "options":
        name, value = draw_option(typed[0], random)
        typed, mistake, named = [*typed, f"--{name}={value}"], f"--{name}={value}", spellings(name, value)
    else:
        mistake = mutate(path, random)
        named = {target.split("/")[0], *re.findall(r"^(\w{8,}) = ", mistake)}  # or the key, as a row meets it
        if target.endswith(".safetensors") and command in BY_RESUMING and random.random() < 0.5:
            mistake += "; its checksum follows" * renew_checksum(path)
    before = listing(bench.place)
    ended = run(typed, bench.place, memory=2**30)
    if ended.code == 0:
        outcome = judge_success(bench, target, command, mistake, ended)
    else:
        written = listing(bench.place) != before and not has_progress(bench.place)
        outcome = judge_failure(ended, named, written)
    return Case(number, target, command, mistake, outcome, ended)


VALUES = [
    "-1", "0", "1", "0.5", "1e400", "nan", "inf", "-inf", "1e30", "1e-320", "1" + "0" * 30, "9" * 5000, "caf\udce9",
    "1-1000000000", "1-", "base-m", "rows-d.jsonl", "hpu", "mps", "xla", "cuda:99", "float64", "float16",
    *(text for text in NASTY if "\0" not in text and len(text) < 100_000),
]  # fmt: skip
WHERE = ["", "/dev/null", "/dev/null/x", "rows-d.jsonl", "base-m", "x" * 300, "a\nb", "\x1b[31mred", "caf\udce9"]


def draw_option(command: str, random: Random) -> tuple[str, str]:
    """An option of the command and a value for it; none that would rightly take for ever, or write elsewhere."""
    options = [each for each in fields(COMMANDS[command][0]) if "bool" not in str(each.type) and each.name != "epochs"]
    name = random.choice(options).name
    values = WHERE if name == "out" else VALUES
    if name == "max_new_tokens":
        values = [value for value in values if not value.isdigit()]
    return option_name(name), random.choice(values)


def spellings(name: str, value: str) -> set[str]:
    """What a message may say to name an option: itself, or the beginning of its value, as it is or escaped."""
    return {name, value[:20], ascii(value)[1:-1][:20]} if value else {name}


def renew_checksum(path: Path) -> bool:
    """Let state.json agree with a damaged tensor file; whether there is still a file."""
    if not path.is_file() or path.is_symlink():
        return False
    state = read_json(path.parent / "state.json")
    state["sha256"][path.name] = sha256(path)
    write_json(path.parent / "state.json", state)
    return True


def listing(folder: Path) -> dict[str, bytes | None]:
    """What is in a folder, by name: the content of files."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() and not path.is_symlink() else None
        for path in folder.rglob("*")
    }


def has_progress(place: Path) -> bool:
    """Whether a run was refused only after a step of it: what it wrote is what it had computed."""
    log = place / "out-o" / "log.jsonl"
    return log.is_file() and log.stat().st_size > 0


# --- what came of it ------------------------------------------------------------------------------

SAID = re.compile(r"(?:^|[\r\n])lfu(?: \w+)?: (?:error: )?(.*)", re.DOTALL)
EXPECTED = re.compile(r"\r[^\r\n]*|^usage: .*", re.DOTALL)
"""What may stand before a message: a progress bar, and how the command is used."""


def judge_failure(ended: Ended, named: set[str], written: bool) -> str:
    """Of a command that did not succeed."""
    if ended.code == -signal.SIGALRM:
        return "hang"
    said = SAID.search(ended.err)
    if ended.code != 2 or said is None:
        return "memory" if lacks_memory(ended.err) else "killed" if ended.code < 0 else "traceback"
    message, noise = said[1].removesuffix("\n"), EXPECTED.sub("", ended.err[: said.start()])
    if written:
        return "written"
    if len(noise + message) > 500:
        return "long"
    if not message.isprintable():
        return "unprintable"
    if not any(name in message for name in named):
        return "memory" if lacks_memory(message) else "unclear"
    return "refused"


def lacks_memory(text: str) -> bool:
    return re.search(r"MemoryError|allocat|[Oo]ut of memory", text) is not None


def judge_success(bench: Bench, target: str, command: list[str], mistake: str, ended: Ended) -> str:
    """Of a command that succeeded: whether it should have, and its numbers."""
    path = bench.place / target
    found = result(bench.place, ended)
    poisoned = path.suffix == ".safetensors" and path.is_file() and not all_finite(path.read_bytes())
    if poisoned or "leaves the folder" in mistake:
        return "silent"
    if not finite(found):
        return "nonfinite"
    if found == bench.results[" ".join(command)]:
        return "same"
    told = Path(target).name in ended.out + ended.err and target != ROWS
    return "changed" if told or may_change(bench.world / target, path, mistake) else "different"


def result(place: Path, ended: Ended) -> dict[str, Any]:
    """All that a command computed: what it printed, tensors, predictions, and which steps were logged."""
    found: dict[str, Any] = {"printed": ended.out}
    for out in (place / "out-o", place / "run-r"):
        for path in [out] if out.is_file() else sorted(out.rglob("*")):
            name = str(path.relative_to(place))
            if path.suffix == ".safetensors":
                found[name] = path.read_bytes()
            elif path.name == "log.jsonl" and path.is_file():
                found[name] = re.findall(r'"step": (\d+)', path.read_text(errors="replace"))
            elif path == out and path.is_file():
                found[name] = path.read_bytes()
    return found


def finite(found: dict[str, Any]) -> bool:
    """Whether no number of a result is infinite or none at all."""
    return not any(
        (name == "printed" and re.search(r"\b(?:nan|inf)\b", value))
        or (name.endswith(".safetensors") and not all_finite(value))
        or (name == "out-o" and re.search(rb"\b(?:NaN|Infinity)\b", value))
        for name, value in found.items()
    )


def may_change(before: Path, after: Path, mistake: str) -> bool:
    """Whether a mistake may be meant: another text, weight, or number of the same kind, but nothing of a run that goes
    on, no key that is there twice, and nothing else under a file's name."""
    if before.name == "options" or mistake == "not there":
        return True
    if mistake == "rms_norm_eps deleted":  # then it is transformers' default
        return True
    if not after.is_file() or "twice" in mistake or ("run-r" in before.parts and "checksum" not in mistake):
        return False
    if before.suffix != ".json" or before.name == "tokenizer.json":
        return True
    try:
        return meant(json.loads(before.read_text()), json.loads(after.read_text(encoding="utf-8")))
    except (ValueError, RecursionError):
        return False


def meant(before: Any, after: Any) -> bool:
    """Whether two JSON values differ in texts, truth values and usual numbers alone."""
    if isinstance(before, dict) and isinstance(after, dict) and before.keys() == after.keys():
        return all(meant(before[key], after[key]) for key in before)
    if type(before) in (int, float) and type(after) in (int, float):
        return before == after or 0 < after < math.inf
    return before == after or (type(before) is type(after) and isinstance(before, str | bool))


# --- many cases -----------------------------------------------------------------------------------


def run_cases(bench: Bench, first: int, count: int, only: list[str]) -> list[Case]:
    """`count` cases from number `first` on; Ctrl-C ends them early."""
    cases: list[Case] = []
    number = first
    try:
        while len(cases) < count:
            if not only or any(each in draw(number)[0] for each in only):
                cases.append(try_case(bench, number))
            number += 1
    except KeyboardInterrupt:
        pass
    return cases


def summary(cases: list[Case]) -> str:
    """Counts by file and outcome, as a table."""
    counts = Counter((case.target, case.outcome) for case in cases)
    shown = [outcome for outcome in (*GOOD, *FAULTS) if any(each == outcome for _, each in counts)]
    rows = [[target, *(str(counts[target, outcome] or "") for outcome in shown)] for target in READERS]
    total = ["all", *(str(sum(case.outcome == outcome for case in cases)) for outcome in shown)]
    return markdown(["file", *shown], [*(row for row in rows if any(row[1:])), total])


def record(case: Case) -> dict[str, Any]:
    """A case as it is kept."""
    places = re.findall(r'File "[^"]*/(lfu/[^"]+)", line (\d+), in (\w+)', case.ended.err)
    return {
        "case": case.number, "file": case.target, "command": " ".join(case.command), "mistake": case.mistake[:300],
        "outcome": case.outcome, "status": case.ended.code, "where": ":".join(places[-1]) if places else "",
        "said": case.ended.err[:300] + " ... " + case.ended.err[-300:] if len(case.ended.err) > 600 else case.ended.err,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000, help="how many cases")
    parser.add_argument("--seed", type=int, default=0, help="the first case is number SEED * 1,000,000")
    parser.add_argument("--only", nargs="+", default=[], help="only files whose name holds one of these, or options")
    parser.add_argument("--case", type=int, help="only the case of this number, and all that it says")
    parser.add_argument("--out", type=Path, help="JSON file for the faulty cases")
    parsed = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=SCRATCH) as folder:
        bench = prepare_bench(Path(folder))
        if parsed.case is not None:
            print(json.dumps(record(try_case(bench, parsed.case)), indent=2))
            return
        cases = run_cases(bench, parsed.seed * 10**6, parsed.count, parsed.only)
    print(summary(cases))
    faulty = [record(case) for case in cases if case.outcome not in GOOD]
    print(f"{len(faulty)} faults in {len(cases)} cases.")
    if parsed.out:
        parsed.out.write_text(
            json.dumps({"cases": len(cases), "faults": faulty}, indent=2)
        )  # ASCII, for half characters


if __name__ == "__main__":
    main()

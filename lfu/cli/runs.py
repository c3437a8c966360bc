"""`lfu runs`: the runs in a folder, with what sets them apart and how far they are. Read next: `bench.py`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lfu.checkpoints import MAY_CHANGE, checkpoints
from lfu.cli.options import Options, StrPath, option
from lfu.errors import InputError, option_name
from lfu.io.files import read_json
from lfu.runs import is_locked, read_log
from lfu.validation import best

SAID_APART = ("method", "model_fingerprint", "data_sha256", "valid_sha256", "adapter_sha256", "lfu", "torch")
"""Settings that have a column of their own, or would say nothing."""


@dataclass(frozen=True, kw_only=True)
class RunsOptions(Options):
    folder: StrPath = option("folder that holds runs, or is one", positional=True)


def runs(options: RunsOptions) -> list[dict[str, str]]:
    """Print a line for each run, and return them: name, method, state, step, losses, and the settings that differ."""
    folder = Path(options.folder)
    found = sorted(path.parent for pattern in ("settings.json", "*/settings.json") for path in folder.glob(pattern))
    if not found:
        raise InputError(f"{folder} holds no runs: no folder in it has a settings.json.")
    settings = [read_json(run / "settings.json") for run in found]
    lines = [describe(run, each) | differing(each, settings) for run, each in zip(found, settings)]
    print_columns(lines)
    return lines


def describe(run: Path, settings: dict[str, Any]) -> dict[str, str]:
    """How far a run is, and what it found."""
    log = read_log(run / "log.jsonl")
    history = [(line["step"], line["valid"]) for line in log if "valid" in line]
    steps = [line for line in log if "sft" in line]
    step, lowest = best(history) if history else (0, 0.0)
    return {
        "run": run.name,
        "method": str(settings.get("method", "-")),
        "state": state_of(run),
        "step": str(steps[-1]["step"]) if steps else "-",
        "loss": f"{steps[-1]['sft']:.4f}" if steps else "-",
        "valid": f"{history[-1][1]:.4f}" if history else "-",
        "best": f"{lowest:.4f} (step {step})" if history else "-",
    }


def state_of(run: Path) -> str:
    """What can be done with a run."""
    if is_locked(run):
        return "running"
    if (run / "adapter" / "adapter_config.json").is_file():
        return "finished"
    return "resumable" if checkpoints(run) else "no checkpoint yet"


def differing(own: dict[str, Any], all_settings: list[dict[str, Any]]) -> dict[str, str]:
    """The settings of a run that another one has otherwise."""
    names = [name for name in own if name not in (*MAY_CHANGE, *SAID_APART)]
    return {
        option_name(name): str(own[name])
        for name in names
        if any(other.get(name) != own[name] for other in all_settings)
    }


def print_columns(lines: list[dict[str, str]]) -> None:
    names = list(dict.fromkeys(name for line in lines for name in line))
    rows = [names, *([line.get(name, "-") for name in names] for line in lines)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())

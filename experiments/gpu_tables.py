"""What the parts of `gpu.py` share: one call of the command, and the tables that it fills."""

import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch

from experiments.markdown import markdown
from lfu.errors import option_name
from lfu.io.files import read_json, write_json

LIMITS = {"right": 60, "steps": 155, "profile": 50, "decoding": 65, "real": 150}
"""Seconds of each part where all are run."""
SECONDS = sum(LIMITS.values())
"""What the parts that are run share."""


class Run(NamedTuple):
    """One call of the command."""

    out: Path
    device: torch.device
    small: bool
    model: Path | None
    gsm8k: Path | None
    wikitext: Path | None
    micro_batch_size: int
    until: float  # the time at which this part is stopped


class Table(NamedTuple):
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def command(part: str, small: bool, **options: object) -> list[str]:
    """What starts one part, or one run of it, as a process of its own."""
    given = [f"--{option_name(name)}={value}" for name, value in options.items() if value is not None]
    if small:
        given.append("--small")
    return [sys.executable, "-m", "experiments.gpu", f"--part={part}", *given]


def save(run: Run, part: str, title: str, table: Table) -> None:
    """Print a table and add it to DIR/results.json and DIR/results.md."""
    path = run.out / "results.json"
    tables = read_json(path)["tables"] if path.is_file() else []
    tables.append({"part": part, "title": title, **table._asdict()})
    write_json(path, {"machine": machine(run.device), "tables": tables})
    parts = [f"## {title}", markdown(table.head, table.rows), table.note, machine(run.device)]
    tell(run.out, "\n\n".join(filter(None, parts)))


def page(data: dict[str, Any]) -> str:
    """All tables of DIR/results.json."""
    tables = [(f"## {each['title']}", markdown(each["head"], each["rows"]), each["note"]) for each in data["tables"]]
    return "\n\n".join("\n\n".join(filter(None, table)) for table in tables) + "\n"


def machine(device: torch.device) -> str:
    """The date, the card and the versions that a table was made with."""
    cuda = device.type == "cuda"
    card = torch.cuda.get_device_name(device) if cuda else f"{device.type}, {torch.get_num_threads()} threads"
    return f"{date.today().isoformat()}, {card}, torch {torch.__version__}."


def tell(out: Path, text: str) -> None:
    """Print, and add to DIR/results.md."""
    print(text, end="\n\n", flush=True)
    with (out / "results.md").open("a", encoding="utf-8") as file:
        file.write(f"{text}\n\n")

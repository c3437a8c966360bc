"""What the parts of `gpu.py` share: one call of the command, and the tables that it fills."""

from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import NamedTuple

import torch

from experiments.markdown import markdown
from lfu.io.files import read_json, write_json

RANK, SCALE, ALPHA, LAM = 8, 2.0, 0.1, 5.0
NAMES = ("sft", "lfu-lora", "lfu-reps")
LIMITS = {"right": 75, "steps": 130, "profile": 40, "decoding": 40, "real": 190}
"""Seconds of each part."""


class Run(NamedTuple):
    """One call of the command."""

    out: Path
    device: torch.device
    small: bool
    model: Path | None
    gsm8k: Path | None
    wikitext: Path | None
    micro_batch_size: int


def save(run: Run, part: str, title: str, head: Sequence[str], rows: Sequence[Sequence[str]], note: str = "") -> None:
    """Print a table and add it to DIR/results.json and DIR/results.md."""
    path = run.out / "results.json"
    tables = read_json(path)["tables"] if path.is_file() else []
    table = {"part": part, "title": title, "head": [*head], "rows": [[*row] for row in rows], "note": note}
    write_json(path, {"machine": machine(run.device), "tables": [*tables, table]})
    tell(run.out, "\n\n".join([f"## {title}", markdown(head, rows), *([note] if note else []), machine(run.device)]))


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

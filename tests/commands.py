"""What the tests of the command share: how it is typed, the rows it reads, and what it leaves behind and says."""

import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from lfu import generate as generating
from lfu.checkpoints import checkpoints
from lfu.cli import command_parsers, main, parser

MINI = Path(__file__).parents[1] / "weights" / "mini"


def lfu(command: str, **options: Any) -> int:
    return main([command, *flags(**options)])


def flags(**options: Any) -> list[str]:
    """Options as they are typed: save_every=2 is --save-every 2, drop=True is --drop, and None is nothing."""
    typed = []
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        if value is True or value is False:
            typed.append(flag if value else flag.replace("--", "--no-"))
        elif value is not None:
            typed += [flag, str(value)]
    return typed


def subcommands() -> Any:
    return command_parsers(parser())


def environment() -> dict[str, str]:
    """For a process of its own: one thread, and the `lfu` that is tested here, whatever the working directory."""
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


# --- rows -----------------------------------------------------------------------------------------


def sums(count: int, first: int = 1) -> list[dict[str, str]]:
    """Short rows, every one different."""
    return [{"question": f"Compute {n}+{n}.", "answer": f"{2 * n}"} for n in range(first, first + count)]


def uneven_sums(count: int) -> list[dict[str, str]]:
    """The same with answers of different lengths."""
    return [row | {"answer": row["answer"] + " eggs" * (n % 4)} for n, row in enumerate(sums(count, first=0))]


def write_rows(path: Path, rows: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def cut_to(run: Path, out: Path, step: int) -> Path:
    """A copy of a run as it was when only the checkpoints up to `step` had been written."""
    shutil.copytree(run, out)
    shutil.rmtree(out / "adapter")
    for path in checkpoints(out)[step:]:
        shutil.rmtree(path)
    return out


# --- what it did ----------------------------------------------------------------------------------


def refusal(capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence that was printed."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lfu: ")]
    assert len(lines) == 1
    return lines[0].removeprefix("lfu: ")


def asked_for(monkeypatch: pytest.MonkeyPatch) -> tuple[list[list[int]], list[Sequence[str]]]:
    """The prompts that generation is given from now on, and at each call the strings that it is to stop at."""
    prompts, stops, generate = [], [], generating.generate

    def noting(config: Any, base: Any, tokenizer: Any, asked: list[list[int]], *rest: Any, **options: Any) -> Any:
        prompts.extend(asked)
        stops.append(options["stop"])
        return generate(config, base, tokenizer, asked, *rest, **options)

    monkeypatch.setattr(generating, "generate", noting)
    return prompts, stops

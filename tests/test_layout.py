"""Imports run downwards only, by room and by file, so every file can be read with what stands below it alone."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = [
    "errors", "io", "distributed", "data", "half", "model", "lora", "steering", "loss", "remat", "schedule", "train",
    "generate", "baselines", "methods", "evaluation", "profiling", "validation", "checkpoints", "runs", "cli",
    "__init__",
]  # fmt: skip
"""From the ground up. A room may import itself and those before it."""


def module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


LFU, EXPERIMENTS = ({module(path): path for path in (ROOT / name).rglob("*.py")} for name in ("lfu", "experiments"))


def imports(path: Path, files: dict[str, Path]) -> set[str]:
    """Which of these files a file imports, wherever in it, also for types alone."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.ImportFrom)]
    named = {f"{node.module}.{alias.name}" for node in nodes for alias in node.names}
    found = named | {str(node.module) for node in nodes}
    return {name for name in found if name in files and "." in name}


def room(name: str) -> int:
    return ROOMS.index(name.split(".")[1] if "." in name else "__init__")


def test_imports_run_downwards() -> None:
    upwards = [(name, used) for name, path in LFU.items() for used in imports(path, LFU) if room(used) > room(name)]
    assert not upwards
    assert {room(name) for name in LFU} == set(range(len(ROOMS)))
    assert not [name for name, path in LFU.items() if imports(path, EXPERIMENTS)]


@pytest.mark.parametrize("files", [LFU, EXPERIMENTS], ids=["lfu", "experiments"])
def test_no_file_imports_itself_by_a_detour(files: dict[str, Path]) -> None:
    inside = {name: imports(path, files) - {name} for name, path in files.items() if not name.endswith(("cli", "data"))}
    assert len(list(TopologicalSorter(inside).static_order())) >= len(inside)

"""Imports run downwards only, by room and by file, so every file can be read with what stands below it alone."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

LFU = Path(__file__).parents[1] / "lfu"
ROOMS = [
    "errors", "io", "distributed", "data", "half", "model", "lora", "steering", "loss", "remat", "schedule", "train",
    "generate", "baselines", "methods", "evaluation", "profiling", "runs", "cli", "__init__",
]  # fmt: skip
"""From the ground up. A room may import itself and those before it."""


def module(path: Path) -> str:
    return ".".join(path.relative_to(LFU.parent).with_suffix("").parts).removesuffix(".__init__")


FILES = {module(path): path for path in LFU.rglob("*.py")}


def imports(path: Path) -> set[str]:
    """The files of lfu that a file imports, wherever in it, also for types alone."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.ImportFrom)]
    named = {f"{node.module}.{alias.name}" for node in nodes for alias in node.names}
    found = named | {str(node.module) for node in nodes}
    return {name for name in found if name in FILES and name != "lfu"}


def room(name: str) -> int:
    return ROOMS.index(name.split(".")[1] if "." in name else "__init__")


def test_imports_run_downwards() -> None:
    upwards = [(name, used) for name, path in FILES.items() for used in imports(path) if room(used) > room(name)]
    assert not upwards
    assert {room(name) for name in FILES} == set(range(len(ROOMS)))


def test_no_file_imports_itself_by_a_detour() -> None:
    inside = {name: imports(path) - {name} for name, path in FILES.items() if not name.endswith(("cli", "data"))}
    assert len(list(TopologicalSorter(inside).static_order())) >= len(inside)

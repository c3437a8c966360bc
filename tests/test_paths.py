"""A path is a str or a Path, in every function and in every command's options: with the same result."""

from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import MINI, sums, write_rows
from test_cli import REQUIRED
from torch.utils._pytree import tree_leaves

import lfu
from lfu import cli, lora
from lfu.cli.main import COMMANDS

PATHS = {"model", "data", "valid", "shots_data", "adapter", "out", "folder", "runs"}
HOW: dict[str, Any] = {"template": "plain", "method": "sft", "rank": 2, "epochs": 1, "batch_size": 2}
Typed = Callable[[str], Any]
KINDS: dict[str, Typed] = {"str": str, "Path": Path}


@pytest.mark.parametrize("name", COMMANDS)
def test_options_hold_text(name: str) -> None:
    options = COMMANDS[name].options
    known = {each.name for each in fields(options)} & PATHS
    given = dict.fromkeys(known, "a/b") | REQUIRED[name]
    typed = {key: [*map(Path, given[key])] if key == "runs" else Path(given[key]) for key in known}
    assert asdict(options(**given | typed)) == asdict(options(**given))


def written() -> dict[str, bytes]:
    """The files in the working folder, but for logs, which have times in them."""
    return {str(path): path.read_bytes() for path in Path().rglob("*") if path.is_file() and path.name != "log.jsonl"}


def run_commands(kind: Typed) -> list[Any]:
    """Every command that reads or writes files, in the working folder; what they return, and the files."""
    model, data = kind(str(MINI)), kind(str(write_rows(Path("rows.jsonl"), sums(4))))
    run, adapter, scored = kind("run"), kind("run/adapter"), kind("scored.jsonl")
    asked = {"model": model, "adapter": adapter, "max_new_tokens": 2}
    found = [
        cli.train(cli.TrainOptions(model=model, data=data, valid=data, out=run, **HOW)),
        cli.train(cli.TrainOptions(model=model, data=data, adapter=adapter, out=kind("more"), **HOW)),
        cli.evaluate(cli.EvalOptions(**asked, data=data, out=scored, generate=True)),
        cli.evaluate(
            cli.EvalOptions(model=model, data=data, prompt="harness", shots=1, shots_data=data, max_new_tokens=2)
        ),
        cli.generate(cli.GenerateOptions(**asked, question="Why?")),
        cli.merge(cli.MergeOptions(model=model, adapter=adapter, out=kind("merged"))),
        cli.distill(cli.DistillOptions(model=model, data=data, out=kind("new.jsonl"), max_new_tokens=2)),
        cli.plot(cli.PlotOptions(runs=[run, kind("more")], out=kind("curves.svg"))),
        cli.runs(cli.RunsOptions(folder=kind("."))),
    ]
    return [found, written()]


def use_functions(kind: Typed) -> list[Any]:
    """Every function that a notebook calls with a path."""
    data = kind(str(write_rows(Path("rows.jsonl"), sums(4))))
    config, base = lfu.load(kind(str(MINI)))
    tokenizer, rows = lfu.load_tokenizer(kind(str(MINI)), config.vocab_size), lfu.read_rows(data)
    examples, dropped = lfu.encode_rows(data, rows, tokenizer, lfu.Format("question"))
    adapter = lfu.init(config, 2, generator=torch.Generator().manual_seed(0)), 2.0
    method, _ = lfu.bind("sft", config, scale=2.0)
    out = lfu.train_run(kind("run"), config, base, adapter, examples, method, lfu.Settings(epochs=1))
    Path("saved").mkdir()
    lfu.save(kind("saved"), adapter, base=kind(str(MINI)))
    loaded, scale = lora.load(kind("saved"), config)
    same = all(map(torch.equal, tree_leaves(loaded), tree_leaves(adapter[0])))
    return [rows, examples, dropped, out, scale, same, written()]


@pytest.mark.parametrize("use", [run_commands, use_functions])
def test_a_path_is_a_text_or_a_path(
    use: Callable[[Typed], list[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for name, kind in KINDS.items():
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        results.append(use(kind))
    assert results[0] == results[1]

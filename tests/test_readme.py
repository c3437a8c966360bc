"""What the README and docs/cli.md tell a reader to type works, and the minutes and GiB follow from their source."""

import ast
import json
import re
import shlex
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
from commands import MINI, subcommands
from mutants.table import MUTANTS

from lfu.cli import main, parser

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CLI = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
manual = pytest.mark.parametrize("text", [README, CLI], ids=["README.md", "cli.md"])


# --- commands -------------------------------------------------------------------------------------


def typed(text: str) -> list[str]:
    """The commands of a page: its indented lines, joined where one goes on in the next."""
    text = re.sub(r"```.*?```", "", re.sub(r"\\\n\s*", "", text), flags=re.DOTALL)
    return re.findall(r"^    (\S.*)", text, re.MULTILINE)


def arguments(command: str) -> list[str]:
    """What a command hands to `lfu`; nothing where it is another program."""
    words = shlex.split(command, comments=True)
    start = words.index("lfu.cli") if "lfu.cli" in words else 0
    return words[start + 1 :] if words[start] in ("lfu", "lfu.cli") else []


@manual
def test_every_command_is_one(text: str) -> None:
    for command in typed(text):
        program, *words = shlex.split(command, comments=True)
        if "=" in program:
            continue
        if program == "make":
            assert f"\n{words[0]}:" in (ROOT / "Makefile").read_text(), command
        elif given := arguments(command):
            parser().parse_args(given)
        else:
            assert program in (".", "curl", "hf", "lm_eval", "pip"), command


@manual
def test_commands_do_not_scroll(text: str) -> None:
    assert not [line for line in re.findall(r"^    .*", text, re.MULTILINE) if len(line) > 104]


@manual
def test_what_stands_within_sentences_is_there_too(text: str) -> None:
    for target in re.findall(r"`make ([\w-]+)", text):
        assert f"\n{target}:" in (ROOT / "Makefile").read_text(), target
    for module in re.findall(r"python -m (experiments[\w.]*)", text):
        assert find_spec(module), module


def test_the_commands_on_the_small_model_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of docs/cli.md with one epoch; then the README's, with that adapter in the place of the demo's."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").symlink_to(MINI.parent)
    own, readme = ([each for each in typed(text) if "weights/mini" in each] for text in (CLI, README))
    assert [arguments(each)[0] for each in (*own, *readme)] == ["train", "eval", "merge", "generate"]
    for command in own:
        assert main(arguments(command) + ["--epochs", "1"] * (" train " in command)) == 0
    shutil.copytree("runs/mini", "runs/demo/lfu-lora-0.5")
    capsys.readouterr()
    assert main(arguments(*readme)) == 0
    assert "Selin has" in capsys.readouterr().out
    bare = ["generate", "--model", "weights/mini", "--template", "question"]
    assert main([*bare, *arguments(*readme)[-2:]]) == 0
    assert "#### 16" in capsys.readouterr().out


def unknown_options(text: str) -> list[str]:
    """What a page types after `lfu COMMAND`, on one line, and the command does not take."""
    parsers = subcommands()
    commands = re.findall(r"\blfu(?:\.cli)? (\w+)\s(--[^`|;#\n]*)", re.sub(r"\\\n\s*", "", text))
    options = [(name, option) for name, rest in commands for option in re.findall(r"--[a-z][a-z-]*", rest)]
    return [f"{name} {option}" for name, option in options if option not in parsers[name]._option_string_actions]


@page
def test_commands_have_these_options(page: Path) -> None:
    assert not unknown_options(page.read_text(encoding="utf-8"))


def test_an_option_that_is_not_would_be_seen() -> None:
    text = "    lfu train --model M --data D \\\n        --lambda 5 --colour red\n"
    assert unknown_options(text) == ["train --colour"]


@manual
def test_every_option_that_is_named_is_one(text: str) -> None:
    """Also in tables and sentences, where no command stands in front."""
    others = {"--help", "--index-url", "--nproc-per-node", "--quick", "--tasks"}  # pip, torchrun, experiments, lm_eval
    known = others.union(*(each._option_string_actions for each in subcommands().values()))
    assert not set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL))) - known


def test_the_manual_has_every_command() -> None:
    assert not [name for name in subcommands() if f"`{name}`" not in CLI]


# --- Python ---------------------------------------------------------------------------------------


def python(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_the_example_trains(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    code = python(CLI)[-1]
    exec(compile(code, "cli.md", "exec"), {})
    losses = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 6
    assert losses[-1] < losses[0] - 0.1


def test_the_screen_calls_what_the_gradient_calls() -> None:
    """The method in one screen, abridged: nothing in it that `lfu_gradient` does not do."""
    (screen,) = python(README)
    source = (ROOT / "lfu" / "train.py").read_text(encoding="utf-8")
    calls = [each.func for each in ast.walk(ast.parse(screen)) if isinstance(each, ast.Call)]
    names = {each.id for each in calls if isinstance(each, ast.Name)}
    assert len(names) > 10
    assert not [name for name in names if not re.search(rf"\b{name}\b", source)]


# --- numbers and files ----------------------------------------------------------------------------


def test_the_mistakes_are_counted() -> None:
    assert f"{len(MUTANTS)} mistakes" in " ".join(README.split())


def test_minutes_and_gib_follow_from_the_measured_steps() -> None:
    """Three epochs: 1,404 steps of 4 micro-batches, the longest of 4 x 560 tokens. Weights and LoRA take 15.3 GiB."""
    tables = {table["title"]: table for table in json.loads((ROOT / "docs" / "gpu.json").read_text())["tables"]}
    short, long = (
        {row[0]: dict(zip(table["head"], row)) for row in table["rows"]}
        for table in (tables[f"A step at the shape of Llama-3.1-8B, {size} tokens"] for size in ("4 x 256", "2 x 1024"))
    )
    rows = re.findall(r"^\| `([\w-]+)` \| [\d.]+ \| (.*) \| (.*) \| (.*) \| (.*) \|$", README, re.M)
    assert [name for name, *_ in rows] == ["sft", "lfu-lora", "lfu-reps"]
    for name, *printed in rows:
        steps = [name, f"{name} --remat"]
        minutes = [1404 * 4 * float(short[step]["ms"]) / 6e4 for step in steps]
        peaks = [(float(short[step]["peak GiB"]), float(long[step]["peak GiB"])) for step in steps]
        gib = [15.3 + less + (more - less) * (4 * 560 - 1024) / 1024 for less, more in peaks]
        assert printed == [f"{each:.0f}" for each in (*minutes, *gib)]


def test_the_code_map_has_every_file() -> None:
    text = (ROOT / "docs" / "code-map.md").read_text(encoding="utf-8")
    assert not [path for path in (ROOT / "lfu").rglob("*.py") if f"](../{path.relative_to(ROOT)})" not in text]

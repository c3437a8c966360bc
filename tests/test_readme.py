"""The README's Python lines run as they stand, the code map is whole, and no page gives an option that is not."""

import re
from pathlib import Path

import pytest
from commands import subcommands
from mutants.table import MUTANTS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def test_the_python_example_trains(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    losses = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 6
    assert losses[-1] < losses[0] - 0.1


def test_the_code_map_has_every_file() -> None:
    text = (ROOT / "docs" / "code-map.md").read_text(encoding="utf-8")
    assert not [path for path in (ROOT / "lfu").rglob("*.py") if f"](../{path.relative_to(ROOT)})" not in text]


def test_the_mistakes_are_counted() -> None:
    assert f"{len(MUTANTS)} mistakes" in README


@page
def test_links_lead_to_files(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / link).exists(), link


def unknown_options(text: str) -> list[str]:
    """What a page types after `lfu COMMAND`, on one line, and the command does not take."""
    parsers = subcommands()
    commands = re.findall(r"\blfu(?:\.cli)? (\w+)\s(--[^`|;#\n]*)", re.sub(r"\\\n\s*", "", text))
    options = [(name, option) for name, rest in commands for option in re.findall(r"--[a-z][a-z-]*", rest)]
    return [f"{name} {option}" for name, option in options if option not in parsers[name]._option_string_actions]


@page
def test_commands_have_these_options(page: Path) -> None:
    assert not unknown_options(page.read_text(encoding="utf-8"))


def test_every_option_that_the_readme_names_is_one() -> None:
    """Also in its tables and sentences, where no command stands in front."""
    # Of pip, torchrun, the experiments and lm_eval.
    others = {"--index-url", "--nproc-per-node", "--quick", "--rows", "--tasks"}
    known = others.union(*(each._option_string_actions for each in subcommands().values()))
    assert not set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", README)) - known


def test_an_option_that_is_not_would_be_seen() -> None:
    text = "    lfu train --model M --data D \\\n        --lambda 5 --colour red\n"
    assert unknown_options(text) == ["train --colour"]

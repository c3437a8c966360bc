"""The README's Python lines run as they stand, its table of files is true, and no page gives an option that is not."""

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


def lines_of(*files: Path) -> int:
    return sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)


def test_the_line_counts_are_about_right() -> None:
    told = {name: int(count) for name, count in re.findall(r"\| \[(\w+\.py)\]\(lfu/\w+\.py\) \| (\d+) \|", README)}
    assert told.keys() == {file.name for file in (ROOT / "lfu").glob("*.py")} - {"__init__.py"}
    verbs = sorted((ROOT / "lfu" / "verbs").glob("*.py"))
    ((together, train, evaluate),) = re.findall(r"\| (\d+) \|.*train is (\d+) lines, evaluate (\d+) \|", README)
    counts = [(told[name], lines_of(ROOT / "lfu" / name)) for name in told] + [
        (int(together), lines_of(*verbs)),
        (int(train), lines_of(ROOT / "lfu" / "verbs" / "train.py")),
        (int(evaluate), lines_of(ROOT / "lfu" / "verbs" / "evaluate.py")),
    ]
    assert not [(said, found) for said, found in counts if abs(said - found) > 5 + 0.03 * found]


def test_the_mistakes_are_counted() -> None:
    assert f"{len(MUTANTS)} mistakes" in README


@page
def test_links_lead_to_files(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / link).exists(), link


def unknown_options(text: str) -> list[str]:
    """What a page types after `lfu VERB`, within one command, and the verb does not take."""
    verbs = subcommands()
    commands = re.findall(r"\blfu(?:\.cli)? (\w+)\s(--[^`|;#\n]*)", re.sub(r"\\\n\s*", "", text))
    options = [(verb, option) for verb, rest in commands for option in re.findall(r"--[a-z][a-z-]*", rest)]
    return [f"{verb} {option}" for verb, option in options if option not in verbs[verb]._option_string_actions]


@page
def test_commands_have_these_options(page: Path) -> None:
    assert not unknown_options(page.read_text(encoding="utf-8"))


def test_every_option_that_the_readme_names_is_one() -> None:
    """Also in its tables and sentences, where no verb stands in front."""
    # Of pip, torchrun, the experiments and lm_eval.
    others = {"--index-url", "--nproc-per-node", "--quick", "--rows", "--tasks"}
    known = others.union(*(verb._option_string_actions for verb in subcommands().values()))
    assert not set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", README)) - known


def test_an_option_that_is_not_would_be_seen() -> None:
    text = "    lfu train --model M --data D \\\n        --lambda 5 --colour red\n"
    assert unknown_options(text) == ["train --colour"]

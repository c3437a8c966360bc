"""The written-out algorithms of `experiments/differences.py` are the project's, and their differences are all listed.

With nothing changed they compute what `lfu-lora` and `lfu-reps` compute; with everything changed at once, what
`released-lora` and `released-reps` compute. So no difference between the two is missing from the list.
"""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from compare import distance

from experiments import differences
from experiments.differences import MICRO_BATCH, Case, Found, by_method, lora_variant, low, reps_variant
from lfu.baselines import released
from lfu.data.rows import read_rows
from lfu.data.tokens import Format, encode_row, load_tokenizer
from lfu.io.config import read_config
from lfu.train import adamw, train

ROOT = Path(__file__).parents[1]

CLOSE = 1e-3
"""Relative error in float32 of what rests on small differences. Measured: at most 7e-5, for steering."""


@cache
def case() -> Case:
    """The miniature model, with a task LoRA that has moved away from its start."""
    folder = ROOT / "weights" / "mini"
    tokenizer = load_tokenizer(folder, read_config(folder / "config.json").vocab_size)
    rows = read_rows(folder / "math" / "train.jsonl")[:16]
    case = differences.load_case(folder, None, [encode_row(tokenizer, Format("question"), row) for row in rows])
    settings = differences.Settings(epochs=2, batch_size=8, learning_rate=1e-2)
    method, _ = differences.methods.bind("sft", case.config, scale=differences.SCALE)
    list(train(case.config, case.base, case.task, adamw(case.task, settings), case.examples, method, settings))
    return case


def assert_same(found: Found, expected: Found) -> None:
    for mine, theirs in zip(found, expected):
        assert distance(mine, theirs) < CLOSE


@pytest.mark.parametrize("variant, name", [(lora_variant, "lfu-lora"), (reps_variant, "lfu-reps")])
def test_unchanged_it_is_the_papers_algorithm(variant, name: str) -> None:
    assert_same(variant(case()), by_method(case(), name))


@pytest.mark.parametrize(
    "module, name", [("train", "lfu-lora"), ("train", "lfu-reps"), ("baselines.released", "released-lora")]
)
def test_bfloat16_throughout_has_no_difference_exact_pass(module: str, name: str, monkeypatch) -> None:
    def exact(record: Any) -> None:
        raise AssertionError("the perturbed pass is difference-exact")

    monkeypatch.setattr(f"lfu.{module}.relative_to", exact)
    with pytest.raises(AssertionError, match="difference-exact"):
        by_method(case(), name)
    assert low(case(), name).whole.isfinite().all()


def test_all_changes_together_are_the_released_lora() -> None:
    second = released.second_batch(case().examples[MICRO_BATCH:], case().batch, torch.Generator().manual_seed(1))
    found = lora_variant(case(), moved="task", ascent_on=second, states=released.states, mask=differences.answer)
    assert_same(found, by_method(case(), "released-lora"))


def test_all_changes_together_are_the_released_reps() -> None:
    config, *_, examples, batch, _ = case()
    generator = torch.Generator().manual_seed(1)
    second = released.padded(released.second_batch(examples[MICRO_BATCH:], batch, generator))
    vectors = released.new_state(config, generator, torch.float32)["vectors"]
    found = reps_variant(
        case()._replace(batch=released.padded(batch)), vectors=vectors, turned=True, trained="clean",
        perturbed_on=second, states=released.states, mask=differences.answer,
    )  # fmt: skip
    assert_same(found, by_method(case(), "released-reps"))


def test_a_table_is_printed_and_returned(capsys: pytest.CaptureFixture[str]) -> None:
    x, y = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])
    rows = iter([("reference", lambda: Found(x, x)), ("turned", lambda: Found(y, -x))])
    assert differences.show("T", rows) == {"turned": [(0.0, 2.0), (-1.0, 1.0)]}
    assert "| turned | 0.0000, 2.000 | -1.0000, 1.000 |" in capsys.readouterr().out


@pytest.mark.parametrize("model, column", [("SmolLM2", 4), ("miniature", 5)])
def test_the_page_has_the_stored_numbers(model: str, column: int) -> None:
    """Under the names and in the order that the figure has too."""
    stored = json.loads((ROOT / "docs" / "differences.json").read_text(encoding="utf-8"))[model]
    rows = [row for title, table in stored.items() if title != "about" for row in table.items()]
    page = (ROOT / "docs" / "paper-and-code.md").read_text(encoding="utf-8")
    lines = [line[1:-1].split("|") for line in page.splitlines() if line.count("|") == 7]
    printed = [(cells[0].strip(), cells[column].strip()) for cells in lines if re.search(r"; -?\d", cells[column])]
    assert printed == [(name, as_printed(*pairs)) for name, pairs in rows]


def as_printed(consistency: list[float], whole: list[float]) -> str:
    """Cosine and norm ratio of both gradients; "gone" where there is no consistency term."""
    both = [f"{cosine:.2f}, {ratio:.{2 - (ratio >= 10) - (ratio >= 100)}f}" for cosine, ratio in (consistency, whole)]
    return "; ".join(["gone", both[1]] if consistency == [0.0, 0.0] else both)

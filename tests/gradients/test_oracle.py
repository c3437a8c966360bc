"""Each part of the gradient is the one of the paper's algorithm, written out once more, to the last digits of float64.

The step of lfu is a rearrangement: one pass for the SFT gradient and the ascent direction, one for the consistency.
In `oracle.py` nothing is rearranged. Deliberate errors in the oracle show that the comparison sees what it should.
Read next: `test_transformers.py`.
"""

from typing import Any

import pytest
from compare import distance
from gradients import oracle
from gradients.cases import (
    AUXILIARIES,
    EXACT,
    PARTS,
    SETTINGS,
    batch_of,
    by_oracle,
    case,
    fresh,
    metrics_error,
    oracle_error,
    part,
)
from gradients.decoders import plain
from tiny import KINDS

from lfu.train import lfu_gradient, sft_gradient


@pytest.mark.parametrize("auxiliary", AUXILIARIES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PARTS)
def test_every_part_is_the_oracles(name: str, kind: str, auxiliary: str) -> None:
    assert oracle_error(name, kind, auxiliary) < EXACT


@pytest.mark.parametrize("auxiliary", AUXILIARIES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_metrics_are_the_oracles(kind: str, auxiliary: str) -> None:
    assert metrics_error(kind, auxiliary) < EXACT


@pytest.mark.parametrize("kind", KINDS)
def test_sft_reports_the_loss(kind: str) -> None:
    config, base, task, rows = case(kind)
    _, metrics = sft_gradient(config, base, task, batch_of(rows), scale=SETTINGS["scale"])
    assert float(metrics["sft"]) == pytest.approx(by_oracle(kind, "lora").sft, rel=EXACT)


@pytest.mark.parametrize("auxiliary", AUXILIARIES)
@pytest.mark.parametrize("kind", KINDS)
def test_both_terms_are_there_to_be_compared(kind: str, auxiliary: str) -> None:
    result = by_oracle(kind, auxiliary)
    assert 0.01 < distance(result.gradient, result.sft_gradient) < 10


@pytest.mark.parametrize("auxiliary", AUXILIARIES)
@pytest.mark.parametrize(
    "options",
    [
        {"layers": frozenset({2})},
        {"layers": frozenset({1, 3})},
        {"norm": "sum"},
        {"layers": frozenset({3}), "norm": "sum"},
    ],
)
def test_layers_and_norm_are_the_oracles(options: dict[str, Any], auxiliary: str) -> None:
    assert oracle_error("consistency", "llama31", auxiliary, **options) < EXACT
    assert oracle_error("whole", "llama31", auxiliary, **options) < EXACT
    assert metrics_error("llama31", auxiliary, **options) < EXACT


@pytest.mark.parametrize("auxiliary", AUXILIARIES)
def test_adapters_on_some_layers_only(auxiliary: str) -> None:
    config, base, task, rows = case()
    targets = ("q_proj", "down_proj")
    task = [{name: layer[name] for name in targets} for layer in task]
    aux = fresh(config, auxiliary)
    if auxiliary == "lora":
        aux = [{name: layer[name] for name in targets} for layer in aux]
    gradient, _ = lfu_gradient(config, base, task, aux, batch_of(rows), **SETTINGS)
    expected = oracle.lfu(plain(config, base), task, aux, rows, **SETTINGS)
    assert distance(gradient, expected.gradient) < EXACT


# --- what the comparison sees ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("auxiliary", "wrong"),
    [(aux, wrong) for wrong, concerned in oracle.WRONG.items() for aux in AUXILIARIES if concerned in ("both", aux)],
)
def test_a_deliberate_error(auxiliary: str, wrong: str) -> None:
    # Measured: at least 0.018, ten decades above the tolerance.
    assert oracle_error("whole", "llama31", auxiliary, wrong=wrong) > 1e-3


@pytest.mark.parametrize("auxiliary", AUXILIARIES)
def test_an_undivided_scale(auxiliary: str) -> None:
    mistaken = by_oracle("llama31", auxiliary, scale=4.0)
    assert distance(part("whole", case(), auxiliary), mistaken.gradient) > 1e-2


def test_unshifted_labels_in_the_sft_gradient() -> None:
    assert oracle_error("sft", "llama31", "lora", wrong="labels unshifted") > 1e-2

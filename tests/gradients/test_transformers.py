"""Each part of the gradient is the one that autograd finds in transformers' own model.

The oracle's three passes run over a transformers model; adapters, steering and the reading of h_l hang in it as forward
hooks. Nothing of lfu's decoder takes part, nor of the oracle's. Read next: `test_finite_differences.py`.
"""

from typing import Any

import pytest
from gradients import oracle
from gradients.cases import AUXILIARIES, EXACT, PARTS, metrics_error, oracle_error
from gradients.decoders import exact, hooked, transformers_model
from tiny import KINDS
from torch import Tensor


@pytest.mark.parametrize("auxiliary", AUXILIARIES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PARTS)
def test_every_part_is_that_of_transformers(name: str, kind: str, auxiliary: str) -> None:
    # Measured: 1.1e-13.
    assert oracle_error(name, kind, auxiliary, exact) < EXACT


@pytest.mark.parametrize("auxiliary", AUXILIARIES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_metrics_are_those_of_transformers(kind: str, auxiliary: str) -> None:
    # Measured: 5e-14.
    assert metrics_error(kind, auxiliary, exact) < EXACT


@pytest.mark.parametrize("auxiliary", AUXILIARIES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_transformers_left_as_it_is(kind: str, auxiliary: str) -> None:
    """With norms and softmax in float32, whatever the model's dtype."""
    # Measured: 3.0e-6.
    assert oracle_error("whole", kind, auxiliary, hooked) < 1e-5


# --- what the comparison sees ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("auxiliary", "wrong"),
    [(aux, wrong) for wrong, concerned in oracle.WRONG.items() for aux in AUXILIARIES if concerned in ("both", aux)],
)
def test_a_deliberate_error(auxiliary: str, wrong: str) -> None:
    # Measured: at least 0.018.
    assert oracle_error("whole", "llama31", auxiliary, exact, wrong=wrong) > 1e-3


def normed_last(config: Any, params: Any) -> oracle.Decoder:
    """transformers' decoder whose last state is taken after the final norm, as its own `hidden_states` have it."""
    decoder, norm = hooked(config, params), transformers_model(config, params).model.norm

    def mistaken(*arguments: Any) -> tuple[list[Tensor], Tensor]:
        stream, logits = decoder(*arguments)
        return [*stream[:-1], norm(stream[-1])], logits

    return mistaken


@pytest.mark.parametrize("auxiliary", AUXILIARIES)
def test_a_last_state_behind_the_final_norm(auxiliary: str) -> None:
    # Measured: 2.3 and 3.1.
    assert oracle_error("consistency", "llama31", auxiliary, normed_last) > 1e-3

"""Each part of the gradient is the slope of its loss, with what the paper holds still held still.

The SFT loss and the ascent direction are plain derivatives. In the consistency loss h and the ascended auxiliary
component are constants: here they are computed once, and only the perturbed pass follows θ.
Read next: `second_order.py`, where the auxiliary component follows too.
"""

from collections.abc import Callable

import pytest
from gradients.cases import AUXILIARIES, SETTINGS, ascent, case, part, values
from gradients.finite import FINITE, slope_error
from torch import Tensor

from lfu.lora import Lora
from lfu.loss import answer_mask, consistency_loss


def sft_slope_error() -> float:
    return slope_error(lambda task: values(case(), task, None)[0], case().task, part("sft", case(), "lora"))


def ascent_slope_error(auxiliary: str) -> float:
    aux, gradient, _ = ascent(case(), auxiliary)
    return slope_error(lambda aux: values(case(), case().task, aux)[0], aux, gradient)


def consistency_slope_error(auxiliary: str) -> float:
    return slope_error(frozen_consistency(auxiliary), case().task, part("consistency", case(), auxiliary))


def whole_slope_error(auxiliary: str) -> float:
    consistency, lam = frozen_consistency(auxiliary), SETTINGS["lam"]

    def loss(task: Lora) -> Tensor:
        return values(case(), task, None)[0] + lam * consistency(task)

    return slope_error(loss, case().task, part("whole", case(), auxiliary))


def frozen_consistency(auxiliary: str) -> Callable[[Lora], Tensor]:
    """Eq. 5 as a function of θ, where h and the ascended component stay where they are."""
    moved, mask = ascent(case(), auxiliary).moved, answer_mask(case().batch.labels)
    h = values(case(), case().task, None)[1]
    return lambda task: consistency_loss(h, values(case(), task, moved)[1], mask)


def test_the_sft_gradient_is_the_slope_of_the_loss() -> None:
    assert sft_slope_error() < FINITE


@pytest.mark.parametrize("auxiliary", AUXILIARIES)
def test_the_ascent_direction_is_the_slope_of_the_loss(auxiliary: str) -> None:
    assert ascent_slope_error(auxiliary) < FINITE


@pytest.mark.parametrize("auxiliary", AUXILIARIES)
def test_the_consistency_gradient_is_the_slope_of_the_consistency_loss(auxiliary: str) -> None:
    assert consistency_slope_error(auxiliary) < FINITE


@pytest.mark.parametrize("auxiliary", AUXILIARIES)
def test_the_lfu_gradient_is_the_slope_of_the_whole_loss(auxiliary: str) -> None:
    assert whole_slope_error(auxiliary) < FINITE

"""The gradient of the consistency loss survives bfloat16 weights, at the smallest published step and below.

Read next: `../mutants/table.py`.
"""

from unittest.mock import patch

import pytest
import torch
from compare import cosine, flat
from gradients.cases import AUXILIARIES, batch_of, case, fresh
from torch import Tensor
from torch.utils._pytree import tree_map

from lfu import train
from lfu.model import base_product
from lfu.train import lfu_gradient


def cosine_in_bfloat16(auxiliary: str, alpha: float) -> float:
    """How well the consistency gradient of a bfloat16 model points where that of the same model in float64 points."""
    config, base, task, rows = case("smollm2")
    rounded = tree_map(lambda tensor: None if tensor is None else tensor.bfloat16(), base)
    exact = tree_map(lambda tensor: None if tensor is None else tensor.double(), rounded)
    single = tree_map(Tensor.float, task)
    gradients = []
    for base, task, dtype in (
        (rounded, single, torch.float32),
        (exact, tree_map(Tensor.double, single), torch.float64),
    ):
        aux = tree_map(lambda tensor: tensor.float().to(dtype), fresh(config, auxiliary))  # noqa: B023
        # A heavy weight, so that the SFT gradient can be taken away again without loss.
        with_it, without = (
            lfu_gradient(config, base, task, aux, batch_of(rows), scale=2.0, alpha=alpha, lam=lam)[0]
            for lam in (alpha**-2, 0.0)
        )
        gradients.append(flat(with_it) - flat(without))
    return cosine(*gradients)


@pytest.mark.parametrize("auxiliary", AUXILIARIES)
@pytest.mark.parametrize("alpha", [1e-4, 1e-3, 0.1])
def test_the_consistency_gradient_survives_bfloat16(auxiliary: str, alpha: float) -> None:
    # Measured: 0.9996 and more; 0.998 for the LoRA at α = 0.1, where the ascent direction's own rounding shows.
    assert cosine_in_bfloat16(auxiliary, alpha) > 0.99


@pytest.mark.parametrize("auxiliary", AUXILIARIES)
def test_rounding_both_passes_would_leave_noise(auxiliary: str) -> None:
    with patch.object(train, "relative_to", lambda record: base_product):
        # Measured: -0.6 and -0.2.
        assert cosine_in_bfloat16(auxiliary, 1e-4) < 0.5

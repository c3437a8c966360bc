"""The gradient of the consistency loss survives bfloat16 weights, at the smallest published step and below.

Read next: `../mutants/table.py`.
"""

import pytest
import torch
from compare import cosine, flat
from gradients.cases import AUXILIARIES, batch_of, case, fresh
from torch import Tensor
from torch.utils._pytree import tree_map

from lfu.train import lfu_gradient

LOST = 0.01
"""1 - cosine. Measured: at most 4e-4; 2e-3 for the LoRA at α = 0.1, where the ascent direction's own rounding shows."""


def lost_in_bfloat16(auxiliary: str, alpha: float) -> float:
    """1 - cosine between the consistency gradients of a bfloat16 model and of the same model in float64."""
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
    return 1 - cosine(*gradients)


@pytest.mark.parametrize("auxiliary", AUXILIARIES)
@pytest.mark.parametrize("alpha", [1e-4, 1e-3, 0.1])
def test_the_consistency_gradient_survives_bfloat16(auxiliary: str, alpha: float) -> None:
    assert lost_in_bfloat16(auxiliary, alpha) < LOST

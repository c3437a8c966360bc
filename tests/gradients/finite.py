"""Directional finite differences: what a gradient is checked against when no other gradient is trusted.

Read next: `test_finite_differences.py`.
"""

from collections.abc import Callable
from typing import Any

import torch
from compare import flat
from gradients.cases import randn
from torch import Tensor
from torch.utils._pytree import tree_map

from lfu.train import global_norm

FINITE = 3e-10
"""Error of a directional derivative, relative to the length of the gradient. Measured: at most 3e-11."""
WIDTH = 3e-4
"""Where the truncation of the five-point formula and the rounding of the losses are both small."""


def slope_error(value: Callable[[Any], Tensor], at: Any, gradient: Any) -> float:
    """How far the slope of `value` at `at` is from what `gradient` says: the worst of three random directions."""
    generator = torch.Generator().manual_seed(3)
    directions = [tree_map(lambda tensor: randn(tensor, generator), at) for _ in range(3)]
    errors = [slope(value, at, unit(d)) - float(flat(gradient) @ flat(unit(d))) for d in directions]
    return max(map(abs, errors)) / float(flat(gradient).norm())


def slope(value: Callable[[Any], Tensor], at: Any, direction: Any) -> float:
    """The five-point formula: exact but for the fifth derivative."""

    def along(t: float) -> float:
        return float(value(tree_map(lambda a, d: a + t * d, at, direction)))

    near, far = along(WIDTH) - along(-WIDTH), along(2 * WIDTH) - along(-2 * WIDTH)
    return (8 * near - far) / (12 * WIDTH)


def unit(tree: Any) -> Any:
    """Of length 1."""
    return tree_map(lambda tensor: tensor / global_norm(tree), tree)

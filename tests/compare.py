"""How far apart two results are. Trees are compared as the one long vector of all their tensors."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


def flat(tree: Any) -> Tensor:
    """All numbers of a tree of tensors, in order."""
    return torch.cat([leaf.flatten() for leaf in tree_leaves(tree)])


def distance(actual: Any, expected: Any) -> float:
    """Relative L2 distance of two trees."""
    return float((flat(actual) - flat(expected)).norm() / flat(expected).norm())


def cosine(a: Any, b: Any) -> float:
    """How parallel two trees are."""
    return float(torch.cosine_similarity(flat(a).double(), flat(b).double(), dim=0))


def gap(a: Tensor, b: Tensor) -> float:
    """The largest difference of any element."""
    return (a - b).abs().max().item()


def relative(actual: float, expected: float) -> float:
    """Relative difference of two numbers; 0 where both are 0."""
    if expected == 0:
        return 0.0 if actual == 0 else math.inf
    return abs(actual - expected) / abs(expected)

"""`experiments/split.py` computes the gradient of LfU (RepS), by another road."""

import pytest
import torch
from compare import distance
from tiny import CONFIGS, random_lora, random_params

from experiments import split
from lfu import steering
from lfu.profiling import bench
from lfu.train import lfu_gradient

CLOSE = 1e-12
"""Relative error in float64. Measured: at most 5e-14."""


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_split_gradient_is_the_gradient(kind: str) -> None:
    config = CONFIGS[kind]
    base, task = random_params(config, seed=1), random_lora(config, 2, seed=2)
    batch = bench.random_batch(config, 3, 60, 28, 0, torch.device("cpu"))
    how = {"scale": 2.0, "alpha": 0.1, "lam": 0.3}
    vectors = steering.zeros(config, dtype=torch.float64)
    expected, _ = lfu_gradient(config, base, task, vectors, batch, **how)
    assert distance(split.split_gradient(config, base, task, batch, **how), expected) < CLOSE

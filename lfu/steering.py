"""Representation steering: one vector per block, added to the residual stream (Algorithm 2, h'_l = h_l + d_l).

As LoRA perturbs weights, steering perturbs representations. The vectors are the whole auxiliary component; where they
are added is a constant: the positions that predict the answer, `loss.answer_mask(labels)`. The addition itself is one
line of `model.trunk`. Read next: `loss.py`.
"""

import torch
from torch import Tensor

from lfu.model import Config


def zeros(
    config: Config, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> Tensor:  # -> [K, D]
    """Steering vectors that change nothing yet."""
    return torch.zeros(config.num_hidden_layers, config.hidden_size, device=device, dtype=dtype)

"""float16 products of small numbers: its range ends at 6e-8, and what lies below it would be lost.

The other dtypes have float32's range and need none of this. Read next: `model.py`, `relative_to`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class ScaledLinear(torch.autograd.Function):
    """`scaled_linear`, whose backward pass is one too: cotangents are as small as the differences they belong to."""

    @staticmethod
    def forward(x: Tensor, W: Tensor) -> Tensor:
        return scaled_linear(x, W)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None]:
        return scaled_linear(cotangent, ctx.saved_tensors[0].T), None


def scaled_linear(x: Tensor, W: Tensor) -> Tensor:  # [...,in], [out,in] -> [...,out]
    """W x in the dtype of W, each vector of x brought to a size below 1 by a power of two, which rounds nothing."""
    exponent = torch.frexp(x.abs().amax(-1, keepdim=True)).exponent
    return torch.ldexp(F.linear(torch.ldexp(x, -exponent).to(W.dtype), W).to(x.dtype), exponent)

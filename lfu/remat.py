"""Blocks computed again: less memory for more time.

A step keeps three things: the states h_l; what the backward pass needs from inside the blocks; and the clean pass's
products, to which the perturbed pass is exact. `rematerialised` and `relative_to_states` keep the states alone, and
compute the inside of a block again from the state before it whenever it is needed. The operations are the same, so the
gradients are equal bit for bit.

`torch.utils.checkpoint` does not work inside `torch.func`; an `autograd.Function` of the newer form, with
`setup_context`, does. An aside, for when a step does not fit: the way goes from `train.py` to `methods.py`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp
from torch.utils._pytree import tree_flatten, tree_unflatten

from lfu.lora import Adapter
from lfu.model import Config, Params, Product, Record, Steering, base_product, recording, relative_to, trunk

# --- less memory for more time --------------------------------------------------------------------


class Rematerialised(torch.autograd.Function):
    """f(*tensors), of which nothing but the tensors is kept: the backward pass computes f again."""

    @staticmethod
    def forward(f: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        return f(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.f, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Any, ...]:
        _, pullback = vjp(ctx.f, *ctx.saved_tensors)  # type: ignore[misc]  # two values, without has_aux
        return None, *pullback(cotangent)


def rematerialised(
    config: Config,
    params: Params,
    x: Tensor,
    adapters: Sequence[Adapter] = (),
    steering: Steering | None = None,
    product: Product = base_product,
) -> list[Tensor]:  # [B,T,D] -> K x [B,T,D]
    """`model.trunk`, whose backward pass finds only the states and computes the inside of each block again."""
    hidden = []
    for index in range(len(params.layers)):
        leaves, run = single_block(config, params, index, x, adapters, steering, product)
        x = Rematerialised.apply(run, *leaves)
        hidden.append(x)
    return hidden


def single_block(
    config: Config,
    params: Params,
    index: int,
    x: Tensor,
    adapters: Sequence[Adapter],
    steering: Steering | None,
    product: Product,
) -> tuple[list[Tensor], Callable[..., Tensor]]:
    """One block as a function of a flat list of all that a gradient may be taken of, and that list."""
    one, scales = params._replace(layers=params.layers[index : index + 1]), [scale for _, scale in adapters]
    vectors = [] if steering is None else [steering.vectors[index : index + 1]]
    leaves, structure = tree_flatten((x, [lora[index : index + 1] for lora, _ in adapters], vectors))

    def run(*leaves: Tensor) -> Tensor:
        x, loras, vectors = tree_unflatten(leaves, structure)
        steered = None if steering is None else Steering(vectors[0], steering.mask)
        (h,) = trunk(
            config, one, x, list(zip(loras, scales)), steered, lambda _, name, x, W: product(index, name, x, W)
        )
        return h

    return leaves, run


def relative_to_states(
    config: Config,
    params: Params,
    x: Tensor,
    hidden: list[Tensor],
    adapters: Sequence[Adapter],
    steering: Steering | None = None,
) -> Product:
    """`relative_to` a clean pass of which only its start x and its states were kept.

    The clean products of a block are computed when the first of them is asked for, and dropped one by one.
    """
    before, record = [x, *hidden], {}

    def product(layer: int, name: str, x: Tensor, W: Tensor) -> Tensor:
        if (layer, name) not in record:
            record.update(block_record(config, params, layer, before[layer], adapters, steering))
        return relative_to(record)(layer, name, x, W)

    return product


@torch.no_grad()
def block_record(
    config: Config, params: Params, index: int, x: Tensor, adapters: Sequence[Adapter], steering: Steering | None
) -> Record:
    """What `recording` would have kept of one block, from the state before it."""
    found: Record = {}
    leaves, run = single_block(config, params, index, x, adapters, steering, recording(found))
    run(*leaves)
    return found


# --- how much a step takes ------------------------------------------------------------------------

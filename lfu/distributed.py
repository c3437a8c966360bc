"""Several processes that train together, one for each device: which of them this is, and sums over all of them.

Each computes some of the micro-batches of a step, and all make the same update. Without `torchrun` there is one.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from io import StringIO
from typing import TypeVar

import torch
from torch import distributed
from torch.utils._pytree import tree_flatten, tree_unflatten

Tree = TypeVar("Tree")
"""A tree of tensors; the sum is a tree of the same shape."""
Value = TypeVar("Value")
GONE = "Another process of this run is gone; check its output and fix the cause. Then continue with --resume."


@contextmanager
def process_group(device: torch.device) -> Iterator[torch.device]:
    """Under `torchrun`, this process as one of several that train together, each on a device of its own."""
    together = distributed.is_available() and distributed.is_torchelastic_launched()
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if together else device
        torch.cuda.set_device(device)  # whose memory `summary` tells
    if not together:
        yield device
        return
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        with nullcontext() if rank_and_world_size()[0] == 0 else redirect_stdout(StringIO()):
            yield device
        with suppress(RuntimeError):  # a process lost after its last step is no loss
            distributed.barrier()  # none leaves while another still needs it
    finally:
        distributed.destroy_process_group()


def rank_and_world_size() -> tuple[int, int]:
    """The number of this process and how many train together: (0, 1) unless `torch.distributed` says otherwise."""
    together = distributed.is_available() and distributed.is_initialized()
    return (distributed.get_rank(), distributed.get_world_size()) if together else (0, 1)


def broadcast(value: Value) -> Value:
    """What the first process has, in all of them."""
    if rank_and_world_size()[1] == 1:
        return value
    held = [value]
    try:
        distributed.broadcast_object_list(held)
    except RuntimeError as error:
        raise ConnectionError(GONE) from error
    return held[0]


def all_reduce(gradient: Tree, metrics: dict[str, float]) -> tuple[Tree, dict[str, float]]:
    """Both added up over all processes; ConnectionError if one of them is gone."""
    leaves, structure = tree_flatten(gradient)
    whole = torch.cat([leaf.flatten() for leaf in leaves])
    all_metrics: list[dict[str, float]] = [{} for _ in range(rank_and_world_size()[1])]
    try:
        distributed.all_reduce(whole)
        distributed.all_gather_object(all_metrics, metrics)
    except RuntimeError as error:
        raise ConnectionError(GONE) from error
    parts = whole.split([leaf.numel() for leaf in leaves])
    gradient = tree_unflatten([part.view_as(leaf) for part, leaf in zip(parts, leaves)], structure)
    names = {name: None for each in all_metrics for name in each}
    return gradient, {name: sum(each.get(name, 0.0) for each in all_metrics) for name in names}

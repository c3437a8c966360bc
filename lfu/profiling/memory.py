"""Memory: how much a step takes, counted, and predicted from two much smaller steps.

Read next: `bench.py`.
"""

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lfu.data.batches import Example


class AllocationCounter(TorchDispatchMode):
    """After each operation, the bytes of all storages that operations made and that something still holds."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.moments: list[int] = []
        self.held: set[int] = set()

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = storages((args, kwargs))
        result = operation(*args, **(kwargs or {}))
        for key, storage in storages(result).items():
            if key not in given and key not in self.held:
                self.held.add(key)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.drop, key, storage.nbytes())
        self.moments.append(self.now)
        return result

    def drop(self, key: int, size: int) -> None:
        self.held.discard(key)
        self.now -= size


def storages(tree: Any) -> dict[int, torch.UntypedStorage]:
    """What the tensors of a tree look into."""
    found = [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    return {storage._cdata: storage for storage in found}


def allocation_history(work: Callable[[], object]) -> list[int]:
    """The bytes that the tensors made by some work take after each of its operations, on whatever device."""
    with AllocationCounter() as tally:
        work()
    return tally.moments


def peak(work: Callable[[], object]) -> int:
    """The most of these bytes at a time.

    Temporaries inside an operation are not seen, and a C library that does not return freed memory at once holds more;
    see `docs/performance.md`.
    """
    return max(allocation_history(work))


SMALL = (16, 48)
"""Tokens of the two rows that a step is tried on."""


def expected_peak(step: Callable[[Example], object], tokens: int, share: float) -> int:
    """What `peak` will be for a step of so many tokens, a share of which carry loss, without running it.

    `step` is tried on two short rows. It does the same operations whatever the length, and what it holds at each of
    these moments grows linearly with the tokens; only which of them is the worst changes.
    """
    short, long = (
        allocation_history(partial(step, Example([0] * size, size - max(1, round(share * size)), 0))) for size in SMALL
    )
    further = (tokens - SMALL[0]) / (SMALL[1] - SMALL[0])
    return round(max(low + (high - low) * further for low, high in zip(short, long)))

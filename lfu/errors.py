"""What can be wrong: with what the user gave, and with what a step ran into. Each error is one sentence."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch


class InputError(ValueError):
    """Something the user gave cannot be used; the message says what, where, and what to do."""


def quote(value: object) -> str:
    """A value of the user's for a message: repr, so that nothing in it acts on a terminal, cut to 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def escape(name: str) -> str:
    """A name without quotes, its escape codes and line breaks spelt out; cut as `quote` does."""
    return repr(name[:80])[1:-1] + "..." * (len(name) > 80)


def option_name(name: str) -> str:
    """A setting as the command line spells it, without its dashes: lambda for `lam`, batch-size for `batch_size`."""
    return {"lam": "lambda"}.get(name, name).replace("_", "-")


def require_not_negative(**values: float) -> None:
    """InputError unless each value is finite and at least 0."""
    for name, value in values.items():
        if not 0 <= value < math.inf:
            raise InputError(f"{option_name(name)} must be at least 0 and finite, not {value}.")


@contextmanager
def out_of_memory_at(step: int, lengths: Sequence[int], lines: Sequence[int]) -> Iterator[None]:
    """MemoryError, naming the batch by its rows' lengths and lines, where the device has no room for it."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryError(
            f"Step {step + 1}: out of memory in a batch of {len(lengths)} x {max(lengths)} tokens, the rows of lines "
            f"{list(lines)}."
        ) from error


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an accelerator or the CPU could not give the memory asked for; for the CPU, torch has no class of it."""
    reasons = ("can't allocate memory", "Storage size calculation overflowed")
    return isinstance(error, torch.OutOfMemoryError) or any(reason in str(error) for reason in reasons)

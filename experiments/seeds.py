"""Means over seeds, and differences that are paired by seed: the same rows in the same order, the same fresh LoRA."""

from collections.abc import Sequence
from typing import NamedTuple

from lfu.evaluation.estimates import accuracy

T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145)
"""Quantiles of Student's t at 97.5 %, for 1, 2, ... degrees of freedom."""


class Mean(NamedTuple):
    """Of several seeds."""

    value: float
    error: float  # standard error; nan for one seed
    n: int

    def __str__(self) -> str:
        return f"{100 * self.value:.1f}" + (f" ± {100 * self.error:.1f}" if self.n > 1 else "")


def mean(values: Sequence[float]) -> Mean:
    return Mean(*accuracy(values))


def difference(ours: Sequence[float], theirs: Sequence[float], digits: int = 1, factor: float = 100) -> str:
    """The mean of the paired differences, and its interval."""
    return interval([a - b for a, b in zip(ours, theirs, strict=True)], digits, factor)


def interval(differences: Sequence[float], digits: int = 1, factor: float = 100) -> str:
    """The mean with its 95 % interval, times `factor`: in percentage points; bold where 0 lies outside."""
    return written([factor * value for value in bounds(differences)], digits)


def bounds(differences: Sequence[float]) -> list[float]:
    """The mean and the ends of its 95 % interval; of one seed, the value alone."""
    d = mean(differences)
    if d.n == 1:
        return [d.value]
    reach = T_95[d.n - 2] * d.error
    return [d.value, d.value - reach, d.value + reach]


def written(values: Sequence[float], digits: int) -> str:
    """What `bounds` gives, as a cell."""
    center, *ends = (f"{value:+.{digits}f}" for value in values)
    text = f"{center} [{', '.join(ends)}]" if ends else center
    return f"**{text}**" if ends and (values[1] > 0 or values[2] < 0) else text

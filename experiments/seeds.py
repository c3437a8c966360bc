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
    d = mean(differences)
    if d.n == 1:
        return f"{factor * d.value:+.{digits}f}"
    reach = T_95[d.n - 2] * d.error
    center, low, high = (f"{factor * value:+.{digits}f}" for value in (d.value, d.value - reach, d.value + reach))
    text = f"{center} [{low}, {high}]"
    return f"**{text}**" if abs(d.value) > reach else text

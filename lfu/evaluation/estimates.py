"""A score with its standard error. Read next: `nll.py`."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Estimate(NamedTuple):
    """A mean over n items, and its standard error."""

    mean: float
    error: float
    n: int


def accuracy(hits: Sequence[float]) -> Estimate:
    """The mean of hits, or of scores from 0 to 1; the standard error is the harness': sample deviation over √n."""
    n, mean = len(hits), sum(hits) / len(hits)
    spread = sum((hit - mean) ** 2 for hit in hits)
    return Estimate(mean, math.sqrt(spread / (n - 1) / n) if n > 1 else math.nan, n)


def ratio(sums: Sequence[float], counts: Sequence[int]) -> Estimate:
    """Σ sums / Σ counts over rows; the standard error is that of a ratio, from the rows' deviations from the mean."""
    total, n, rows = np.array(sums, dtype=np.float64), np.array(counts), len(counts)
    mean = total.sum() / n.sum()
    spread = np.sqrt(((total - mean * n) ** 2).sum() * rows / (rows - 1)) if rows > 1 else math.nan
    return Estimate(float(mean), float(spread / n.sum()), int(n.sum()))

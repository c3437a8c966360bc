"""Validation: the likelihood of rows held back while a run goes on, the best step so far, and when to stop.

What is measured is a function of the adapter alone, and what was found stands in the log, so a run that is resumed
finds the same best step and stops where it would have stopped. Read next: `runs.py`.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from lfu.data.batches import Example, shuffled
from lfu.distributed import broadcast
from lfu.errors import InputError
from lfu.train import StepMetrics

History = list[tuple[int, float]]
"""(step, mean NLL per answer token) of each evaluation, oldest first."""


class Validation(NamedTuple):
    """The rows held back, after how many steps they are looked at, and how often in vain before the run ends."""

    examples: Sequence[Example]
    every: int | None = None  # steps; None: an epoch
    patience: int | None = None  # evaluations without a new best; None: the run goes to its end


NO_EPOCH = 2**32 - 1
"""Rows are chosen by an order that no epoch of training has."""


def hold_back(examples: Sequence[Example], count: int, seed: int) -> tuple[list[Example], list[Example]]:
    """(rows to train on, in their order; `count` rows held back, chosen by the seed). InputError if none is left."""
    if count >= len(examples):
        raise InputError(f"Of {len(examples)} rows {count} cannot be held back: none would be left to train on.")
    held = set(shuffled(len(examples), seed, NO_EPOCH)[:count])
    rest = [example for row, example in enumerate(examples) if row not in held]
    return rest, [examples[row] for row in sorted(held)]


def watch(
    steps: Iterator[StepMetrics], measure: Callable[[], float], history: History, every: int, patience: int | None,
    start_step: int, last: int,
) -> Iterator[StepMetrics]:  # fmt: skip
    """The steps as they come; those that are due carry what `measure` finds, as "valid" and "valid_seconds".

    Before the first step comes a step 0 that carries nothing else. `history` is filled. Once `patience` evaluations
    have brought no new best, there are no more steps. Where several processes train, the first one's word counts.
    """
    history[:] = broadcast(history)

    def look(metrics: StepMetrics) -> StepMetrics:
        clock = time.perf_counter()
        value = broadcast(measure())
        history.append((metrics.step, value))
        found = {"valid": value, "valid_seconds": round(time.perf_counter() - clock, 4)}
        return metrics._replace(losses=metrics.losses | found)

    if start_step == 0 and not history:
        yield look(StepMetrics(0, 0, 0, {}, 0.0, 0.0))
    while not is_over(history, patience) and (metrics := next(steps, None)) is not None:
        yield look(metrics) if metrics.step % every == 0 or metrics.step == last else metrics


def best(history: History) -> tuple[int, float]:
    """The step with the lowest value, the first of them if there are several."""
    return min(history, key=lambda found: found[1])


def is_over(history: History, patience: int | None) -> bool:
    """Whether the last `patience` evaluations brought no new best."""
    steps = [step for step, _ in history]
    return patience is not None and bool(history) and len(steps) - 1 - steps.index(best(history)[0]) >= patience

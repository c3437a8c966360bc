"""How long and how fast to train: steps, epochs, the rows of a step, its randomness and its learning rate.

All are pure functions of the settings and the step, so that a run continued from any step is the run that was never
interrupted. Read next: `train.py`, which comes back here for the loop alone.
"""

import math
from typing import NamedTuple

import numpy as np
import torch

from lfu.data.batches import shuffled
from lfu.errors import InputError, option_name, require_not_negative


class Settings(NamedTuple):
    """How long and how fast to train. The defaults are the published ones."""

    epochs: int = 3
    batch_size: int = 16  # rows per optimizer step
    micro_batch_size: int = 4  # rows per gradient; LfU ascends once per micro-batch, so its result depends on this
    learning_rate: float = 1e-4
    warmup: float = 0.1  # share of the steps
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    seed: int = 42


def validate_settings(settings: Settings) -> None:
    """InputError for settings that no run can have."""
    for name in ("epochs", "batch_size", "micro_batch_size", "max_grad_norm"):
        if not getattr(settings, name) > 0:
            raise InputError(f"{option_name(name)} must be more than 0, not {getattr(settings, name)}.")
    require_not_negative(learning_rate=settings.learning_rate, weight_decay=settings.weight_decay)
    if not 0 <= settings.seed < 2**64:
        raise InputError(f"seed must be from 0 to 2**64 - 1, not {settings.seed}.")
    if not 0 <= settings.warmup <= 1:
        raise InputError(f"warmup is a share of the steps, from 0 to 1, not {settings.warmup}.")


def total_steps(count: int, settings: Settings) -> int:
    """Optimizer steps of the whole run."""
    return settings.epochs * steps_per_epoch(count, settings)


def steps_per_epoch(count: int, settings: Settings) -> int:
    """Optimizer steps over `count` rows; the last, partial one counts."""
    return math.ceil(count / settings.batch_size)


def rows_of_step(count: int, settings: Settings, step: int) -> tuple[int, list[int]]:
    """The epoch of a step and the rows it takes, a pure function of (seed, epoch)."""
    epoch, position = divmod(step, steps_per_epoch(count, settings))
    start = position * settings.batch_size
    return epoch, shuffled(count, settings.seed, epoch)[start : start + settings.batch_size]


def generator_for(settings: Settings, step: int, index: int, device: torch.device) -> torch.Generator:
    """The randomness of one micro-batch, a pure function of (seed, step, index)."""
    seed = np.random.SeedSequence([settings.seed, step, index]).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(seed))


def learning_rate(step: int, steps: int, settings: Settings) -> float:
    """Linear warm-up from 0 over ceil(warmup·steps) steps, then half a cosine to 0: as transformers' Trainer."""
    warmup = math.ceil(settings.warmup * steps)
    if step < warmup:
        return settings.learning_rate * step / warmup
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))

"""The methods by name: what the loop calls for each micro-batch.

Every method has the signature (config, base, task, batch, generator) -> (gradient, metrics); its hyper-parameters are
keyword arguments, bound with `functools.partial`. A new method is a new function and a line in METHODS.
Read next: `data.py`.
"""

from collections.abc import Collection
from functools import partial
from typing import Any

import torch

from lfu import InputError, lora, model, steering
from lfu.data import Batch
from lfu.lora import Lora
from lfu.loss import chosen_layers, require_norm
from lfu.model import Config, Params
from lfu.train import Method, Metrics, lfu_gradient, require_not_negative, sft_gradient


def sft(
    config: Config, base: Params, task: Lora, batch: Batch, generator: torch.Generator, *, scale: float
) -> tuple[Lora, Metrics]:
    """Supervised fine-tuning, Eq. 1 alone."""
    return sft_gradient(config, base, task, batch, scale=scale)


def lfu_lora(
    config: Config, base: Params, task: Lora, batch: Batch, generator: torch.Generator, **how: Any
) -> tuple[Lora, Metrics]:
    """Algorithm 1: the undesirable step moves a fresh LoRA of the same rank, scale and targets as the task's.

    `how` are the keyword arguments of `lfu_gradient`.
    """
    rank, targets, stream = len(next(iter(task[0].values())).A), tuple(task[0]), model.stream_dtype(base)
    aux = lora.init(config, rank, generator=generator, targets=targets, dtype=stream)
    return lfu_gradient(config, base, task, aux, batch, **how)


def lfu_reps(
    config: Config, base: Params, task: Lora, batch: Batch, generator: torch.Generator, **how: Any
) -> tuple[Lora, Metrics]:
    """Algorithm 2: the undesirable step moves one steering vector per block, at the answer's positions.

    `how` are the keyword arguments of `lfu_gradient`.
    """
    aux = steering.zeros(config, device=batch.tokens.device, dtype=model.stream_dtype(base))
    return lfu_gradient(config, base, task, aux, batch, **how)


METHODS = {"sft": sft, "lfu-lora": lfu_lora, "lfu-reps": lfu_reps}
PUBLISHED: dict[str, dict[str, float]] = {
    "sft": {},
    "lfu-lora": {"alpha": 0.1, "lam": 5.0},  # for Llama-3.1-8B-Instruct: alpha 0.001, lam 500
    "lfu-reps": {"alpha": 0.1, "lam": 0.1},
}
"""The settings of the paper's appendix A."""


def bind(
    name: str,
    config: Config,
    *,
    scale: float,
    alpha: float | None = None,
    lam: float | None = None,
    layers: Collection[int] | None = None,
    norm: str | None = None,
) -> tuple[Method, dict[str, Any]]:
    """The method of this name with its hyper-parameters bound, and what they were resolved to.

    What is None takes the published value. InputError for an unknown name, and for a value the method cannot use.
    """
    if name not in METHODS:
        raise InputError(f"There is no method {name!r}; there are {', '.join(METHODS)}.")
    given = {"alpha": alpha, "lam": lam, "layers": layers, "norm": norm}
    chosen = {key: value for key, value in given.items() if value is not None}
    if name == "sft" and chosen:
        raise InputError(f"The method sft has no {' or '.join(chosen)}; choose an lfu method, or leave it out.")
    resolved = PUBLISHED[name] | chosen
    if name != "sft":
        require_not_negative(alpha=resolved["alpha"], lam=resolved["lam"])
        require_norm(resolved.setdefault("norm", "mean"))
        resolved["layers"] = chosen_layers(resolved.get("layers"), config.num_hidden_layers)
    return partial(METHODS[name], scale=scale, **resolved), resolved

"""The methods by name: what the loop calls for each micro-batch.

Every method has the signature (config, base, task, batch, generator) -> (gradient, metrics); its hyper-parameters are
keyword arguments, bound with `functools.partial`. A new method is a new function and a line in METHODS.
Read next: `data.py`.
"""

from collections.abc import Collection
from functools import partial
from typing import Any

import torch
from torch.utils._pytree import tree_map

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
    config: Config,
    base: Params,
    task: Lora,
    batch: Batch,
    generator: torch.Generator,
    *,
    scale: float,
    alpha: float,
    lam: float,
    layers: Collection[int] | None = None,
    norm: str = "mean",
) -> tuple[Lora, Metrics]:
    """Algorithm 1: the undesirable step moves a fresh LoRA of the same rank, scale and targets as the task's."""
    rank, targets = next(iter(task[0].values())).A.shape[0], tuple(task[0])
    fresh = lora.init(config, rank, generator=generator, targets=targets)
    aux = tree_map(lambda tensor: tensor.to(model.stream_dtype(base)), fresh)
    return lfu_gradient(config, base, task, aux, batch, scale=scale, alpha=alpha, lam=lam, layers=layers, norm=norm)


def lfu_reps(
    config: Config,
    base: Params,
    task: Lora,
    batch: Batch,
    generator: torch.Generator,
    *,
    scale: float,
    alpha: float,
    lam: float,
    layers: Collection[int] | None = None,
    norm: str = "mean",
) -> tuple[Lora, Metrics]:
    """Algorithm 2: the undesirable step moves one steering vector per block, at the answer's positions."""
    aux = steering.zeros(config, device=batch.tokens.device).to(model.stream_dtype(base))
    return lfu_gradient(config, base, task, aux, batch, scale=scale, alpha=alpha, lam=lam, layers=layers, norm=norm)


METHODS = {"sft": sft, "lfu-lora": lfu_lora, "lfu-reps": lfu_reps}
PUBLISHED: dict[str, dict[str, float]] = {
    "sft": {},
    "lfu-lora": {"alpha": 0.1, "lam": 5.0},  # for Llama-3.1-8B-Instruct: alpha 0.001, lam 500
    "lfu-reps": {"alpha": 0.1, "lam": 0.1},
}
"""The settings of the paper's appendix A."""


def bind(name: str, config: Config, *, scale: float, **given: Any) -> tuple[Method, dict[str, Any]]:
    """The method of this name with its hyper-parameters bound, and what they were resolved to.

    `given` may hold alpha, lam, layers and norm; what is None or absent takes the published value. InputError for an
    unknown name, and for a value the method cannot use.
    """
    if name not in METHODS:
        raise InputError(f"There is no method {name!r}; there are {', '.join(METHODS)}.")
    chosen = {key: value for key, value in given.items() if value is not None}
    if name == "sft" and chosen:
        raise InputError(f"The method sft has no {' or '.join(chosen)}; choose an lfu method, or leave it out.")
    resolved = PUBLISHED[name] | chosen
    if name != "sft":
        require_not_negative(alpha=resolved["alpha"], lam=resolved["lam"])
        require_norm(resolved.setdefault("norm", "mean"))
        resolved["layers"] = chosen_layers(resolved.get("layers"), config.num_hidden_layers)
    return partial(METHODS[name], scale=scale, **resolved), resolved

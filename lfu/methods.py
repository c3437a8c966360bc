"""The methods by name: what the loop calls for each micro-batch.

Every method has the signature (config, base, task, batch, generator) -> (gradient, metrics); its hyper-parameters are
keyword arguments, bound with `functools.partial`. A new method is a new function here, its name in METHODS, and in
PUBLISHED those of alpha, lam, beta, layers and norm that it takes. All are given `scale`; all but the released ones
also `remat` and, where they are to be compiled, `differentiate`. A hyper-parameter of another name also needs an
argument of `bind` and an option of `lfu train`. Read next: `data/rows.py`; `baselines/`, an aside, is what LfU is
compared with.
"""

import math
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lfu.baselines.anchored import anchored, require_share
from lfu.baselines.regularisers import (
    feature_regulariser,
    gem,
    logit_divergence,
    neftune,
    require_absolute,
    require_temperature,
    sam,
)
from lfu.baselines.released import released_lora, released_reps, require_rows
from lfu.data.batches import Batch, Example, collate
from lfu.errors import InputError, option_name, require_not_negative
from lfu.lora import Lora
from lfu.loss import require_norm, resolve_layers
from lfu.model import Config, Params
from lfu.train import (
    Method,
    Metrics,
    Settings,
    compiled,
    differentiate,
    init_like,
    lfu_gradient,
    lfu_lora,
    lfu_reps,
    sft_gradient,
)


def sft(
    config: Config, base: Params, task: Lora, batch: Batch, generator: torch.Generator, **how: Any
) -> tuple[Lora, Metrics]:
    """Supervised fine-tuning, Eq. 1 alone. `how` are the keyword arguments of `sft_gradient`."""
    return sft_gradient(config, base, task, batch, **how)


def logit_consistency(
    config: Config, base: Params, task: Lora, batch: Batch, generator: torch.Generator, **how: Any
) -> tuple[Lora, Metrics]:
    """Eq. 7 in place of Eq. 5: the undesirable step of `lfu_lora` must leave the logits what they were.

    `how` are the keyword arguments of `lfu_gradient`.
    """
    compare = partial(logit_divergence, config, base)
    return lfu_gradient(config, base, task, init_like(config, base, task, generator), batch, compare=compare, **how)


METHODS = {
    "sft": sft,
    "lfu-lora": lfu_lora,
    "lfu-reps": lfu_reps,
    "released-lora": released_lora,
    "released-reps": released_reps,
    "neftune": neftune,
    "gem-linear": partial(gem, weight="linear"),
    "gem-logsigmoid": partial(gem, weight="logsigmoid"),
    "sam": sam,
    "l1": partial(feature_regulariser, order=1),
    "l2": partial(feature_regulariser, order=2),
    "logit-consistency": logit_consistency,
    "anchored": anchored,
}
ALL_BLOCKS: dict[str, Any] = {"layers": None, "norm": "mean"}
RELEASED = ("released-lora", "released-reps")
PUBLISHED: dict[str, dict[str, Any]] = {
    "sft": {},
    "lfu-lora": {"alpha": 0.1, "lam": 5.0} | ALL_BLOCKS,  # for Llama-3.1-8B-Instruct: alpha 0.001, lam 500
    "lfu-reps": {"alpha": 0.1, "lam": 0.1} | ALL_BLOCKS,
    "released-lora": {"alpha": 0.1, "lam": 5.0},
    "released-reps": {"alpha": 0.1, "lam": 0.1},
    "neftune": {"alpha": 5.0},
    "gem-linear": {"beta": 0.7},
    "gem-logsigmoid": {"beta": 0.7},
    "sam": {"alpha": 0.01},
    "l1": {"lam": 0.01, "norm": "mean"},
    "l2": {"lam": 0.01, "norm": "mean"},
    "logit-consistency": {"alpha": 0.1, "lam": 1.0},
    "anchored": {"beta": 0.5, "lam": 1.0},  # ours: none are published
}
"""The hyper-parameters that each method takes, at the values of the paper's appendix A and Tables 6 and 13, and of the
scripts of NEFTune and GEM."""
REQUIRED: dict[str, Callable[..., None]] = {
    "gem-linear": require_temperature,
    "gem-logsigmoid": require_temperature,
    "l1": require_absolute,
    "l2": require_absolute,
    "anchored": require_share,
}
"""What some methods ask of their hyper-parameters, beyond what `bind` asks of all."""


def bind(
    name: str,
    config: Config,
    *,
    scale: float,
    alpha: float | None = None,
    lam: float | None = None,
    beta: float | None = None,
    layers: Collection[int] | None = None,
    norm: str | None = None,
    examples: Sequence[Example] = (),
    settings: Settings | None = None,
    remat: bool = False,
    compile: bool = False,
) -> tuple[Method, dict[str, Any]]:
    """The method of this name with its hyper-parameters bound, and what they were resolved to.

    What is None takes the published value. The released variants need to know the run: its `examples`, from which they
    draw second batches, and its `settings`. `remat` computes the inside of the blocks again in the backward pass, and
    `compile` hands the gradients to `torch.compile`. InputError for an unknown name and for what a method cannot use.
    """
    if name not in METHODS:
        raise InputError(f"There is no method {name!r}; there are {', '.join(METHODS)}.")
    given = {"alpha": alpha, "lam": lam, "beta": beta, "layers": layers, "norm": norm}
    chosen = {key: value for key, value in given.items() if value is not None}
    if surplus := [option_name(key) for key in chosen if key not in PUBLISHED[name]]:
        raise InputError(f"The method {name} has no {' or '.join(surplus)}; choose another method, or leave it out.")
    if compile:
        require_compiler(name)
    if remat and compile:
        raise InputError("remat and compile exclude each other: the compiler decides by itself what it keeps.")
    released = name in RELEASED
    if (remat or compile) and released:
        raise InputError(f"The method {name} has no remat and cannot be compiled.")
    resolved = PUBLISHED[name] | chosen
    require_not_negative(**{key: resolved[key] for key in ("alpha", "lam", "beta") if key in resolved})
    if "norm" in resolved:
        require_norm(resolved["norm"])
    if name in REQUIRED:
        REQUIRED[name](**resolved)
    if "layers" in resolved:
        resolved["layers"] = resolve_layers(resolved["layers"], config.num_hidden_layers)
    if released:
        run = run_context(name, examples, settings or Settings())
    else:
        run = {"remat": remat} | ({"differentiate": compiled()} if compile else {})
    return partial(METHODS[name], scale=scale, **resolved, **run), resolved


COMPILES_FROM = {"l1": (2, 13), "l2": (2, 13), "logit-consistency": (2, 13)}
"""The torch that first makes one graph of these gradients, which choose positions inside; the others from 2.8 on."""


def require_compiler(name: str) -> None:
    """InputError where this torch cannot compile the gradient of a method."""
    least = COMPILES_FROM.get(name, (2, 8))
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < least:
        raise InputError(
            f"To compile {name}, torch {least[0]}.{least[1]} or newer is needed, and this is {torch.__version__}: "
            "leave out --compile."
        )


def run_context(name: str, examples: Sequence[Example], settings: Settings) -> dict[str, Any]:
    """What the released variants know of the run they are in."""
    require_rows(name, examples)
    if name == "released-lora":
        return {"examples": examples}
    micro_batches = math.ceil(settings.batch_size / settings.micro_batch_size)
    run = {"learning_rate": settings.learning_rate, "micro_batches": micro_batches}
    return {"examples": examples, **run, "state": {}}


def probe(method: Method, config: Config, base: Params, task: Lora, row: Example) -> tuple[Lora, Metrics]:
    """One gradient of a bound method on one row, not compiled, leaving no trace in what the method carries along."""
    apart = {"examples": [row], "state": {}, "differentiate": differentiate}
    again = partial(method, **{name: value for name, value in apart.items() if name in method.keywords})
    device = base.embed.device
    return again(config, base, task, collate([row], device), torch.Generator(device))


def is_stateful(method: Method) -> bool:
    """Whether what a bound method computes depends on the micro-batches before."""
    return "state" in method.keywords


def state_of(method: Method) -> dict[str, Tensor]:
    """What a bound method carries from one micro-batch to the next, for the checkpoint: nothing, but for released-reps.

    It is filled and updated in place; whoever continues a run puts the saved tensors back into it.
    """
    return method.keywords.get("state", {})

"""The methods by name: what the loop calls for each micro-batch.

Every method has the signature (config, base, task, batch, generator) -> (gradient, metrics); its hyper-parameters are
keyword arguments. A new method is a function and a line of METHODS, which says which of alpha, lam, beta, layers and
norm it takes. All are given `scale`; all but the released ones also `remat` and, where they are to be compiled,
`differentiate` (`train.SftOptions`). A hyper-parameter of another name also needs an argument of `bind` and an option
of `lfu train`. Read next: `data/rows.py`; `baselines/`, an aside, is what LfU is
compared with.
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Unpack

from lfu.baselines.anchored import anchored, require_anchor
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
from lfu.lora import Adapter, Lora
from lfu.loss import require_norm, resolve_layers
from lfu.model import Config, Params
from lfu.schedule import Settings
from lfu.train import (
    LfuOptions,
    Metrics,
    SftOptions,
    compiled,
    differentiate,
    init_like,
    lfu_gradient,
    lfu_lora,
    lfu_reps,
    sft_gradient,
)


def sft(
    config: Config, base: Params, task: Lora, batch: Batch, generator: torch.Generator, **options: Unpack[SftOptions]
) -> tuple[Lora, Metrics]:
    """Supervised fine-tuning, Eq. 1 alone."""
    return sft_gradient(config, base, task, batch, **options)


def logit_consistency(
    config: Config, base: Params, task: Lora, batch: Batch, generator: torch.Generator, **options: Unpack[LfuOptions]
) -> tuple[Lora, Metrics]:
    """Eq. 7 in place of Eq. 5: the undesirable step of `lfu_lora` must leave the logits what they were."""
    compare = partial(logit_divergence, config, base)
    return lfu_gradient(config, base, task, init_like(config, base, task, generator), batch, compare=compare, **options)


class Spec(NamedTuple):
    """A method: its gradient, the hyper-parameters it takes, at their published values, and what else is its own."""

    gradient: Callable[..., tuple[Lora, Metrics]]
    published: dict[str, Any]
    check: Callable[..., None] | None = None  # raises InputError for hyper-parameters that it cannot use
    released: bool = False  # it draws second batches from the rows of the run; it has no remat and is not compiled
    compiles_from: tuple[int, int] = (2, 8)  # the first torch that makes one graph of it


ALL_BLOCKS: dict[str, Any] = {"layers": None, "norm": "mean"}
CHOOSES_INSIDE = (2, 13)  # the first torch that compiles a gradient which chooses positions within the graph
METHODS = {
    "sft": Spec(sft, {}),
    "lfu-lora": Spec(lfu_lora, {"alpha": 0.1, "lam": 5.0} | ALL_BLOCKS),  # Llama-3.1-8B-Instruct: alpha 0.001, lam 500
    "lfu-reps": Spec(lfu_reps, {"alpha": 0.1, "lam": 0.1} | ALL_BLOCKS),
    "released-lora": Spec(released_lora, {"alpha": 0.1, "lam": 5.0}, released=True),
    "released-reps": Spec(released_reps, {"alpha": 0.1, "lam": 0.1}, released=True),
    "neftune": Spec(neftune, {"alpha": 5.0}),
    "gem-linear": Spec(partial(gem, weight="linear"), {"beta": 0.7}, require_temperature),
    "gem-logsigmoid": Spec(partial(gem, weight="logsigmoid"), {"beta": 0.7}, require_temperature),
    "sam": Spec(sam, {"alpha": 0.01}),
    "l1": Spec(
        partial(feature_regulariser, order=1), {"lam": 0.01, "norm": "mean"}, require_absolute,
        compiles_from=CHOOSES_INSIDE,
    ),
    "l2": Spec(
        partial(feature_regulariser, order=2), {"lam": 0.01, "norm": "mean"}, require_absolute,
        compiles_from=CHOOSES_INSIDE,
    ),
    "logit-consistency": Spec(logit_consistency, {"alpha": 0.1, "lam": 1.0}, compiles_from=CHOOSES_INSIDE),
    "anchored": Spec(anchored, {"anchor_alpha": 0.5, "space": "logits", "stages": 5}, require_anchor),
}  # fmt: skip
"""Published values are those of the paper's appendix A and Tables 6 and 13, and of the code of NEFTune, GEM and
Anchored Learning."""


@dataclass(frozen=True)
class BoundMethod:
    """A method with all that it needs: what the loop calls for each micro-batch."""

    gradient: Callable[..., tuple[Lora, Metrics]]
    hyper: dict[str, Any]  # scale and the hyper-parameters
    run: dict[str, Any]  # how and in which run they are used
    stages: int = 1  # times that the loop begins anew

    def __call__(
        self, config: Config, base: Params, task: Lora, batch: Batch, generator: torch.Generator
    ) -> tuple[Lora, Metrics]:
        return self.gradient(config, base, task, batch, generator, **self.hyper, **self.run)

    @property
    def is_stateful(self) -> bool:
        """Whether what it computes depends on the micro-batches before."""
        return "state" in self.run

    @property
    def state(self) -> dict[str, Tensor]:
        """What it carries along, for the checkpoint: nothing, but for released-reps and anchored.

        It is filled and updated in place; whoever continues a run puts the saved tensors back into it.
        """
        return self.run.get("state", self.run.get("snapshot", {}))

    @property
    def snapshot(self) -> dict[str, Tensor] | None:
        """Where the loop keeps what the adapter was at the start of a stage; None where the method has none."""
        return self.run.get("snapshot")

    def probe(self, config: Config, base: Params, task: Lora, row: Example) -> tuple[Lora, Metrics]:
        """Its gradient on one row, not compiled, leaving no trace in what it carries along."""
        apart = {"examples": [row], "state": {}, "snapshot": {}, "differentiate": differentiate}
        run = {name: apart.get(name, value) for name, value in self.run.items()}
        device = base.embed.device
        return replace(self, run=run)(config, base, task, collate([row], device), torch.Generator(device))


def bind(
    name: str, config: Config, *, scale: float,
    alpha: float | None = None, lam: float | None = None, beta: float | None = None,
    layers: Collection[int] | None = None, norm: str | None = None,
    anchor_alpha: float | None = None, space: str | None = None, stages: int | None = None,
    reference: Adapter | None = None,
    examples: Sequence[Example] = (), settings: Settings | None = None, remat: bool = False, compile: bool = False,
) -> tuple[BoundMethod, dict[str, Any]]:  # fmt: skip
    """The method of this name with its hyper-parameters bound, and what they were resolved to.

    What is None takes the published value. The released variants need to know the run: its `examples`, from which they
    draw second batches, and its `settings`; anchored needs its `reference`. `remat` computes the inside of the blocks
    again in the backward pass, and `compile` hands the gradients to `torch.compile`. InputError for an unknown name and
    for what a method cannot use.
    """
    if name not in METHODS:
        raise InputError(f"There is no method {name!r}; there are {', '.join(METHODS)}.")
    spec = METHODS[name]
    given = {"alpha": alpha, "lam": lam, "beta": beta, "layers": layers, "norm": norm}
    resolved = resolve(name, config, given | {"anchor_alpha": anchor_alpha, "space": space, "stages": stages})
    if remat and compile:
        raise InputError("remat and compile exclude each other: the compiler decides by itself what it keeps.")
    if (remat or compile) and spec.released:
        raise InputError(f"The method {name} has no remat and cannot be compiled.")
    if compile:
        require_compiler(name)
    if spec.released:
        run = run_context(name, examples, settings or Settings())
    else:
        run = {"remat": remat} | ({"differentiate": compiled()} if compile else {})
    run |= reference_context(name, reference)
    hyper = {"scale": scale, **{key: value for key, value in resolved.items() if key != "stages"}}
    return BoundMethod(spec.gradient, hyper, run, resolved.get("stages", 1)), resolved


def resolve(name: str, config: Config, given: dict[str, Any]) -> dict[str, Any]:
    """The hyper-parameters of a method: what is given, and published values for what is None."""
    spec, chosen = METHODS[name], {key: value for key, value in given.items() if value is not None}
    if surplus := [option_name(key) for key in chosen if key not in spec.published]:
        raise InputError(f"The method {name} has no {' or '.join(surplus)}; choose another method, or leave it out.")
    resolved = spec.published | chosen
    require_not_negative(**{key: resolved[key] for key in ("alpha", "lam", "beta") if key in resolved})
    if "norm" in resolved:
        require_norm(resolved["norm"])
    if spec.check:
        spec.check(**resolved)
    if "layers" in resolved:
        resolved["layers"] = resolve_layers(resolved["layers"], config.num_hidden_layers)
    return resolved


def require_compiler(name: str) -> None:
    """InputError where this torch cannot compile the gradient of a method."""
    least = METHODS[name].compiles_from
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


def reference_context(name: str, reference: Adapter | None) -> dict[str, Any]:
    """What Anchored Learning knows of the run it is in. InputError without a reference, and for others with one."""
    if (name == "anchored") != (reference is not None):
        raise InputError(
            "The method anchored needs a reference: the adapter of an SFT run."
            if reference is None
            else f"The method {name} has no reference: leave it out, or choose the method anchored."
        )
    return {} if reference is None else {"reference": reference, "snapshot": {}}

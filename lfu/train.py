"""Learning from the Undesirable: the step of Algorithms 1 and 2, and the loop around it.

`lfu_gradient` is the paper in one function. The auxiliary component starts as a no-op (B = 0, or d = 0), so θ and θ_aux
compute the same thing there: one forward and one backward pass yield both the gradient of the SFT loss, Eq. 1, and the
ascent direction of Eq. 2. One more of each yields the gradient of the consistency loss, Eqs. 3 to 5. Eq. 6 adds them.

Gradients are values: `torch.func` returns them as trees of the same shape as what they belong to. A `Batch` is tokens
and labels [B,T], -100 where there is no loss; an `Example` is one row of it before padding (both: `data/batches.py`).

Read next: `methods.py`; `remat.py` is for when a step does not fit.
"""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, TypedDict, TypeVar

import torch
from torch import Tensor
from torch.func import grad_and_value, vjp
from torch.utils._pytree import tree_leaves, tree_map
from typing_extensions import NotRequired, Unpack  # which torch brings; in typing from Python 3.11

from lfu import lora, steering
from lfu.data.batches import Batch, Example, collate, split_by_length
from lfu.distributed import all_reduce, rank_and_world_size
from lfu.errors import InputError, out_of_memory_at, require_not_negative
from lfu.lora import Adapter, Lora, stack
from lfu.loss import answer_labels, answer_loss, answer_mask, consistency_loss
from lfu.model import (
    Config,
    Params,
    Record,
    Steering,
    base_product,
    embed,
    recording,
    relative_to,
    stream_dtype,
    trunk,
    unembed,
)
from lfu.remat import relative_to_states, rematerialised
from lfu.schedule import Settings, generator_for, learning_rate, rows_of_step, total_steps, validate_settings

Aux = Lora | Tensor
"""The auxiliary component: a Lora (LfU-LoRA) or steering vectors [K, D] (LfU-RepS)."""
Tree = TypeVar("Tree", Lora, Tensor)
Metrics = dict[str, Tensor]
Method = Callable[[Config, Params, Lora, Batch, torch.Generator], tuple[Lora, Metrics]]
"""(config, base, task, batch, generator) -> (gradient, metrics), means over the batch's own labelled tokens."""
Objective = Callable[..., tuple[Tensor, Any]]
"""Trees of tensors -> (value, what else is of interest)."""
Differentiate = Callable[..., tuple[tuple[Any, ...], Tensor, Any]]
"""(objective, *arguments) -> (a gradient for each argument, the value, what else the objective returned, constant)."""


class SftOptions(TypedDict):
    """The keyword arguments of `sft_gradient`."""

    scale: float
    remat: NotRequired[bool]
    differentiate: NotRequired[Differentiate]


class LfuOptions(SftOptions):
    """The keyword arguments of `lfu_gradient`, but for `compare`."""

    alpha: float
    lam: float
    layers: NotRequired[Collection[int] | None]
    norm: NotRequired[str]


# --- the gradients of one batch -------------------------------------------------------------------


def differentiate(objective: Objective, *arguments: Any) -> tuple[tuple[Any, ...], Tensor, Any]:
    """The gradient of an objective with respect to each argument, its value, and what else it returned, as constants.

    `torch.func.grad_and_value` would do, but it keeps the backward pass differentiable too, which nobody asks for here:
    the same numbers cost twice the memory.
    """
    value, pullback, constants = vjp(objective, *arguments, has_aux=True)  # type: ignore[misc]
    with torch.no_grad():
        return pullback(torch.ones_like(value), retain_graph=False), value, constants


def sft_gradient(
    config: Config,
    base: Params,
    task: Lora,
    batch: Batch,
    *,
    scale: float,
    remat: bool = False,
    differentiate: Differentiate = differentiate,
) -> tuple[Lora, Metrics]:
    """Gradient of the SFT loss (Eq. 1) with respect to the task LoRA, and {"sft": loss}.

    `remat` and `differentiate` as in `lfu_gradient`. InputError if no token of the batch carries a label.
    """
    run_trunk = rematerialised if remat else trunk
    x, positions, answers = (
        embed(base, batch.tokens),
        answer_mask(batch.labels).nonzero(as_tuple=True),
        answer_labels(batch.labels),
    )

    def objective(task: Lora) -> tuple[Tensor, Any]:
        hidden = run_trunk(config, base, x, [(task, scale)])
        logits = unembed(config, base, hidden[-1][positions])  # [n,V]
        return answer_loss(logits, answers), ()

    (gradient,), sft, _ = differentiate(objective, task)
    return gradient, {"sft": sft}


def lfu_gradient(
    config: Config, base: Params, task: Lora, aux: Aux, batch: Batch, *,
    scale: float, alpha: float, lam: float, layers: Collection[int] | None = None, norm: str = "mean",
    remat: bool = False, compare: Callable[..., Tensor] = consistency_loss, differentiate: Differentiate = differentiate
) -> tuple[Lora, Metrics]:  # fmt: skip
    """Gradient of the LfU loss (Eq. 6) with respect to the task LoRA, first order as published.

    Returns a tree like `task`, and "sft", "consistency" and "ascent_norm" (‖g‖₂ before the step). `lam` weighs what
    `compare` makes of `layers` and `norm`; `remat` takes time for memory and changes no bit; `differentiate` may be
    `compiled()`. InputError if `aux` is not a no-op, if α or λ is negative or infinite, and as in `consistency_loss`.
    """
    require_no_op(aux)
    require_not_negative(alpha=alpha, lam=lam)
    run_trunk = rematerialised if remat else trunk
    x, mask, answers = embed(base, batch.tokens), answer_mask(batch.labels), answer_labels(batch.labels)
    positions = mask.nonzero(as_tuple=True)

    def objective(task: Lora, aux: Aux) -> tuple[Tensor, Any]:  # Eq. 1, at θ and θ_aux at once
        record: Record = {}
        product = base_product if remat else recording(record)
        hidden = run_trunk(config, base, x, *with_aux(task, aux, scale, mask), product)
        logits = unembed(config, base, hidden[-1][positions])  # [n,V]
        return answer_loss(logits, answers), (hidden, record)

    def consistency(task: Lora) -> tuple[Tensor, Any]:  # Eqs. 3-5; called below, once all that it uses is there
        perturbed = run_trunk(config, base, x, *with_aux(task, undesirable, scale, mask), exact_product)
        return compare(hidden, perturbed, mask, layers=layers, norm=norm), ()

    (g_task, g_aux), sft, (hidden, record) = differentiate(objective, task, aux)
    undesirable: Aux = ascend(aux, g_aux, alpha)  # Eq. 2
    start = with_aux(task, aux, scale, mask)
    exact_product = relative_to_states(config, base, x, hidden, *start) if remat else relative_to(record)
    (g_cons,), cons, _ = differentiate(consistency, task)
    gradient = tree_map(lambda g, c: g + lam * c, g_task, g_cons)  # Eq. 6
    return gradient, {"sft": sft, "consistency": cons, "ascent_norm": global_norm(g_aux)}


def with_aux(task: Lora, aux: Aux, scale: float, mask: Tensor) -> tuple[list[Adapter], Steering | None]:
    """θ_aux as the decoder takes it: the task LoRA with another one stacked on it, or beside steering vectors."""
    if isinstance(aux, Tensor):
        return [(task, scale)], Steering(aux, mask)
    return [stack((task, scale), (aux, scale))], None


def lfu_lora(
    config: Config, base: Params, task: Lora, batch: Batch, generator: torch.Generator, **options: Unpack[LfuOptions]
) -> tuple[Lora, Metrics]:
    """Algorithm 1: the undesirable step moves a fresh LoRA of the same rank, scale and targets as the task's."""
    return lfu_gradient(config, base, task, init_like(config, base, task, generator), batch, **options)


def lfu_reps(
    config: Config, base: Params, task: Lora, batch: Batch, generator: torch.Generator, **options: Unpack[LfuOptions]
) -> tuple[Lora, Metrics]:
    """Algorithm 2: the undesirable step moves one steering vector per block, at the answer's positions."""
    aux = steering.zeros(config, device=batch.tokens.device, dtype=stream_dtype(base))
    return lfu_gradient(config, base, task, aux, batch, **options)


def init_like(config: Config, base: Params, task: Lora, generator: torch.Generator) -> Lora:
    """A fresh LoRA, a no-op, of the rank and targets of `task`."""
    rank, targets, stream = len(next(iter(task[0].values())).A), tuple(task[0]), stream_dtype(base)
    return lora.init(config, rank, generator=generator, targets=targets, dtype=stream)


def compiled() -> Differentiate:
    """`differentiate` through `torch.compile`: faster steps after minutes of compiling, once for all shapes.

    Only a batch of a single row is compiled anew. The compiler wants gradients that can be differentiated again, and
    then keeps only what it needs. It rounds less than the default in low precision: the results agree as far as that
    precision goes.
    """

    def whole(objective: Objective, *arguments: Any) -> tuple[tuple[Any, ...], Tensor, Any]:
        each = tuple(range(len(arguments)))
        gradients, (value, constants) = grad_and_value(objective, each, has_aux=True)(*arguments)
        return gradients, value, constants

    return torch.compile(whole, dynamic=True, fullgraph=True)


def ascend(aux: Tree, gradient: Tree, alpha: float) -> Tree:
    """Eq. 2: aux + α·g/‖g‖₂, one norm over the whole tree. Where ‖g‖₂ = 0 there is no direction: aux unchanged."""
    length = global_norm(gradient)
    step = torch.where(length > 0, alpha / length, 0.0)
    return tree_map(lambda a, g: a + step * g, aux, gradient)


def global_norm(tree: Any) -> Tensor:
    """The L2 norm of all tensors of a tree as one vector."""
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(leaf) for leaf in tree_leaves(tree)]))


def require_no_op(aux: Aux) -> None:
    """InputError unless every B (or every steering vector) is zero."""
    decisive = [aux] if isinstance(aux, Tensor) else [pair.B for layer in aux for pair in layer.values()]
    if torch.stack([tensor.any() for tensor in decisive]).any():
        part = "steering vector" if isinstance(aux, Tensor) else "B"
        raise InputError(
            f"The auxiliary component must start as a no-op, but some {part} is not zero: pass a fresh one."
        )


# --- the loop -------------------------------------------------------------------------------------


class StepMetrics(NamedTuple):
    """What one optimizer step reports."""

    step: int  # from 1
    epoch: int  # from 1
    tokens: int  # prompts included
    losses: dict[str, float]  # of the method: sft, in nats per token; for LfU also consistency and ascent_norm
    gradient_norm: float  # before clipping
    learning_rate: float


def train(
    config: Config,
    base: Params,
    task: Lora,
    optimizer: torch.optim.Optimizer,
    examples: Sequence[Example],
    method: Method,
    settings: Settings,
    start_step: int = 0,
) -> Iterator[StepMetrics]:
    """Algorithms 1 and 2, from step `start_step` to the last: after each optimizer step, yields that step's metrics.

    `optimizer` holds the tensors of `task` (see `adamw`) and updates them in place. Everything drawn at random is a
    function of (seed, epoch) or (seed, step, micro-batch), so a run that continues from a saved task and optimizer is
    the run that was never interrupted. InputError for settings that cannot be used, or no rows. Before the update of
    a step: FloatingPointError if a loss or gradient is not finite and MemoryError if a batch does not fit, both naming
    step and rows; ConnectionError if another process of the run is gone.
    """
    validate_settings(settings)
    if not examples:
        raise InputError("There are no rows to train on.")
    steps = total_steps(len(examples), settings)
    for step in range(start_step, steps):
        epoch, rows = rows_of_step(len(examples), settings, step)
        chosen = [examples[row] for row in rows]
        gradient, metrics = step_gradient(config, base, task, chosen, method, settings, step)
        norm, rate = float(global_norm(gradient)), learning_rate(step, steps, settings)
        apply(optimizer, task, clip(gradient, norm, settings.max_grad_norm), rate)
        yield StepMetrics(step + 1, epoch + 1, sum(len(example.tokens) for example in chosen), metrics, norm, rate)


def step_gradient(
    config: Config,
    base: Params,
    task: Lora,
    examples: Sequence[Example],
    method: Method,
    settings: Settings,
    step: int,
) -> tuple[Lora, dict[str, float]]:
    """Gradient and metrics of an optimizer step: Σ (n_b / N) · those of micro-batch b, with n_b of its N tokens.

    Where several processes train together, each computes some of the micro-batches, and all return the whole sum.
    """
    device, total = base.embed.device, sum(example.num_loss_tokens for example in examples)
    gradient: Lora = tree_map(torch.zeros_like, task)
    metrics: dict[str, float] = {}
    number, processes = rank_and_world_size()
    for index, micro_batch in enumerate(split_by_length(examples, settings.micro_batch_size)):
        if index % processes != number:
            continue
        generator = generator_for(settings, step, index, device)
        lengths, lines = [len(row.tokens) for row in micro_batch], [row.line_number for row in micro_batch]
        with out_of_memory_at(step, lengths, lines):
            part, values = method(config, base, task, collate(micro_batch, device), generator)
        require_finite(part, values, step, micro_batch)
        weight = sum(example.num_loss_tokens for example in micro_batch) / total
        gradient = tree_map(partial(torch.add, alpha=weight), gradient, part)
        metrics = {name: metrics.get(name, 0.0) + weight * float(value) for name, value in values.items()}
    return all_reduce(gradient, metrics) if processes > 1 else (gradient, metrics)


def adamw(task: Lora, settings: Settings) -> torch.optim.AdamW:
    """AdamW over the tensors of `task`, which it will update in place."""
    return torch.optim.AdamW(tree_leaves(task), lr=settings.learning_rate, weight_decay=settings.weight_decay)


def clip(gradient: Lora, norm: float, limit: float) -> Lora:
    """Scale the accumulated gradient down to the global norm `limit` if it is longer."""
    return tree_map(lambda g: g * (limit / norm), gradient) if norm > limit else gradient


def apply(optimizer: torch.optim.Optimizer, task: Lora, gradient: Lora, rate: float) -> None:
    """One optimizer step with this gradient and learning rate: the last line of Algorithms 1 and 2, which print plain
    descent where AdamW is what was run."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    for parameter, value in zip(tree_leaves(task), tree_leaves(gradient), strict=True):
        parameter.grad = value
    optimizer.step()
    optimizer.zero_grad()


def require_finite(gradient: Lora, metrics: Metrics, step: int, micro_batch: Sequence[Example]) -> None:
    """FloatingPointError if anything computed for this micro-batch is NaN or infinite, naming its rows."""
    if not all(math.isfinite(value) for value in [*metrics.values(), global_norm(gradient)]):
        values = ", ".join(f"{name} {float(value):.4g}" for name, value in metrics.items())
        raise FloatingPointError(
            f"Step {step + 1}: the loss or its gradient is not finite ({values}) for the rows of lines "
            f"{[example.line_number for example in micro_batch]}. No update was made. Lower the learning rate, "
            "α or λ, or use float32."
        )

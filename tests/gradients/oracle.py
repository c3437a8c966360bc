"""The method a second time, as the paper prints it: slow, plain, and without a line of lfu.

Everything lfu does cleverly is done here the long way. Three separate passes (Algorithms 1 and 2): the SFT loss of θ;
the ascent of the auxiliary component by a forward and a backward pass of its own; the consistency between a fresh,
detached clean pass and the perturbed one. Gradients come from `torch.autograd` and leaves that require them. Rows are
computed one by one at their own length, so there is no padding and no mask to get wrong; task and auxiliary LoRA are
two separate terms.

The decoder is an argument: see `decoders.py` for one written out by hand, in float64, and for transformers' own.

`wrong` makes one deliberate error, to show that a comparison with this file would notice it. Read next: `decoders.py`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

Row = tuple[list[int], int]
"""The tokens of an example, and how many of them are given: the prompt. The rest is the answer y_1 .. y_T."""
Steering = tuple[Tensor, list[int]]
"""Vectors [K, D], and the positions they are added at after each block."""
Decoder = Callable[[list[int], list[Any], Steering | None], tuple[list[Tensor], Tensor]]
"""(tokens, (LoRA, scale) pairs, steering) -> the residual stream [T, D] before the first block and after each of the
K blocks, K + 1 entries, and the logits [T, V]."""
Leaves = list[Tensor]

WRONG = {
    "h carries a gradient": "both",
    "descent": "both",
    "consistency one position late": "both",
    "labels unshifted": "both",
    "one norm per tensor": "both",
    "gradient through the ascent": "both",
    "h before the block": "both",
    "steering everywhere": "steering",
    "steering one position late": "steering",
}
"""The deliberate errors, and the kind of auxiliary component they concern."""


class Result(NamedTuple):
    """Gradients are in the order of the leaves of what they belong to: the task LoRA, but for `ascent`."""

    sft_gradient: Leaves
    ascent: Leaves  # with respect to the auxiliary component
    consistency_gradient: Leaves
    gradient: Leaves
    sft: float
    consistency: float
    ascent_norm: float


# --- Eqs. 1 to 6 ----------------------------------------------------------------------------------


def lfu(
    decoder: Decoder,
    task: Any,
    aux: Any,
    rows: list[Row],
    *,
    scale: float,
    alpha: float,
    lam: float,
    layers: set[int] | None = None,
    norm: str = "mean",
    wrong: str = "",
) -> Result:
    """Eq. 6: the gradient with respect to the task LoRA, and what it is made of. `aux` is a LoRA, or vectors [K, D]."""
    chosen = sorted(layers or range(1, len(task) + 1))
    task, aux = requiring_gradients(task), requiring_gradients(aux)

    # Eq. 1
    sft = sft_loss(decoder, rows, task, None, scale, wrong)
    g_sft = torch.autograd.grad(sft, leaves(task))

    # Eq. 2
    followed = wrong == "gradient through the ascent"
    g_aux = torch.autograd.grad(sft_loss(decoder, rows, task, aux, scale, wrong), leaves(aux), create_graph=followed)
    moved = ascended(aux, g_aux, alpha, wrong)
    if not followed:
        moved = rebuilt(moved, [tensor.detach() for tensor in leaves(moved)])

    # Eqs. 3 to 5
    consistency = consistency_loss(decoder, rows, task, moved, scale, chosen, norm, wrong)
    g_consistency = torch.autograd.grad(consistency, leaves(task), allow_unused=True, materialize_grads=True)

    # Eq. 6
    gradient = [first + lam * second for first, second in zip(g_sft, g_consistency)]
    values = sft.item(), consistency.item(), length(g_aux).item()
    return Result(list(g_sft), [g.detach() for g in g_aux], list(g_consistency), gradient, *values)


def sft_gradient(decoder: Decoder, task: Any, rows: list[Row], *, scale: float, wrong: str = "") -> Leaves:
    """Eq. 1 alone."""
    task = requiring_gradients(task)
    return list(torch.autograd.grad(sft_loss(decoder, rows, task, None, scale, wrong), leaves(task)))


def sft_loss(decoder: Decoder, rows: list[Row], task: Any, aux: Any, scale: float, wrong: str) -> Tensor:
    """Eq. 1: mean negative log-likelihood of all answer tokens."""
    terms = []
    for row in rows:
        _, logits = run(decoder, row, task, aux, scale, wrong)
        log_partition = logits.exp().sum(dim=-1).log()
        for t in predicting(row):
            target = row[0][t if wrong == "labels unshifted" else t + 1]
            terms.append(log_partition[t] - logits[t, target])
    return sum(terms) / len(terms)


def ascended(aux: Any, gradient: Leaves, alpha: float, wrong: str) -> Any:
    """Eq. 2: one step of length α along the gradient."""
    steps = []
    for g in gradient:
        own = g.norm(dim=-1, keepdim=True) if isinstance(aux, Tensor) else g.norm()
        steps.append(alpha * g / (own + 1e-300 if wrong == "one norm per tensor" else length(gradient)))
    sign = -1 if wrong == "descent" else 1
    return rebuilt(aux, [start + sign * step for start, step in zip(leaves(aux), steps)])


def length(tensors: Leaves) -> Tensor:
    """Their L2 norm as one vector."""
    return sum((tensor**2).sum() for tensor in tensors).sqrt()


def consistency_loss(
    decoder: Decoder, rows: list[Row], task: Any, aux: Any, scale: float, chosen: list[int], norm: str, wrong: str
) -> Tensor:
    """Eqs. 3 to 5: the mean, over the answer's predicting positions and the chosen blocks, of ‖detach(h) - h'‖²."""
    terms = []
    for row in rows:
        clean, _ = run(decoder, row, task, None, scale, wrong)
        perturbed, _ = run(decoder, row, task, aux, scale, wrong)
        for t in predicting(row, late=wrong == "consistency one position late"):
            for number in chosen:
                index = number - 1 if wrong == "h before the block" else number
                h = clean[index][t] if wrong == "h carries a gradient" else clean[index][t].detach()
                squares = (h - perturbed[index][t]) ** 2
                terms.append(squares.mean() if norm == "mean" else squares.sum())
    return sum(terms) / len(terms)


def run(decoder: Decoder, row: Row, task: Any, aux: Any, scale: float, wrong: str) -> tuple[list[Tensor], Tensor]:
    """The decoder on one row with the task LoRA, and with an auxiliary component if there is one."""
    if not isinstance(aux, Tensor):
        return decoder(row[0], [(lora, scale) for lora in (task, aux) if lora is not None], None)
    positions = predicting(row, late=wrong == "steering one position late")
    if wrong == "steering everywhere":
        positions = list(range(len(row[0])))
    return decoder(row[0], [(task, scale)], (aux, positions))


def predicting(row: Row, *, late: bool = False) -> list[int]:
    """The positions whose next token belongs to the answer; `late` gives those of the answer's own tokens."""
    tokens, given = row
    return [t + late for t in range(len(tokens) - 1) if t + 1 >= given]


# --- trees ----------------------------------------------------------------------------------------


def leaves(tree: Any) -> Leaves:
    """The tensors of a LoRA (or the one of steering) in a fixed order."""
    if isinstance(tree, Tensor):
        return [tree]
    return [matrix for layer in tree for pair in layer.values() for matrix in pair]


def rebuilt(tree: Any, tensors: Leaves) -> Any:
    """A tree like `tree` that holds `tensors`."""
    if isinstance(tree, Tensor):
        return tensors[0]
    remaining = iter(tensors)
    return [{name: (next(remaining), next(remaining)) for name in layer} for layer in tree]


def requiring_gradients(tree: Any) -> Any:
    """A copy whose tensors are leaves that require gradients."""
    return rebuilt(tree, [tensor.detach().clone().requires_grad_() for tensor in leaves(tree)])

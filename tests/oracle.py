"""The method a second time, as the paper prints it: slow, plain, and without a line of lfu.

Everything lfu does cleverly is done here the long way. Three separate passes (Algorithms 1 and 2): the SFT loss of θ;
the ascent of the auxiliary component by a forward and a backward pass of its own; the consistency between a fresh,
detached clean pass and the perturbed one. Gradients come from `torch.autograd` and leaves that require them. Rows are
computed one by one at their own length, so there is no padding and no mask to get wrong; attention goes head by head;
rotary embedding is multiplication by complex numbers; task and auxiliary LoRA are two separate terms.

`wrong` makes one deliberate error, to show that a comparison with this file would notice it.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

Row = tuple[list[int], int]
"""The tokens of an example, and how many of them are given: the prompt. The rest is the answer y_1 .. y_T."""
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
    gradient: Leaves  # with respect to the task LoRA, in the order of its tensors
    sft: float
    consistency: float
    ascent_norm: float


# --- Eqs. 1 to 6 ----------------------------------------------------------------------------------


def sft(config: Any, params: Any, task: Any, rows: list[Row], *, scale: float, wrong: str = "") -> tuple[Leaves, float]:
    """Eq. 1: the gradient with respect to the task LoRA, and the loss."""
    task = requiring_gradients(task)
    loss = sft_loss(config, params, rows, [(task, scale)], None, wrong)
    return list(torch.autograd.grad(loss, leaves(task))), loss.item()


def lfu(
    config: Any,
    params: Any,
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
    """Eq. 6: the gradient with respect to the task LoRA. `aux` is a LoRA, or steering vectors [K, D]."""
    task, aux = requiring_gradients(task), requiring_gradients(aux)
    steered = isinstance(aux, Tensor)

    def components(aux: Any) -> tuple[list[Any], Tensor | None]:
        return ([(task, scale)], aux) if steered else ([(task, scale), (aux, scale)], None)

    # Eq. 1
    loss = sft_loss(config, params, rows, [(task, scale)], None, wrong)
    g_sft = torch.autograd.grad(loss, leaves(task))

    # Eq. 2
    second_order = wrong == "gradient through the ascent"
    ascent = torch.autograd.grad(
        sft_loss(config, params, rows, *components(aux), wrong), leaves(aux), create_graph=second_order
    )
    length = math.sqrt(sum((g**2).sum().item() for g in ascent))
    moved = []
    for start, g in zip(leaves(aux), ascent):
        own = g.norm(dim=-1, keepdim=True) if steered else g.norm()
        step = alpha * g / (own + 1e-300 if wrong == "one norm per tensor" else length)
        moved.append(start - step if wrong == "descent" else start + step)
    moved = rebuilt(aux, moved if second_order else [tensor.detach() for tensor in moved])

    # Eqs. 3 to 5
    total, count = torch.zeros((), dtype=torch.float64), 0
    chosen = sorted(layers or range(1, config.num_hidden_layers + 1))
    for row in rows:
        clean = decoder(config, params, row, [(task, scale)], None, wrong)
        perturbed = decoder(config, params, row, *components(moved), wrong)
        for t in predicting(row, late=wrong == "consistency one position late"):
            count += 1
            for number in chosen:
                index = number - 1 if wrong == "h before the block" else number
                h = clean[index][t]
                if wrong != "h carries a gradient":
                    h = h.detach()
                distance = ((h - perturbed[index][t]) ** 2).sum()
                total = total + (distance / len(h) if norm == "mean" else distance)
    consistency = total / (count * len(chosen))
    g_consistency = torch.autograd.grad(consistency, leaves(task), allow_unused=True, materialize_grads=True)

    # Eq. 6
    gradient = [first + lam * second for first, second in zip(g_sft, g_consistency)]
    return Result(gradient, loss.item(), consistency.item(), length)


def sft_loss(
    config: Any, params: Any, rows: list[Row], adapters: list[Any], vectors: Tensor | None, wrong: str
) -> Tensor:
    """Mean negative log-likelihood of all answer tokens."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in rows:
        tokens, _ = row
        h = decoder(config, params, row, adapters, vectors, wrong)[-1]
        logits = normed(h, params.norm, config.rms_norm_eps) @ params.lm_head.T
        log_partition = logits.exp().sum(dim=-1).log()
        for t in predicting(row):
            target = tokens[t if wrong == "labels unshifted" else t + 1]
            total = total + log_partition[t] - logits[t, target]
            count += 1
    return total / count


def predicting(row: Row, *, late: bool = False) -> list[int]:
    """The positions whose next token belongs to the answer; `late` gives those of the answer's own tokens."""
    tokens, given = row
    return [t + late for t in range(len(tokens) - 1) if t + 1 >= given]


# --- the decoder, one row at a time ---------------------------------------------------------------


def decoder(
    config: Any, params: Any, row: Row, adapters: list[Any], vectors: Tensor | None, wrong: str = ""
) -> list[Tensor]:
    """The residual stream [T, D] before the first block and behind each of the K blocks: K + 1 entries."""
    tokens, _ = row
    length, size = len(tokens), config.head_dim
    steered = torch.zeros(length, 1, dtype=torch.float64)
    steered[predicting(row, late=wrong == "steering one position late")] = 1.0
    if wrong == "steering everywhere":
        steered[:] = 1.0

    group = config.num_attention_heads // config.num_key_value_heads
    window = config.sliding_window or length
    seen = torch.tensor([[q - window < k <= q for k in range(length)] for q in range(length)])
    turn = rotations(config, length)

    x = params.embed[tokens]
    stream = [x]
    for index, layer in enumerate(params.layers):
        z = normed(x, layer.input_layernorm, config.rms_norm_eps)
        q, k, v = (linear(layer, index, name, z, adapters) for name in ("q_proj", "k_proj", "v_proj"))
        heads = []
        for head in range(config.num_attention_heads):
            mine, shared = (
                slice(head * size, (head + 1) * size),
                slice(head // group * size, (head // group + 1) * size),
            )
            query, key, value = q[:, mine], k[:, shared], v[:, shared]
            if config.model_type == "qwen3":
                query = normed(query, layer.q_norm, config.rms_norm_eps)
                key = normed(key, layer.k_norm, config.rms_norm_eps)
            scores = rotated(query, turn) @ rotated(key, turn).T / math.sqrt(size)
            weights = torch.where(seen, scores.exp(), 0.0)
            heads.append(weights / weights.sum(dim=-1, keepdim=True) @ value)
        x = x + linear(layer, index, "o_proj", torch.cat(heads, dim=-1), adapters)
        z = normed(x, layer.post_attention_layernorm, config.rms_norm_eps)
        gate, up = linear(layer, index, "gate_proj", z, adapters), linear(layer, index, "up_proj", z, adapters)
        x = x + linear(layer, index, "down_proj", gate / (1 + (-gate).exp()) * up, adapters)
        if vectors is not None:
            x = x + steered * vectors[index]
        stream.append(x)
    return stream


def linear(layer: Any, index: int, name: str, x: Tensor, adapters: list[Any]) -> Tensor:
    """W x, and for every adapter a separate s·B(A x)."""
    y = torch.einsum("oi,ti->to", getattr(layer, name), x)
    for lora, scale in adapters:
        if name in lora[index]:
            A, B = lora[index][name]
            y = y + scale * torch.einsum("or,ri,ti->to", B, A, x)
    return y


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x / ((x * x).sum(dim=-1, keepdim=True) / x.shape[-1] + eps).sqrt()


def rotations(config: Any, length: int) -> Tensor:  # [T, h/2] complex
    """e^(i·t·ω). Frequencies and angles are single precision by convention, so here too, and only here."""
    frequencies = []
    for pair in range(config.head_dim // 2):
        omega = 1 / config.rope_theta ** torch.tensor(2 * pair / config.head_dim)
        if config.rope_scaling is not None:
            factor, low, high, original = config.rope_scaling
            turns = original * omega / (2 * math.pi)
            if turns < low:
                omega = omega / factor
            elif turns < high:
                share = (turns - low) / (high - low)
                omega = (1 - share) * omega / factor + share * omega
        frequencies.append(omega)
    angles = torch.arange(length)[:, None] * torch.stack(frequencies)
    return torch.complex(angles.cos().double(), angles.sin().double())


def rotated(x: Tensor, turn: Tensor) -> Tensor:
    """The pair (x_i, x_{i+h/2}) as one complex number, turned."""
    half = x.shape[-1] // 2
    z = torch.complex(x[:, :half], x[:, half:]) * turn
    return torch.cat([z.real, z.imag], dim=-1)


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
    return rebuilt(tree, [tensor.detach().clone().requires_grad_() for tensor in leaves(tree)])

"""LfU as its authors released it (https://github.com/yunpal/LfU), which is not the paper's algorithm.

The published numbers come from that code, so its two trainers are methods here, under the same loop as the others:

- `released_lora` has no auxiliary component. It moves the task LoRA itself, A and B, along the gradient of a *second*
  batch, and asks the states of the first batch to stay.
- `released_reps` keeps one vector per block through the whole run and trains it with Adam to *raise* the loss of a
  second batch. The states of that second batch, turned towards the vectors, are what the model's states on the first
  batch are pulled to: the other side of Eq. 5 carries the gradient.

Both compare K+1 states, at the positions of the answer's own tokens. `docs/paper-and-code.md` measures what each of
these differences does to the gradient, and says what of the released code is not reproduced. An aside, the last
one after `methods.py`. Facts: `train/sft/trainer.py` and `run_*.sh` in the authors' repository.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.adam import adam
from torch.utils._pytree import tree_map

from lfu.data.batches import IGNORED, Batch, Example, collate
from lfu.errors import InputError
from lfu.lora import Lora
from lfu.loss import consistency_loss, sft_loss
from lfu.model import (
    Config,
    Params,
    Product,
    Record,
    base_product,
    embed,
    forward,
    linear_with_adapters,
    recording,
    relative_to,
    rms_norm,
    trunk,
)
from lfu.train import Metrics, ascend, differentiate, global_norm, sft_gradient

State = dict[str, Tensor]
"""What `released_reps` carries from one micro-batch to the next. It belongs into a checkpoint."""


def released_lora(
    config: Config,
    base: Params,
    task: Lora,
    batch: Batch,
    generator: torch.Generator,
    *,
    examples: Sequence[Example],
    scale: float,
    alpha: float,
    lam: float,
) -> tuple[Lora, Metrics]:
    """The released LfU (LoRA): the task LoRA itself is moved by α·g/‖g‖₂, with g from a second batch of `examples`.

    Returns what `lfu_gradient` returns. The consistency term is differentiated where the parameters were moved to.
    """
    answer = batch.labels != IGNORED
    x = embed(base, batch.tokens)

    def objective(task: Lora) -> tuple[Tensor, Any]:
        record: Record = {}
        logits, hidden = forward(config, base, batch.tokens, [(task, scale)], product=recording(record))
        return sft_loss(logits, batch.labels), (states(config, base, x, hidden), record)

    def consistency(moved: Lora) -> tuple[Tensor, Any]:
        perturbed = trunk(config, base, x, [(moved, scale)], product=relative_to(record))
        return consistency_loss(clean, states(config, base, x, perturbed), answer), ()

    ascent, _ = sft_gradient(config, base, task, second_batch(examples, batch, generator), scale=scale)
    (g_task,), sft, (clean, record) = differentiate(objective, task)
    (g_cons,), cons, _ = differentiate(consistency, ascend(task, ascent, alpha))
    gradient = tree_map(lambda g, c: g + lam * c, g_task, g_cons)
    return gradient, {"sft": sft, "consistency": cons, "ascent_norm": global_norm(ascent)}


def released_reps(
    config: Config, base: Params, task: Lora, batch: Batch, generator: torch.Generator, *,
    examples: Sequence[Example], scale: float, alpha: float, lam: float, learning_rate: float, micro_batches: int,
    state: State,
) -> tuple[Lora, Metrics]:  # fmt: skip
    """The released LfU (RepS): the model's states on `batch` are pulled to the steered states on a second batch.

    Returns what `lfu_gradient` returns. `state` is filled at the first call and updated in place: the vectors take one
    Adam step every `micro_batches` calls, from the gradient of that call alone, as the released trainer overwrites the
    others. `learning_rate` is theirs and constant.
    """
    batch, other = padded(batch), padded(second_batch(examples, batch, generator))
    x, x_other = embed(base, batch.tokens), embed(base, other.tokens)
    if not state:
        state |= new_state(config, generator, x.dtype)

    def reversed_loss(vectors: Tensor) -> tuple[Tensor, Any]:
        product = steered_mlp_product(base, task, scale, vectors, alpha)
        logits, hidden = forward(config, base, other.tokens, [(without_down_proj(task), scale)], product=product)
        return sft_loss(logits, other.labels), states(config, base, x_other, hidden)

    def objective(task: Lora) -> tuple[Tensor, Any]:
        logits, hidden = forward(config, base, batch.tokens, [(task, scale)])
        cons = consistency_loss(undesirable, states(config, base, x, hidden), batch.labels != IGNORED)
        sft = sft_loss(logits, batch.labels)
        return sft + lam * cons, {"sft": sft, "consistency": cons}

    (ascent,), _, steered = differentiate(reversed_loss, state["vectors"])
    undesirable = [match_length(h, batch.tokens.shape[1]) for h in steered]
    (gradient,), _, metrics = differentiate(objective, task)
    update_vectors(state, ascent, learning_rate, micro_batches)
    return gradient, metrics | {"ascent_norm": global_norm(ascent)}


# --- what both share ------------------------------------------------------------------------------


def second_batch(examples: Sequence[Example], batch: Batch, generator: torch.Generator) -> Batch:
    """As many rows as the batch has, drawn from all rows without regard to it."""
    order = torch.randperm(len(examples), generator=generator, device=generator.device)
    return collate([examples[row] for row in order[: len(batch.tokens)]], batch.tokens.device)


def states(config: Config, base: Params, x: Tensor, hidden: list[Tensor]) -> list[Tensor]:  # -> K+1 x [B,T,D]
    """What transformers calls hidden states: the embeddings, then h_1 .. h_{K-1}, then h_K after the final norm."""
    return [x, *hidden[:-1], rms_norm(hidden[-1], base.norm, config.rms_norm_eps)]


# --- the steering of the released RepS ------------------------------------------------------------


def steered_mlp_product(base: Params, task: Lora, scale: float, vectors: Tensor, alpha: float) -> Product:
    """The frozen products, where the output m of each MLP, task LoRA included, is turned towards v_l at every position:
    m ← ‖m‖·normalize(normalize(m) + α·normalize(v_l))."""

    def product(layer: int, name: str, x: Tensor, W: Tensor) -> Tensor:
        if name != "down_proj":
            return base_product(layer, name, x, W)
        y = linear_with_adapters(base.layers[layer], layer, [(task, scale)], base_product)(name, x)
        direction = F.normalize(y, dim=-1) + alpha * F.normalize(vectors[layer], dim=-1)
        return y.norm(dim=-1, keepdim=True) * F.normalize(direction, dim=-1)

    return product


def without_down_proj(task: Lora) -> Lora:
    """The adapters beside `steered_mlp_product`, which has that of down_proj already."""
    return [{name: pair for name, pair in layer.items() if name != "down_proj"} for layer in task]


def match_length(h: Tensor, length: int) -> Tensor:  # [B,S,D] -> [B,T,D]
    """States of another batch as counterparts: position by position if it is as long, else the last one everywhere."""
    return h if h.shape[1] == length else h[:, -1:].expand(-1, length, -1)


def padded(batch: Batch) -> Batch:  # [B,T] -> [B,T'], T' a multiple of 8
    """Padding as in the released code, where the states at the padding matter: to a multiple of 8, with EOS."""
    extra = -batch.tokens.shape[1] % 8
    tokens, labels = F.pad(batch.tokens, (0, extra)), F.pad(batch.labels, (0, extra), value=IGNORED)
    # EOS is the last label of a row, and padding is all that follows it.
    last = torch.arange(tokens.shape[1], device=tokens.device).mul(labels != IGNORED).argmax(dim=1)
    eos = tokens[torch.arange(len(tokens), device=tokens.device), last]
    after_last = torch.arange(tokens.shape[1], device=tokens.device) > last[:, None]
    return Batch(torch.where(after_last, eos[:, None], tokens), labels)


def new_state(config: Config, generator: torch.Generator, dtype: torch.dtype) -> State:
    """Vectors ~ N(0, 1), one per block, with Adam's moments and step, and the number of calls so far."""
    shape = (config.num_hidden_layers, config.hidden_size)
    vectors = torch.randn(shape, generator=generator, device=generator.device, dtype=dtype)
    moments = {"exp_avg": torch.zeros_like(vectors), "exp_avg_sq": torch.zeros_like(vectors)}
    counters = {"step": torch.zeros((), device="cpu"), "calls": torch.zeros((), dtype=torch.int64, device="cpu")}
    return {"vectors": vectors, **moments, **counters}


def update_vectors(state: State, ascent: Tensor, learning_rate: float, micro_batches: int) -> None:
    """Every `micro_batches` calls, Adam moves the vectors so that the loss after `ascent` rises; in place."""
    state["calls"] += 1
    if state["calls"] % micro_batches:
        return
    adam(
        [state["vectors"]], [ascent], [state["exp_avg"]], [state["exp_avg_sq"]], [], [state["step"]],
        lr=learning_rate, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, amsgrad=False, maximize=True,
    )  # fmt: skip


def require_rows(name: str, examples: Sequence[Example]) -> None:
    """InputError unless there are rows to draw second batches from."""
    if not examples:
        raise InputError(f"The method {name} draws a second batch for each micro-batch: give bind the examples.")

"""LfU (RepS) split at the end of the prompt: the same gradient from 3.2 passes in place of 4, of which SFT has 2.

    python -m experiments.split --model SMOLLM2 --dtype bfloat16

Steering acts on the answer's positions only, and attention looks back only. So the perturbed pass finds the prompt as
the clean pass left it: its keys and values. It has to be run over the answer alone, and so has the backward pass of
either loss, down to the cotangents of the prompt's keys and values; these are added up, and one backward pass through
the prompt takes both. At an answer of 60 % that is 0.4 (1 + 1) + 0.6 (2 + 2) = 3.2 passes.

This is not how the project trains: rows would need prompts of one length, or a second kind of padding, and the two
passes would no longer be the two that the paper writes down.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import vjp
from torch.utils._pytree import tree_map

from lfu import model, steering
from lfu.data.batches import Batch
from lfu.lora import Lora
from lfu.loss import answer_labels, answer_loss, answer_mask, consistency_loss
from lfu.model import (
    Attend,
    Config,
    Params,
    Product,
    Record,
    attention_mask,
    base_product,
    block,
    embed,
    linear_with_adapters,
    recording,
    relative_to,
    rotary_tables,
    unembed,
)
from lfu.profiling import bench
from lfu.profiling.bench import ALPHA, RANK, SCALE, Work
from lfu.train import ascend, differentiate, lfu_gradient, sft_gradient

Past = list[tuple[Tensor, Tensor]]
"""The prompt's keys and values, [B,G,S,h] each, for every block."""


def split_gradient(
    config: Config, base: Params, task: Lora, batch: Batch, *, scale: float, alpha: float, lam: float
) -> Lora:
    """`lfu_gradient` with steering vectors, for rows whose prompts are of one length and whose answers fill the row."""
    mask, answers = answer_mask(batch.labels), answer_labels(batch.labels)
    start = int(mask[0].nonzero()[0])  # the first position that is steered
    x, mask = embed(base, batch.tokens), mask[:, start:]
    vectors = steering.zeros(config, device=x.device, dtype=x.dtype)

    def prompt(task: Lora) -> Past:
        return through(config, base, x[:, :start], task, scale, [None] * len(base.layers), 0, None, base_product)[1]

    def answer(task: Lora, past: Past, vectors: Tensor, product: Product) -> list[Tensor]:
        steered = mask[..., None] * vectors[:, None, None]  # [K,B,T,D]
        return through(config, base, x[:, start:], task, scale, past, start, steered, product)[0]

    def sft(task: Lora, past: Past, vectors: Tensor) -> tuple[Tensor, Any]:
        record: Record = {}
        hidden = answer(task, past, vectors, recording(record))
        return answer_loss(unembed(config, base, hidden[-1][mask]), answers), (hidden, record)

    def consistency(task: Lora, past: Past) -> tuple[Tensor, Any]:
        return consistency_loss(hidden, answer(task, past, undesirable, relative_to(record)), mask), ()

    past, into_prompt, *_ = vjp(prompt, task)
    (g_task, g_past, g_vectors), _, (hidden, record) = differentiate(sft, task, past, vectors)
    undesirable = ascend(vectors, g_vectors, alpha)
    (c_task, c_past), _, _ = differentiate(consistency, task, past)
    with torch.no_grad():
        (p_task,) = into_prompt(tree_map(lambda g, c: g + lam * c, g_past, c_past), retain_graph=False)
    return tree_map(lambda g, c, p: g + lam * c + p, g_task, c_task, p_task)


def through(
    config: Config,
    base: Params,
    x: Tensor,
    task: Lora,
    scale: float,
    past: Sequence[tuple[Tensor, Tensor] | None],
    start: int,
    steered: Tensor | None,
    product: Product,
) -> tuple[list[Tensor], Past]:
    """The blocks over positions from `start` on, after the keys and values of those before: states, and theirs."""
    positions = torch.arange(start, start + x.shape[1], device=x.device)
    rotary = rotary_tables(config, positions, x.dtype)
    hidden: list[Tensor] = []
    present: Past = []
    seen = attention_mask(positions, torch.arange(start + x.shape[1], device=x.device), config.sliding_window)
    for index, layer in enumerate(base.layers):
        attend = attention(past[index], seen, present)
        x = block(config, layer, x, rotary, linear_with_adapters(layer, index, [(task, scale)], product), attend)
        x = x if steered is None else x + steered[index]
        hidden.append(x)
    return hidden, present


def attention(before: tuple[Tensor, Tensor] | None, seen: Tensor, present: Past) -> Attend:
    """Attention to what came before and to itself; its own keys and values are appended to `present`."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        present.append((k, v))
        if before is not None:
            k, v = (torch.cat(each, dim=2) for each in zip(before, (k, v)))
        k, v = (heads.repeat_interleave(q.shape[1] // heads.shape[1], dim=1) for heads in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)

    return attend


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=5)
    parsed = parser.parse_args()
    config, base = model.load(parsed.model, dtype=getattr(torch, parsed.dtype))
    batch = bench.random_batch(config, 4, 200, 120, 0, torch.device("cpu"))
    task, vectors = bench.fresh_task(config, base, RANK), steering.zeros(config)
    whole = partial(lfu_gradient, config, base, task, vectors, batch)
    split = partial(split_gradient, config, base, task, batch)
    works: dict[str, Work] = {"sft": partial(sft_gradient, config, base, task, batch, scale=SCALE)}
    for name, gradient in (("lfu-reps", whole), ("lfu-reps, split", split)):
        works[name] = partial(gradient, scale=SCALE, alpha=ALPHA, lam=0.1)
    times = bench.interleaved(works, parsed.rounds)
    for name, seconds in times.items():
        print(f"{name}: {bench.spread(seconds, times['sft'])} x SFT")


if __name__ == "__main__":
    main()

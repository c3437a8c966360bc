"""The likelihood of given answers, token by token. Read next: `generative.py`."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lfu.data.batches import Example, collate, split_by_length
from lfu.errors import InputError
from lfu.evaluation.estimates import Estimate, ratio
from lfu.lora import Adapter
from lfu.loss import answer_labels, answer_mask
from lfu.model import Config, Params, embed, trunk, unembed


def answer_nll(
    config: Config,
    params: Params,
    examples: Sequence[Example],
    adapters: Sequence[Adapter] = (),
    *,
    batch_size: int = 16,
) -> Estimate:
    """Mean negative log-likelihood of the labelled tokens, in nats; n counts tokens, the error is over rows."""

    def losses(batch: Sequence[Example]) -> list[float]:
        return [-row.logprob for row in row_likelihoods(config, params, batch, adapters)]

    return per_token(examples, losses, batch_size)


def per_token(
    examples: Sequence[Example], measure: Callable[[Sequence[Example]], list[float]], batch_size: int
) -> Estimate:
    """What `measure` finds for each row of a batch, summed, over all labelled tokens; rows come sorted by length."""
    batches = split_by_length(examples, batch_size)
    counts = [each.num_loss_tokens for batch in batches for each in batch]
    return ratio([found for batch in batches for found in measure(batch)], counts)


class Likelihood(NamedTuple):
    """Of the labelled tokens of one row."""

    logprob: float  # Σ log P, in nats
    greedy: bool  # each of them is the most likely token at its place


def row_likelihoods(
    config: Config, params: Params, examples: Sequence[Example], adapters: Sequence[Adapter]
) -> list[Likelihood]:
    """The likelihood of each row's labelled tokens, in the stream dtype; logits only where they are needed."""
    batch = collate(examples, params.embed.device)
    mask = answer_mask(batch.labels)
    hidden = trunk(config, params, embed(params, batch.tokens), adapters)[-1][mask]  # [n,D]
    logprobs, misses = [], []
    for h, wanted in zip(hidden.split(POSITIONS), answer_labels(batch.labels).split(POSITIONS)):
        log_p = unembed(config, params, h).log_softmax(-1)  # [.,V]
        logprobs.append(log_p.gather(1, wanted[:, None])[:, 0])
        misses.append(log_p.argmax(-1) != wanted)
    sums = sum_rows(mask, torch.cat(logprobs)), sum_rows(mask, torch.cat(misses).int())
    if strange := [each.line_number for each, total in zip(examples, sums[0]) if not math.isfinite(total)]:
        raise InputError(f"The model's logits for the row of line {strange[0]} are not finite: see its --dtype.")
    return [Likelihood(total, missed == 0) for total, missed in zip(*sums)]


def sum_rows(mask: Tensor, values: Tensor) -> list[float]:  # [B,T] bool, [n] -> B
    """Sums over each row of values that stand at the positions of the mask."""
    rows = mask.nonzero()[:, 0]
    return torch.zeros(len(mask), dtype=values.dtype, device=values.device).index_add(0, rows, values).tolist()


POSITIONS = 4096
"""How many positions have their logits in memory at once."""

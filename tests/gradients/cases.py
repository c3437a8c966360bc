"""The tiny problem that every chapter of this folder differentiates, and lfu's gradients of it, part by part.

The parts: "sft", the gradient of the SFT loss (Eq. 1); "ascent", the direction of the ascent (Eq. 2); "consistency",
the gradient of the consistency loss (Eq. 5); "whole", their sum (Eq. 6). Read next: `test_oracle.py`.
"""

from functools import cache
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from compare import distance, flat, relative
from gradients import oracle
from gradients.decoders import plain
from tiny import random_params, tiny_config
from torch import Tensor
from torch.utils._pytree import tree_map

from lfu import lora, steering, train
from lfu.data.batches import Batch, Example, collate
from lfu.lora import Lora
from lfu.loss import answer_mask, sft_loss
from lfu.model import Config, Params, Steering, forward
from lfu.train import Aux, ascend, lfu_gradient, sft_gradient

SETTINGS = {"scale": 2.0, "alpha": 0.1, "lam": 0.2}
"""With this λ both terms of Eq. 6 matter."""
AUXILIARIES = ("lora", "steering")
PARTS = ("sft", "ascent", "consistency", "whole")

EXACT = 1e-12
"""Relative error in float64. Measured: 6e-14 against the oracle, 1.1e-13 where its decoder is transformers' own."""


class Case(NamedTuple):
    """A tiny problem: a model, a task LoRA that is not zero anywhere, and three rows of unequal length."""

    config: Config
    base: Params
    task: Lora
    rows: list[oracle.Row]

    @property
    def batch(self) -> Batch:
        return batch_of(self.rows)


@cache
def case(kind: str = "llama31") -> Case:
    config = tiny_config(kind)
    if config.sliding_window:
        config = config._replace(sliding_window=4)  # shorter than the rows
    generator = torch.Generator().manual_seed(7)
    task = tree_map(lambda tensor: randn(tensor, generator, 0.3), lora.init(config, 2, generator=generator))
    # (length, prompt): the last prompt is one token long, so the first position predicts.
    rows = [
        (torch.randint(config.vocab_size, (length,), generator=generator).tolist(), prompt)
        for length, prompt in ((10, 4), (12, 9), (6, 1))
    ]
    return Case(config, random_params(config, seed=1), task, rows)


def batch_of(rows: list[oracle.Row]) -> Batch:
    return collate([Example(tokens, prompt, number) for number, (tokens, prompt) in enumerate(rows, 1)])


def fresh(config: Config, auxiliary: str) -> Aux:
    """An auxiliary component in float64 that changes nothing yet."""
    if auxiliary == "steering":
        return steering.zeros(config).double()
    return tree_map(Tensor.double, lora.init(config, 2, generator=torch.Generator().manual_seed(11)))


def randn(like: Tensor, generator: torch.Generator, std: float = 1.0) -> Tensor:
    return std * torch.randn(like.shape, generator=generator, dtype=torch.float64)


def values(case: Case, task: Lora, aux: Aux | None) -> tuple[Tensor, list[Tensor]]:
    """The SFT loss and the representations, with task and auxiliary adapter one after the other."""
    config, base, _, rows = case
    tokens, labels = batch_of(rows)
    steered = isinstance(aux, Tensor)
    adapters = [(task, 2.0)] if steered or aux is None else [(task, 2.0), (aux, 2.0)]
    logits, hidden = forward(config, base, tokens, adapters, Steering(aux, answer_mask(labels)) if steered else None)
    return sft_loss(logits, labels), hidden


# --- the parts of lfu's gradient ------------------------------------------------------------------


def part(name: str, case: Case, auxiliary: str, **changed: Any) -> Tensor:
    """One part, flat."""
    if name == "sft":
        return flat(sft_gradient(case.config, case.base, case.task, case.batch, scale=SETTINGS["scale"])[0])
    if name == "ascent":
        return flat(ascent(case, auxiliary, **changed).gradient)
    if name == "consistency":
        return consistency_gradient(case, auxiliary, **changed)
    return flat(step(case, auxiliary, **changed)[0])


def step(case: Case, auxiliary: str, **changed: Any) -> tuple[Lora, dict[str, Tensor]]:
    """lfu's gradient and metrics; keywords replace the settings, or the batch."""
    settings = SETTINGS | changed
    batch = settings.pop("batch", case.batch)
    return lfu_gradient(case.config, case.base, case.task, fresh(case.config, auxiliary), batch, **settings)


class Ascent(NamedTuple):
    """One call of `ascend`."""

    aux: Aux
    gradient: Aux
    moved: Aux


def ascent(case: Case, auxiliary: str, **changed: Any) -> Ascent:
    """What `lfu_gradient` ascends, as it happens."""
    seen: list[Ascent] = []

    def watched(aux: Aux, gradient: Aux, alpha: float) -> Aux:
        seen.append(Ascent(aux, gradient, ascend(aux, gradient, alpha)))
        return seen[-1].moved

    with patch.object(train, "ascend", watched):
        step(case, auxiliary, **changed)
    return seen[0]


def consistency_gradient(case: Case, auxiliary: str, **changed: Any) -> Tensor:
    """What λ multiplies, flat."""
    with_it, without = (step(case, auxiliary, **changed | {"lam": lam})[0] for lam in (1.0, 0.0))
    return flat(with_it) - flat(without)


# --- against an oracle ----------------------------------------------------------------------------


@cache
def by_oracle(kind: str, auxiliary: str, decoder: Any = plain, **changed: Any) -> oracle.Result:
    """All parts, computed by the oracle over one of its decoders."""
    config, base, task, rows = case(kind)
    return oracle.lfu(decoder(config, base), task, fresh(config, auxiliary), rows, **SETTINGS | changed)


def oracle_error(name: str, kind: str, auxiliary: str, decoder: Any = plain, **changed: Any) -> float:
    """Relative distance of one part from the oracle's."""
    expected = by_oracle(kind, auxiliary, decoder, **changed)
    fields = {"sft": "sft_gradient", "consistency": "consistency_gradient", "whole": "gradient"}
    changed.pop("wrong", None)  # a mistake of the oracle's alone
    return distance(part(name, case(kind), auxiliary, **changed), getattr(expected, fields.get(name, name)))


def metrics_error(kind: str, auxiliary: str, decoder: Any = plain, **changed: Any) -> float:
    """The largest relative difference of a metric from the oracle's."""
    expected = by_oracle(kind, auxiliary, decoder, **changed)
    metrics = step(case(kind), auxiliary, **changed)[1]
    return max(
        relative(float(metrics[name]), getattr(expected, name)) for name in ("sft", "consistency", "ascent_norm")
    )

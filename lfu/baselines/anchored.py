"""Anchored Learning (arXiv 2605.04468), as we read its abstract. Its paper and code were not available to us.

The abstract: the target distribution moves along; it lies between the current model and a frozen reference, and the
model is distilled towards it, so that each step is a small one in distribution space, with a bound on its KL divergence
that is linear. What it leaves open was decided here:

- The reference p₀ is the base model, without the adapter, at the answer's positions. The anchor is the mixture
  a = (1 - β)·p_θ + β·p₀, with p_θ constant. A mixture of probabilities, not of logits, because then
  KL(a ‖ p_θ) ≤ β·KL(p₀ ‖ p_θ): the linear bound.
- The task enters through the SFT loss, as nothing else in the abstract can teach it: ℓ = ℓ_SFT + λ·KL(a ‖ p_θ).
- The divergence is a mean over the answer's tokens, on the same micro-batch. It costs a forward pass of the base model,
  and the memory of a few more tensors of answer tokens by vocabulary.

One consequence is exact: as a is constant, the gradient of KL(a ‖ p_θ) is β times that of KL(p₀ ‖ p_θ), so to first
order this is SFT with a penalty λβ on the forward divergence from the base model, and only the product λβ matters. No
settings are published. An aside; the next one is `released.py`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Unpack

from lfu.baselines.regularisers import loss_gradient
from lfu.data.batches import Batch
from lfu.errors import InputError
from lfu.lora import Lora
from lfu.loss import answer_mask
from lfu.model import Config, Params, embed, trunk, unembed
from lfu.train import Metrics, SftOptions


def anchored(
    config: Config, base: Params, task: Lora, batch: Batch, generator: torch.Generator, *,
    beta: float, lam: float, **options: Unpack[SftOptions],
) -> tuple[Lora, Metrics]:  # fmt: skip
    """SFT plus λ·KL(anchor ‖ p_θ)."""
    reference = reference_probabilities(config, base, batch)

    def loss(hidden: list[Tensor], logits: Tensor, sft: Tensor) -> tuple[Tensor, Metrics]:
        drift = anchor_divergence(logits, reference, beta)
        return sft + lam * drift, {"divergence": drift}

    return loss_gradient(config, base, task, batch, loss, **options)


def require_share(beta: float, **_: Any) -> None:
    """InputError for what is no share of a mixture."""
    if not 0 <= beta <= 1:
        raise InputError(f"beta is the reference's share of the anchor, from 0 to 1, not {beta}.")


def reference_probabilities(config: Config, base: Params, batch: Batch) -> Tensor:  # -> [n,V]
    """What the base model alone predicts at the answer's positions."""
    with torch.no_grad():
        hidden = trunk(config, base, embed(base, batch.tokens))[-1]
        return F.softmax(unembed(config, base, hidden[answer_mask(batch.labels)]), dim=-1)


def anchor_divergence(logits: Tensor, reference: Tensor, beta: float) -> Tensor:  # [n,V] twice -> []
    """Mean KL(a ‖ p), with p = softmax(logits) and a = (1 - beta)·detach(p) + beta·reference."""
    log_p = F.log_softmax(logits, dim=-1)
    anchor = (1 - beta) * log_p.detach().exp() + beta * reference
    return F.kl_div(log_p, anchor, reduction="none").sum(dim=-1).mean()

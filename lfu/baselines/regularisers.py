"""What LfU is compared with: other ways to keep a small fine-tuning set from spoiling the model.

- `neftune`: noise on the input embeddings (Jain et al. 2023).
- `gem`: a cross-entropy that leaves probability to other tokens (Li et al. 2025).
- `sam`: the SFT gradient where the loss has been raised (Foret et al. 2020; Table 6 b).
- `feature_regulariser`: small representations (Table 6 c, d).
- `logit_divergence`: LfU's consistency, of the logits instead of the representations (Eq. 7; Table 6 e).
- `ema` and `ensemble`: averages of adapters (Table 11), which are no gradient methods but functions.

Methods report the SFT loss of Eq. 1 whatever they minimise. Where a paper and its code disagree, or the paper is
silent, the docstring says what was chosen. Instruction modelling is a choice of labels (`data/tokens.py`), and SDFT
rewrites the data (`sdft.py`). An aside; the next one is `anchored.py`.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Unpack

from lfu.data.batches import IGNORED, Batch
from lfu.errors import InputError
from lfu.lora import Lora
from lfu.loss import answer_labels, answer_loss, answer_mask
from lfu.model import Config, Params, embed, frozen_linear, rms_norm, stream_dtype, trunk, unembed
from lfu.remat import rematerialised
from lfu.train import Differentiate, Metrics, SftOptions, ascend, differentiate, global_norm, sft_gradient

Loss = Callable[[list[Tensor], Tensor, Tensor], tuple[Tensor, Metrics]]
"""(hidden, K x [B,T,D]; logits [n,V] that predict the n labelled tokens; their SFT loss) -> the loss, and metrics."""


def loss_gradient(
    config: Config,
    base: Params,
    task: Lora,
    batch: Batch,
    loss: Loss,
    *,
    scale: float,
    noise: Tensor | float = 0.0,
    remat: bool = False,
    differentiate: Differentiate = differentiate,
) -> tuple[Lora, Metrics]:
    """The gradient of any loss of one clean pass, its metrics, and the SFT loss as "sft"."""
    run_trunk = rematerialised if remat else trunk
    x, answers = embed(base, batch.tokens) + noise, answer_labels(batch.labels)
    positions = answer_mask(batch.labels).nonzero(as_tuple=True)

    def objective(task: Lora) -> tuple[Tensor, Any]:
        hidden = run_trunk(config, base, x, [(task, scale)])
        logits = unembed(config, base, hidden[-1][positions])  # [n,V]
        sft = answer_loss(logits, answers)
        value, metrics = loss(hidden, logits, sft)
        return value, {"sft": sft} | metrics

    (gradient,), _, metrics = differentiate(objective, task)
    return gradient, metrics


# --- NEFTune --------------------------------------------------------------------------------------


def neftune(
    config: Config, base: Params, task: Lora, batch: Batch, generator: torch.Generator, *,
    alpha: float, **options: Unpack[SftOptions],
) -> tuple[Lora, Metrics]:  # fmt: skip
    """NEFTune: the SFT gradient with noise on the embeddings, drawn anew for every micro-batch and constant.

    The reported loss is the noisy one.
    """
    noise = uniform_noise(batch, config.hidden_size, alpha, generator).to(stream_dtype(base))

    def loss(hidden: list[Tensor], logits: Tensor, sft: Tensor) -> tuple[Tensor, Metrics]:
        return sft, {}

    return loss_gradient(config, base, task, batch, loss, noise=noise, **options)


def uniform_noise(batch: Batch, width: int, alpha: float, generator: torch.Generator) -> Tensor:  # -> [B,T,D] float32
    """U(-1, 1) · alpha/√(L·D) over each row's own L tokens, and 0 after them (NEFTune `experiment_code/train.py`).

    The copies of this method in trl and transformers take the padded length for L, and noise the padding too.
    """
    noise = torch.zeros(*batch.tokens.shape, width, device=generator.device)
    for row, length in zip(noise, lengths(batch.labels).tolist()):
        bound = alpha / math.sqrt(length * width)
        row[:length].uniform_(-bound, bound, generator=generator)
    return noise


def lengths(labels: Tensor) -> Tensor:  # [B,T] -> [B]
    """How many tokens each row has: its last one carries a label, and what follows is padding."""
    return torch.arange(1, labels.shape[1] + 1, device=labels.device).mul(labels != IGNORED).amax(dim=1)


# --- GEM ------------------------------------------------------------------------------------------


def gem(
    config: Config, base: Params, task: Lora, batch: Batch, generator: torch.Generator, *,
    beta: float, weight: str, **options: Unpack[SftOptions],
) -> tuple[Lora, Metrics]:  # fmt: skip
    """GEM: a cross-entropy that leaves probability to other tokens (`gem_loss`)."""
    answers = answer_labels(batch.labels)

    def loss(hidden: list[Tensor], logits: Tensor, sft: Tensor) -> tuple[Tensor, Metrics]:
        value = gem_loss(logits, answers, beta=beta, weight=weight)
        return value, {"gem": value}

    return loss_gradient(config, base, task, batch, loss, **options)


def require_temperature(beta: float, **_: Any) -> None:
    """InputError for what logits cannot be divided by."""
    if not 0 < beta < math.inf:
        raise InputError(f"beta is a temperature: more than 0 and finite, not {beta}.")


def gem_loss(logits: Tensor, answers: Tensor, *, beta: float, weight: str) -> Tensor:  # [n,V], [n] -> []
    """Mean of Σ_j q_j w_j (z_j - z_y), with q = softmax(z/beta) and w constant (GEM `sft_trainer.py`).

    `weight` "linear" is w = 1; "logsigmoid" is w_j = sigmoid(0.01 (z_j - z_y)), which is close to ½. With w = 1 the
    gradient is that of beta · cross-entropy(z/beta, y). Only the gradient means something: the value is negative where
    the answer is the likeliest token. Every labelled token of an optimizer step weighs alike, as in their second
    version; in their first each micro-batch does.
    """
    gaps = logits - logits.gather(-1, answers[:, None])
    q = F.softmax(logits.detach() / beta, dim=-1)
    if weight == "logsigmoid":
        q = q * torch.sigmoid(0.01 * gaps.detach())
    return (q * gaps).sum(dim=-1).mean()


# --- SAM ------------------------------------------------------------------------------------------


def sam(
    config: Config, base: Params, task: Lora, batch: Batch, generator: torch.Generator, *,
    alpha: float, **options: Unpack[SftOptions],
) -> tuple[Lora, Metrics]:  # fmt: skip
    """Table 6 b: the gradient of the SFT loss at θ + α·g/‖g‖₂, where g is its gradient at θ, on the same micro-batch.

    θ is the task LoRA and ‖g‖₂ its norm as a whole, without SAM's ε; g is a constant, as in first-order SAM. The
    reported loss is that at θ.
    """
    ascent, metrics = sft_gradient(config, base, task, batch, **options)
    gradient, _ = sft_gradient(config, base, ascend(task, ascent, alpha), batch, **options)
    return gradient, metrics | {"ascent_norm": global_norm(ascent)}


# --- penalties on representations -----------------------------------------------------------------


def feature_regulariser(
    config: Config, base: Params, task: Lora, batch: Batch, generator: torch.Generator, *,
    order: int, lam: float, norm: str, **options: Unpack[SftOptions],
) -> tuple[Lora, Metrics]:  # fmt: skip
    """Table 6 c and d: SFT plus λ times the size of the representations (`feature_penalty`)."""
    mask = answer_mask(batch.labels)

    def loss(hidden: list[Tensor], logits: Tensor, sft: Tensor) -> tuple[Tensor, Metrics]:
        penalty = feature_penalty(hidden, mask, order=order, norm=norm)
        return sft + lam * penalty, {"penalty": penalty}

    return loss_gradient(config, base, task, batch, loss, **options)


def feature_penalty(hidden: list[Tensor], mask: Tensor, *, order: int, norm: str) -> Tensor:  # K x [B,T,D] -> []
    """‖h_{l,t}‖_p, p = `order`, of all blocks l and masked positions t.

    `norm` "sum" is as printed: summed over l and t, and here averaged over the rows of the micro-batch, whose
    gradient the loop weighs by its tokens like all others. As that is thousands of times an SFT loss, "mean" is what
    we take the published λ to belong to: the mean over l and t, with the mean over the D features inside the norm.
    """
    positions = mask.nonzero(as_tuple=True)
    sizes = torch.stack([torch.linalg.vector_norm(h[positions], ord=order, dim=-1) for h in hidden])  # [K,n]
    return sizes.mean() / hidden[0].shape[-1] ** (1 / order) if norm == "mean" else sizes.sum() / len(mask)


def require_absolute(norm: str, **_: Any) -> None:
    """InputError for a norm that penalties on representations do not have."""
    if norm not in ("mean", "sum"):
        raise InputError(f"A penalty on representations has the norm mean or sum, not {norm!r}.")


# --- consistency of the logits --------------------------------------------------------------------


def logit_divergence(
    config: Config, base: Params, hidden: list[Tensor], perturbed: list[Tensor], mask: Tensor, **_: Any
) -> Tensor:  # K x [B,T,D] twice, [B,T] bool -> []
    """Eq. 7: mean KL(σ(detach z) ‖ σ(z')) over the masked positions, for `lfu_gradient` to `compare` with.

    z' is computed as z + W (n' - n), n being the normalised last state: like every other product of the perturbed pass
    it is rounded relative to the difference.
    """
    positions = mask.nonzero(as_tuple=True)
    n, n_perturbed = (rms_norm(h[-1][positions], base.norm, config.rms_norm_eps) for h in (hidden, perturbed))
    z = frozen_linear(n.detach(), base.lm_head)
    moved = z + frozen_linear(n_perturbed - n.detach(), base.lm_head)
    divergence = partial(F.kl_div, reduction="none", log_target=True)
    return divergence(F.log_softmax(moved, dim=-1), F.log_softmax(z, dim=-1)).sum(dim=-1).mean()


# --- averages of adapters -------------------------------------------------------------------------

"""Anchored Learning (arXiv 2605.04468), as its authors' public code runs it, on the rows that there are.

A frozen adapter that SFT made is the *reference*. The student starts again from the base model, and learns in stages.
At the start of each a *snapshot* of the student is frozen; the *anchor* lies between the two,

    z_a = (1 - α)·z_snapshot + α·z_reference,    ℓ = KL(softmax(z_a) ‖ p_θ),

and the student follows it for some epochs, without labels: there is no cross-entropy. The first snapshot is the base
model, so the anchor sets out near it and moves towards the reference from stage to stage. Optimizer, warm-up and
schedule begin anew with each stage, and the order of the rows too. Base, reference, snapshot and student share one copy
of the weights; it costs two forward passes without gradients, and logits at the answer's positions only.

Two neighbours are exact: α = 1 is distillation from the reference, and with `space` "probabilities",
a = (1 - α)·p_snapshot + α·p_reference, an anchor that is rebuilt at every step has α times that method's gradient. So
what makes this another method are the stages, or that it is logits that are mixed.

Sources: `wangxinyufighting/anchored_learning`, trl/al_og.py and trl/anchored_learning.py; α 0.5 and five stages of five
epochs are what the documentation of `anchored_learning3.0` (KDFlow/docs/concepts/algorithms.md) says the paper uses;
their other scripts have ten stages. Sampling from the student, as one of them does, is left out: the abstract's method
is offline. An aside; the next one is `released.py`.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Unpack

from lfu.baselines.regularisers import loss_gradient
from lfu.data.batches import Batch, Example
from lfu.errors import InputError
from lfu.lora import Adapter, Lora, LowRank
from lfu.loss import answer_mask
from lfu.model import Config, Params, embed, trunk, unembed
from lfu.schedule import Settings, total_steps
from lfu.train import Method, Metrics, SftOptions, StepMetrics, train

Snapshot = dict[str, Tensor]
"""The student at the start of its stage, by names such as "0.q_proj.A", as a checkpoint keeps it; empty: as it is."""


def anchored(
    config: Config, base: Params, task: Lora, batch: Batch, generator: torch.Generator, *,
    anchor_alpha: float, space: str, reference: Adapter, snapshot: Snapshot, **options: Unpack[SftOptions],
) -> tuple[Lora, Metrics]:  # fmt: skip
    """Anchored Learning: KL(anchor ‖ p_θ), the anchor between a snapshot and an SFT adapter; no labels."""
    start = to_lora(snapshot, task) if snapshot else task, options["scale"]
    predict = partial(answer_logits, config, base, batch)
    anchor = log_anchor(predict(start), predict(reference), anchor_alpha, space)  # [n,V]

    def loss(hidden: list[Tensor], logits: Tensor, sft: Tensor) -> tuple[Tensor, Metrics]:
        terms = F.kl_div(F.log_softmax(logits, dim=-1), anchor, reduction="none", log_target=True)
        divergence = terms.sum(dim=-1).mean()
        return divergence, {"divergence": divergence}

    return loss_gradient(config, base, task, batch, loss, **options)


def answer_logits(config: Config, base: Params, batch: Batch, adapter: Adapter) -> Tensor:  # -> [n,V]
    """What the model with this adapter predicts at the answer's positions; a constant."""
    with torch.no_grad():
        hidden = trunk(config, base, embed(base, batch.tokens), [adapter])[-1]
        return unembed(config, base, hidden[answer_mask(batch.labels)])


def log_anchor(near: Tensor, far: Tensor, alpha: float, space: str) -> Tensor:  # logits [n,V] twice -> [n,V]
    """Log-probabilities between those of two models, of which `far` has the share α."""
    if space == "logits":
        return F.log_softmax(torch.lerp(near, far, alpha), dim=-1)
    shares = near.new_tensor([1 - alpha, alpha]).log()
    return torch.logaddexp(F.log_softmax(near, dim=-1) + shares[0], F.log_softmax(far, dim=-1) + shares[1])


def require_anchor(anchor_alpha: float, space: str, stages: int) -> None:
    """InputError for what is no anchor, or no number of stages."""
    if not 0 <= anchor_alpha <= 1:
        raise InputError(f"anchor-alpha is the reference's share of the anchor, from 0 to 1, not {anchor_alpha}.")
    if space not in ("logits", "probabilities"):
        raise InputError(f"The anchor is a mixture of logits or of probabilities, not of {space!r}.")
    if stages < 1:
        raise InputError(f"stages must be at least 1, not {stages}.")


# --- stages ---------------------------------------------------------------------------------------


def train_in_stages(
    config: Config, base: Params, task: Lora, optimizer: torch.optim.Optimizer, examples: Sequence[Example],
    method: Method, settings: Settings, start_step: int = 0,
) -> Iterator[StepMetrics]:  # fmt: skip
    """`train` as often as the method has stages: one, if it does not say, and else each with new moments.

    Steps and epochs are counted through, so `start_step` also says in which stage a run is continued. The snapshot of
    that stage is then in `method.snapshot`, where those of later ones are put.
    """
    length, stages = total_steps(len(examples), settings), getattr(method, "stages", 1)
    snapshot: Snapshot | None = getattr(method, "snapshot", None)
    for stage in range(start_step // length, stages):
        done = max(start_step - stage * length, 0)
        if done == 0 and snapshot is not None:
            optimizer.state.clear()
            snapshot.update(take_snapshot(task))
        for metrics in train(config, base, task, optimizer, examples, method, settings, done):
            step, epoch = metrics.step + stage * length, metrics.epoch + stage * settings.epochs
            yield metrics._replace(step=step, epoch=epoch)


def take_snapshot(task: Lora) -> Snapshot:
    """A copy of the student, for the stage to come."""
    pairs = ((f"{index}.{name}", pair) for index, layer in enumerate(task) for name, pair in layer.items())
    return {f"{name}.{part}": getattr(pair, part).clone() for name, pair in pairs for part in LowRank._fields}


def to_lora(snapshot: Snapshot, task: Lora) -> Lora:
    """The LoRA of which a snapshot was taken, with the linear layers of `task`."""

    def pair(name: str) -> LowRank:
        return LowRank(*(snapshot[f"{name}.{part}"] for part in LowRank._fields))

    return [{name: pair(f"{index}.{name}") for name in layer} for index, layer in enumerate(task)]

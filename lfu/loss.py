"""The two losses: the SFT loss of Eq. 1 and the consistency loss of Eq. 5.

Both are means over the same positions: those whose next token carries a label. Eqs. 1 and 5 print a mean over the T
tokens of each example and then over examples; here, as in the published runs, it is one mean over all n tokens of the
batch, so a long answer weighs more than a short one. (T in shapes is the padded length of a row.)
Errors are InputError, which is a ValueError. Read next: `train.py`.
"""

from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor

from lfu.data.batches import IGNORED
from lfu.errors import InputError

NORMS = ("mean", "sum", "relative")


def answer_mask(labels: Tensor) -> Tensor:  # [B,T] -> [B,T] bool
    """The positions t that predict a labelled token at t+1. The last position predicts nothing."""
    return F.pad(labels[:, 1:] != IGNORED, (0, 1), value=False)


def answer_labels(labels: Tensor) -> Tensor:  # [B,T] -> [n]
    """The labels that are predicted, in the order of `answer_mask(labels)`."""
    return labels[:, 1:][labels[:, 1:] != IGNORED]


def sft_loss(logits: Tensor, labels: Tensor) -> Tensor:  # [B,T,V], [B,T] -> []
    """Eq. 1: mean negative log-likelihood of the labelled tokens, in nats, in the dtype of the logits.

    InputError if no token carries a label.
    """
    return answer_loss(logits[answer_mask(labels)], answer_labels(labels))


def answer_loss(logits: Tensor, answers: Tensor) -> Tensor:  # [n,V], [n] -> []
    """`sft_loss` from the labels of `answer_labels` and the logits that predict them; no others need exist."""
    if not len(answers):
        raise InputError("This batch has no token that carries a label, so its loss is not defined.")
    return F.cross_entropy(logits, answers)


def consistency_loss(
    hidden: list[Tensor],
    perturbed: list[Tensor],
    mask: Tensor,
    *,
    layers: Collection[int] | None = None,
    norm: str = "mean",
) -> Tensor:  # K x [B,T,D] twice, [B,T] bool -> []
    """Eq. 5: mean over the masked positions and the chosen blocks of ‖detach(h) - h'‖².

    `layers` are block numbers from 1 to K, None for all. `norm` "sum" is the squared L2 norm as printed; "mean"
    divides it by D, which is what the published λ belongs to and what Figure 4 calls mean squared error; "relative", of
    our own, divides each block's term by the mean square of its h, so that λ need not know how large a model's states
    are. No gradient flows into `hidden`. InputError for an unknown block or norm, or for unequal numbers of blocks.
    Values are not looked at, which would hold up an accelerator: with nothing masked the loss is nan, and "relative" to
    states that are all zero it is inf or nan.
    """
    require_norm(norm)
    if len(hidden) != len(perturbed):
        raise InputError(f"The states of {len(hidden)} blocks cannot be compared with those of {len(perturbed)}.")
    reduce = torch.sum if norm == "sum" else torch.mean

    def average(squares: Tensor) -> Tensor:  # [B,T,D] -> []
        return torch.where(mask, reduce(squares, dim=-1), 0.0).sum() / mask.sum()

    def per_layer(h: Tensor, h_perturbed: Tensor) -> Tensor:
        distance = average((h.detach() - h_perturbed).square())
        return distance / average(h.detach().square()) if norm == "relative" else distance

    return torch.stack([per_layer(hidden[i - 1], perturbed[i - 1]) for i in resolve_layers(layers, len(hidden))]).mean()


def resolve_layers(layers: Collection[int] | None, count: int) -> list[int]:
    """The block numbers to compare, in order; InputError unless they are from 1 to `count`, at least one."""
    chosen = list(range(1, count + 1)) if layers is None else sorted(set(layers))
    if not chosen or chosen[0] < 1 or chosen[-1] > count:
        raise InputError(f"Consistency layers must be block numbers from 1 to {count}, at least one; not {chosen}.")
    return chosen


def require_norm(norm: str) -> None:
    """InputError unless `norm` is a reduction of the consistency loss."""
    if norm not in NORMS:
        raise InputError(f"The norm of the consistency loss must be one of {', '.join(NORMS)}, not {norm!r}.")

"""The two losses, against loops written out by hand and against the loss of transformers.

Shown here: which positions count, what is averaged over what, and that nothing else has any influence.
"""

import math
from collections.abc import Collection

import pytest
import torch
from compare import relative
from torch import Tensor

from lfu.data.batches import IGNORED
from lfu.loss import NORMS, answer_mask, consistency_loss, sft_loss

LABELS = torch.tensor(
    [
        [IGNORED, IGNORED, IGNORED, 4, 1, 6, IGNORED],  # prompt, answer, padding
        [IGNORED, 3, IGNORED, IGNORED, 5, 0, 2],  # two answers; the last token is labelled
        [IGNORED, IGNORED, IGNORED, IGNORED, IGNORED, IGNORED, IGNORED],  # nothing to learn
    ]
)
COUNTED = [(0, 2), (0, 3), (0, 4), (1, 0), (1, 3), (1, 4), (1, 5)]
"""(row, position) that predict a label: one place before it."""

CLOSE = 1e-14
"""Relative error in float64. Measured: at most 5e-16."""


def logits(seed: int = 0) -> Tensor:
    return torch.randn(3, 7, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def states(seed: int, layers: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, 7, 5, generator=generator, dtype=torch.float64) for _ in range(layers)]


# --- which positions ------------------------------------------------------------------------------


def marked_and_expected() -> tuple[list, list]:
    return [tuple(place) for place in answer_mask(LABELS).nonzero().tolist()], COUNTED


def test_predicts_marks_the_position_before_each_label() -> None:
    marked, expected = marked_and_expected()
    assert marked == expected
    assert answer_mask(LABELS).dtype == torch.bool
    assert answer_mask(LABELS).shape == LABELS.shape


def marked_and_expected_where_all_is_labelled() -> tuple[list, list]:
    return answer_mask(torch.zeros(2, 4, dtype=torch.int64)).tolist(), [[True, True, True, False]] * 2


def test_the_last_position_predicts_nothing_even_when_every_token_is_labelled() -> None:
    marked, expected = marked_and_expected_where_all_is_labelled()
    assert marked == expected


# --- SFT ------------------------------------------------------------------------------------------


def sft_loss_error() -> float:
    """Relative distance from a loop over all labelled tokens of the batch."""
    z, total = logits(), 0.0
    for row, t in COUNTED:
        partition = sum(math.exp(value) for value in z[row, t].tolist())
        total += math.log(partition) - z[row, t, LABELS[row, t + 1]].item()
    return relative(sft_loss(z, LABELS).item(), total / len(COUNTED))


def test_sft_loss_is_the_mean_over_all_labelled_tokens_of_the_batch() -> None:
    assert sft_loss_error() < CLOSE


def test_sft_loss_is_the_loss_of_transformers() -> None:
    from transformers.loss.loss_utils import ForCausalLMLoss

    z = logits().float()  # transformers computes its loss in float32
    theirs = ForCausalLMLoss(z, LABELS, vocab_size=z.shape[-1])
    # Measured: equal to the last bit.
    torch.testing.assert_close(sft_loss(z, LABELS), theirs, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("label", [IGNORED, 7])
def test_the_label_of_the_first_token_changes_nothing(label: int) -> None:
    changed = LABELS.clone()
    changed[:, 0] = label
    assert torch.equal(sft_loss(logits(), changed), sft_loss(logits(), LABELS))


def test_sft_loss_reads_only_the_positions_that_predict() -> None:
    z = logits().requires_grad_()
    (gradient,) = torch.autograd.grad(sft_loss(z, LABELS), z)
    assert torch.equal(gradient.abs().sum(dim=-1) > 0, answer_mask(LABELS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sft_loss_keeps_the_dtype_of_the_logits(dtype: torch.dtype) -> None:
    assert sft_loss(logits().to(dtype), LABELS).dtype == dtype


def test_a_batch_without_labels_has_no_loss() -> None:
    only_first = torch.full((2, 4), IGNORED)
    only_first[:, 0] = 1  # never predicted
    with pytest.raises(ValueError, match="no token that carries a label"):
        sft_loss(torch.zeros(2, 4, 8), only_first)


# --- consistency ----------------------------------------------------------------------------------

LAYERS = (None, {1}, {2, 3}, [3, 1, 3])


def consistency_loss_error(layers: Collection[int] | None, norm: str) -> float:
    """Relative distance from a loop over positions and chosen blocks."""
    h, perturbed, chosen = states(1), states(2), set(layers or (1, 2, 3))
    total = 0.0
    for number in chosen:
        distance, size = 0.0, 0.0
        for row, t in COUNTED:
            pairs = list(zip(h[number - 1][row, t].tolist(), perturbed[number - 1][row, t].tolist()))
            distance += sum((a - b) ** 2 for a, b in pairs)
            size += sum(a**2 for a, b in pairs)
        total += distance / {"mean": 5 * len(COUNTED), "sum": len(COUNTED), "relative": size}[norm]
    value = consistency_loss(h, perturbed, answer_mask(LABELS), layers=layers, norm=norm)
    return relative(value.item(), total / len(chosen))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("layers", LAYERS, ids=str)
def test_consistency_loss_is_the_mean_over_positions_and_chosen_blocks(layers: list[int] | None, norm: str) -> None:
    assert consistency_loss_error(layers, norm) < CLOSE


def leaks() -> int:
    """How many of the states h let a gradient through, over all norms."""
    h, perturbed = ([state.requires_grad_() for state in states(seed)] for seed in (1, 2))
    losses = [consistency_loss(h, perturbed, answer_mask(LABELS), norm=norm) for norm in NORMS]
    gradients = [torch.autograd.grad(loss, h, allow_unused=True) for loss in losses]
    return sum(gradient is not None for each in gradients for gradient in each)


def test_consistency_loss_differentiates_the_perturbed_states_alone_and_only_where_they_predict() -> None:
    h, perturbed = ([state.requires_grad_() for state in states(seed)] for seed in (1, 2))
    loss = consistency_loss(h, perturbed, answer_mask(LABELS), layers={1, 3})
    through_perturbed = torch.autograd.grad(loss, perturbed, allow_unused=True)
    assert leaks() == 0
    assert through_perturbed[1] is None
    for number in (1, 3):
        assert torch.equal(through_perturbed[number - 1].abs().sum(dim=-1) > 0, answer_mask(LABELS))


def test_equal_states_are_consistent() -> None:
    assert consistency_loss(states(1), states(1), answer_mask(LABELS)).item() == 0.0


@pytest.mark.parametrize("layers", [{0}, {4}, {1, 9}, {-1}, set()])
def test_unknown_blocks_are_refused(layers: set[int]) -> None:
    with pytest.raises(ValueError, match="block numbers from 1 to 3"):
        consistency_loss(states(1), states(2), answer_mask(LABELS), layers=layers)


def test_states_of_unequal_depth_are_refused() -> None:
    with pytest.raises(ValueError, match="3 blocks cannot be compared with those of 2"):
        consistency_loss(states(1), states(2)[:2], answer_mask(LABELS))


def test_unknown_norm_is_refused() -> None:
    with pytest.raises(ValueError, match="'max'"):
        consistency_loss(states(1), states(2), answer_mask(LABELS), norm="max")

"""Examples and batches: tokens and labels, -100 where there is no loss, rows of similar length together.

Read next: `generate.py`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

IGNORED = -100
"""The label of a token that carries no loss: prompt and padding."""


class Batch(NamedTuple):
    tokens: Tensor  # [B,T] int64, right-padded
    labels: Tensor  # [B,T] int64, -100 where no loss


class Example(NamedTuple):
    """One tokenised row."""

    tokens: list[int]
    prompt_length: int  # how many of the tokens are given
    line_number: int  # the line it came from
    instruction: Sequence[int] = range(0)  # which of the given tokens carry loss all the same, as earlier answers

    @property
    def num_loss_tokens(self) -> int:
        """How many tokens carry loss. The first token of a row is never predicted."""
        return len(self.tokens) - max(self.prompt_length, 1) + len(self.instruction) - (0 in self.instruction)


def shuffled(count: int, seed: int, epoch: int) -> list[int]:
    """The order of the rows in one epoch."""
    return np.random.default_rng([seed, epoch]).permutation(count).tolist()


def split_by_length(examples: Sequence[Example], size: int) -> list[list[Example]]:
    """Examples in batches of similar length, so that little is padding."""
    ordered = sorted(examples, key=lambda example: len(example.tokens))
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


def collate(examples: Sequence[Example], device: str | torch.device = "cpu") -> Batch:
    """Right-padded tokens, and labels that are -100 wherever there is no loss, as on the padding."""
    tokens = pad([example.tokens for example in examples])
    labels = pad([make_labels(example) for example in examples], IGNORED)
    return Batch(tokens.to(device), labels.to(device))


def make_labels(example: Example) -> list[int]:
    """The tokens that carry loss, and -100 in place of the others."""
    labels = [IGNORED] * example.prompt_length + example.tokens[example.prompt_length :]
    for place in example.instruction:
        labels[place] = example.tokens[place]
    return labels


def pad(rows: Sequence[Sequence[int]], filler: int = 0) -> Tensor:  # -> [B,T] int64
    """Rows of unequal length as one tensor. What is padding is told by its place, so any token may fill it."""
    padded = torch.full((len(rows), max(map(len, rows))), filler, device="cpu")
    for row, values in enumerate(rows):
        padded[row, : len(values)] = torch.tensor(values, device="cpu")
    return padded

"""Averages of adapters: over the steps of a run, and with no adapter at all (Table 11 b and c)."""

from torch.utils._pytree import tree_map

from lfu.lora import Adapter, Lora


def ema(average: Lora, current: Lora, beta: float) -> Lora:
    """Table 11 b: beta·average + (1 - beta)·current, after every step. It starts as the adapter before the first.

    A and B are averaged, not their product.
    """
    return tree_map(lambda a, c: beta * a + (1 - beta) * c, average, current)


def ensemble(adapter: Adapter, beta: float) -> Adapter:
    """Table 11 a: beta·θ_vanilla + (1 - beta)·θ_SFT. beta weighs the base model: 0 is the adapter, 1 is without it.

    The average is one of weights: W + s·B A and W, so it scales the product B A.
    """
    lora, scale = adapter
    return lora, (1 - beta) * scale

"""How right is the consistency gradient in low precision? Cosine and norm ratio against float64, per published setting.

    python experiments/fidelity.py --model SMOLLM2 --data gsm8k/train.jsonl

h' - h is far smaller than h. Two passes rounded to bfloat16 differ mostly by noise; the default path rounds the
difference itself (`model.relative_to`). The rows of the table are the same function at four precisions.
"""

import argparse
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from lfu import lora, methods, model
from lfu.data import Batch, Format, collate, encode_row, load_codec, read_rows
from lfu.model import Config, Params

SETTINGS = {
    "LoRA α 0.001": ("lfu-lora", 0.001),
    "LoRA α 0.1": ("lfu-lora", 0.1),
    "steering α 0.1": ("lfu-reps", 0.1),
}
SCALE, RANK = 2.0, 8
# So large that in Eq. 6 the consistency gradient is all that is left; dividing by it gives that gradient alone.
LAMBDA = 1e12


def plain_products() -> Any:
    """The perturbed pass computed as the clean one is, each rounded on its own."""
    return patch("lfu.train.relative_to", lambda record: model.base_product)


def low_stream() -> Any:
    """Residual stream, norms, adapters and losses in bfloat16 too."""
    return patch("lfu.model.stream_dtype", lambda params: torch.bfloat16)


PRECISIONS = {
    "float32": (torch.float32, ()),
    "bfloat16 throughout": (torch.bfloat16, (plain_products, low_stream)),
    "float32 stream, bfloat16 products": (torch.bfloat16, (plain_products,)),
    "difference-exact (the default)": (torch.bfloat16, ()),
}


@contextmanager
def changed(patches: tuple) -> Iterator[None]:
    with ExitStack() as stack:
        for each in patches:
            stack.enter_context(each())
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--adapter", type=Path, help="task adapter (default: a fresh one)")
    parser.add_argument("--rows", type=int, default=4, help="how many rows of the file make the batch")
    parsed = parser.parse_args()
    config = model.read_config(parsed.model / "config.json")
    task = starting_point(config, parsed.adapter)
    codec = load_codec(parsed.model, config.vocab_size)
    batch = collate([encode_row(codec, Format(), row) for row in read_rows(parsed.data)[: parsed.rows]])
    print("| cosine, norm ratio | " + " | ".join(SETTINGS) + " |\n" + "|---" * (len(SETTINGS) + 1) + "|")
    # The file holds bfloat16, so every dtype below starts from the very same weights.
    references = gradients(config, load(parsed.model, torch.float64), task, batch)
    for name, (dtype, patches) in PRECISIONS.items():
        with changed(patches):
            found = gradients(config, load(parsed.model, dtype), task, batch)
        print(f"| {name} | " + " | ".join(map(compared, found, references)) + " |", flush=True)


def load(folder: Path, dtype: torch.dtype) -> Params:
    return model.load(folder, dtype=dtype)[1]


def starting_point(config: Config, adapter: Path | None) -> lora.Lora:
    if adapter is not None:
        return lora.load(adapter, config)[0]
    return lora.init(config, RANK, generator=torch.Generator().manual_seed(0))


def gradients(config: Config, base: Params, task: lora.Lora, batch: Batch) -> list[Tensor]:
    """The consistency gradient at each setting, as one float64 vector."""
    task = tree_map(partial(Tensor.to, dtype=model.stream_dtype(base)), task)
    found = []
    for name, alpha in SETTINGS.values():
        generator = torch.Generator().manual_seed(1)
        gradient, _ = methods.METHODS[name](config, base, task, batch, generator, scale=SCALE, alpha=alpha, lam=LAMBDA)
        found.append(torch.cat([leaf.double().flatten() for leaf in tree_leaves(gradient)]) / LAMBDA)
    return found


def compared(found: Tensor, reference: Tensor) -> str:
    cosine = torch.nn.functional.cosine_similarity(found, reference, dim=0)
    return f"{cosine:.4f}, {found.norm() / reference.norm():.3f}"


if __name__ == "__main__":
    main()

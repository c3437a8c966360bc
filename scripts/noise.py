"""What noise of NEFTune's strength on the embeddings does to the states: the cosines of Figure 6, one a block.

    python noise.py MODEL ADAPTER DATA.jsonl [ROWS]

Means over all tokens of the first 200 rows. The standard deviation is 5 / sqrt(T D); that of NEFTune's uniform noise is
5 / sqrt(3 T D), and which of them "the same strength" means is not stated.
"""

import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from lfu import data, lora, model
from lfu.cli.options import choose_device
from lfu.io.huggingface import resolve_model


@torch.no_grad()
def cosines(name: str, adapter: str, path: str, rows: int) -> list[float]:
    device, folder = choose_device(None), resolve_model(name)
    config, base = model.load(folder, device=device)
    adapters = [lora.load(Path(adapter), config, device=device)]
    tokenizer = data.load_tokenizer(folder, config.vocab_size)
    examples, _ = data.encode_rows(path, data.read_rows(path)[:rows], tokenizer, data.Format("alpaca"))
    generator, sums = torch.Generator(device).manual_seed(42), [0.0] * config.num_hidden_layers
    for example in examples:
        x = model.embed(base, torch.tensor([example.tokens], device=device))
        deviation = 5 / math.sqrt(x.shape[1] * x.shape[2])
        noisy = x + deviation * torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype)
        states = zip(model.trunk(config, base, x, adapters), model.trunk(config, base, noisy, adapters))
        for block, (clean, other) in enumerate(states):
            sums[block] += F.cosine_similarity(clean, other, dim=-1).mean().item()
    return [total / len(examples) for total in sums]


if __name__ == "__main__":
    name, adapter, path, *rows = sys.argv[1:]
    found = cosines(name, adapter, path, int(rows[0]) if rows else 200)
    print(*(f"{cosine:.5f}" for cosine in found))

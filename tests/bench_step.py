"""The time of one gradient of each method, as a multiple of SFT's: medians of interleaved repetitions in one process.

    python tests/bench_step.py --model SMOLLM2 --data gsm8k/train.jsonl --dtype bfloat16

Not a test: nothing fails because a machine is slow.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from lfu import lora, methods, model
from lfu.data import Format, collate, encode_row, load_codec, read_rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--repetitions", type=int, default=7)
    parsed = parser.parse_args()
    dtype = getattr(torch, parsed.dtype) if parsed.dtype else None
    config, base = model.load(parsed.model, dtype=dtype, device=parsed.device)
    codec = load_codec(parsed.model, config.vocab_size)
    examples = [encode_row(codec, Format(), row) for row in read_rows(parsed.data)[: 2 * parsed.rows]]
    batch = collate(examples[: parsed.rows], parsed.device)
    task = lora.init(config, 8, generator=torch.Generator().manual_seed(0))
    task = tree_map(partial(Tensor.to, device=parsed.device, dtype=model.stream_dtype(base)), task)
    generator = torch.Generator(parsed.device)
    steps = {name: methods.bind(name, config, scale=2.0, examples=examples)[0] for name in methods.METHODS}
    times = interleaved(
        {name: partial(step, config, base, task, batch, generator) for name, step in steps.items()}, parsed.repetitions
    )
    print(f"{tuple(batch.tokens.shape)} tokens, {base.embed.dtype}, {torch.get_num_threads()} threads")
    for name, seconds in times.items():
        ratios = [each / sft for each, sft in zip(seconds, times["sft"], strict=True)]
        print(f"{name}: {statistics.median(ratios):.2f} x SFT (from {min(ratios):.2f} to {max(ratios):.2f})")


def interleaved(works: dict[str, Callable[[], object]], repetitions: int) -> dict[str, list[float]]:
    """Seconds of each work in each round, after one round that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repetitions + 1):
        for name, work in works.items():
            times[name].append(timed(work))
    return {name: seconds[1:] for name, seconds in times.items()}


def timed(work: Callable[[], object]) -> float:
    synchronise = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    synchronise()
    start = time.perf_counter()
    work()
    synchronise()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()

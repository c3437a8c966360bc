"""What single parts of a step cost: the tables of `docs/performance-details.md` that `lfu bench` does not make.

    python -m experiments.costs remat --model SMOLLM2         # time and memory of --remat, and expected peaks
    python -m experiments.costs precision --model SMOLLM2     # the float32 parts in bfloat16 instead
    python -m experiments.costs operations --model SMOLLM2    # where an SFT step's time goes
    python -m experiments.costs padding --model SMOLLM2 --data train.jsonl    # real rows against rows of one length
    python -m experiments.costs compiled --model SMOLLM2 --blocks 6           # torch.compile, by the blocks compiled

Ratios within one run, the median of interleaved rounds, with their range. One step is 4 x 200 random tokens of which
120 in each row carry loss, rank 8, bfloat16.
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from experiments.fidelity import Patches, patched
from lfu import methods, model, train
from lfu.data.batches import Example, split_by_length
from lfu.data.rows import read_rows
from lfu.data.tokens import Format, encode_row, load_tokenizer
from lfu.lora import Adapter, Lora
from lfu.methods import BoundMethod
from lfu.model import Config, Layer, Linear, Params, Product, linear_with_adapters
from lfu.profiling import bench
from lfu.profiling.bench import RANK, SCALE, Work, interleaved, own_steps, spread, timed
from lfu.profiling.memory import expected_peak, peak
from lfu.schedule import Settings, rows_of_step

ROWS, LENGTH, ANSWER = 4, 200, 120
NAMES = ("sft", "lfu-lora", "lfu-reps")
KINDS = {name + flag: (name, bool(flag)) for name in NAMES for flag in ("", " --remat")}
"""Title -> method, and whether it is with --remat."""
Model = tuple[Config, Params, Lora]


def main() -> None:
    commands = {each.__name__: each for each in (remat, precision, operations, padding, compiled)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=commands)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="JSONL file for padding")
    parser.add_argument("--blocks", type=int, help="for compiled: the first blocks alone (default: all)")
    parser.add_argument("--rounds", type=int, default=5)
    parsed = parser.parse_args()
    if parsed.what == "padding" and parsed.data is None:
        parser.error("padding needs --data")
    config, base = model.load(parsed.model, dtype=torch.bfloat16)
    commands[parsed.what]((config, base, bench.fresh_task(config, base, RANK)), parsed)


def one_step(here: Model, name: str, rows: int, length: int, answer: int, **how: Any) -> tuple[BoundMethod, Work]:
    """A bound method, and its gradient of a random batch."""
    config, base, task = here
    device = base.embed.device
    batch = bench.random_batch(config, rows, length, answer, 0, device)
    method = methods.bind(name, config, scale=SCALE, **how)[0]
    return method, partial(method, config, base, task, batch, torch.Generator(device).manual_seed(0))


# --- memory ---------------------------------------------------------------------------------------


def remat(here: Model, parsed: argparse.Namespace) -> None:
    """With and without --remat; and the expected peak over the one that is counted, for three shapes."""
    works = {row: one_step(here, name, ROWS, LENGTH, ANSWER, remat=again)[1] for row, (name, again) in KINDS.items()}
    times, peaks = interleaved(works, parsed.rounds), {row: peak(work) for row, work in works.items()}
    print("| method | time / the same without | peak MiB | / the same without |\n|---|---|---|---|")
    for row, (name, _) in KINDS.items():
        memory = f"{peaks[row] / 2**20:.0f} | {peaks[row] / peaks[name]:.2f}"
        print(f"| {row} | {spread(times[row], times[name])} | {memory} |", flush=True)
    for rows, length, answer in ((1, 200, 120), (4, 200, 120), (2, 400, 240)):
        for row, (name, again) in KINDS.items():
            method, work = one_step(here, name, rows, length, answer, remat=again)
            expected = expected_peak(partial(method.probe, *here), rows * length, answer / length)
            print(f"{row}, {rows} x {length}: expected over counted {expected / peak(work):.3f}", flush=True)


# --- precision ------------------------------------------------------------------------------------


def precision(here: Model, parsed: argparse.Namespace) -> None:
    """The float32 parts computed in bfloat16, where gradients are not what they should be."""
    config, base, task = here
    batch = bench.random_batch(config, ROWS, LENGTH, ANSWER, 0, torch.device("cpu"))
    own = own_steps(config, base, task, batch)
    for name in ("sft", "lfu-lora"):
        works = {part: patched(patches)(own[name]) for part, patches in float32_parts().items()}
        times = interleaved(works, parsed.rounds)
        for part, seconds in times.items():
            print(f"{name}, {part}: {spread(seconds, times['as it is'])}", flush=True)


def float32_parts() -> dict[str, Patches]:
    """What to replace so that these parts of a step are computed in bfloat16; at first nothing, to compare with."""
    attention: Patches = {
        "torch.nn.functional.scaled_dot_product_attention": rounded_attention(F.scaled_dot_product_attention)
    }
    adapters: Patches = {"lfu.model.linear_with_adapters": rounded_adapters}
    norms: Patches = {"lfu.model.rms_norm": rounded_norm(model.rms_norm)}
    parts = {"attention": attention, "adapters": adapters, "norms": norms}
    return {"as it is": {}, **parts, "all three": attention | adapters | norms}


def rounded_attention(attention: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda q, k, v, **how: attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), **how).to(q.dtype)


def rounded_norm(norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, weight, eps: norm(x.bfloat16(), weight, eps).to(x.dtype)


def rounded_adapters(layer: Layer, index: int, adapters: list[Adapter], product: Product) -> Linear:
    """`model.linear_with_adapters` with bfloat16 products of A and B."""
    frozen = linear_with_adapters(layer, index, [], product)

    def linear(name: str, x: Tensor) -> Tensor:
        y = frozen(name, x)
        for lora, scale in adapters:
            A, B = lora[index][name]
            y = y + (F.linear(x.bfloat16(), A.bfloat16()) @ (scale * B).T.contiguous().bfloat16()).to(y.dtype)
        return y

    return linear


# --- time -----------------------------------------------------------------------------------------


class Clock(TorchDispatchMode):
    """Seconds of each PyTorch operation, by the dtype of its first tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: dict[str, float] = defaultdict(float)

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        dtype = next((leaf.dtype for leaf in tree_leaves(args) if isinstance(leaf, Tensor)), "no tensor")
        start = time.perf_counter()
        result = operation(*args, **(kwargs or {}))
        self.seconds[f"{operation.overloadpacket}, {dtype}"] += time.perf_counter() - start
        return result


def operations(here: Model, parsed: argparse.Namespace) -> None:
    """Shares of an SFT step's time in PyTorch's operations, on one thread."""
    torch.set_num_threads(1)
    _, work = one_step(here, "sft", ROWS, LENGTH, ANSWER)
    work()
    with Clock() as clock:
        work()
    total = sum(clock.seconds.values())
    for name, seconds in sorted(clock.seconds.items(), key=lambda item: -item[1])[:20]:
        print(f"{name}: {seconds / total:.1%}", flush=True)


def padding(here: Model, parsed: argparse.Namespace) -> None:
    """Three optimizer steps on real rows, over as many tokens in rows of one length."""
    config, base, task = here
    tokenizer, settings = load_tokenizer(parsed.model, config.vocab_size), Settings()
    examples = [encode_row(tokenizer, Format(), row) for row in read_rows(parsed.data)]
    method = methods.bind("sft", config, scale=SCALE)[0]
    for step in range(3):
        chosen = [examples[row] for row in rows_of_step(len(examples), settings, step)[1]]
        lengths = [len(example.tokens) for example in chosen]
        share = sum(example.num_loss_tokens for example in chosen) / sum(lengths)
        length = round(sum(lengths) / len(chosen))
        even = [Example([5] * length, length - round(share * length), row) for row in range(len(chosen))]
        works = {
            name: partial(train.step_gradient, config, base, task, rows, method, settings, step)
            for name, rows in (("padded", chosen), ("even", even))
        }
        parts = split_by_length(chosen, settings.micro_batch_size)
        positions = sum(len(part) * max(len(example.tokens) for example in part) for part in parts)
        times = interleaved(works, parsed.rounds)
        ratio = spread(times["padded"], times["even"])
        print(f"step {step + 1}: {positions / sum(lengths):.2f} positions a token, time {ratio}", flush=True)


def compiled(here: Model, parsed: argparse.Namespace) -> None:
    """Seconds of the first call of each compiled gradient, and its time over that of the plain one."""
    config, base, task = here
    blocks = parsed.blocks or config.num_hidden_layers
    config, base = config._replace(num_hidden_layers=blocks), base._replace(layers=base.layers[:blocks])
    batch = bench.random_batch(config, ROWS, LENGTH, ANSWER, 0, torch.device("cpu"))
    every = own_steps(config, base, task[:blocks], batch, compile=True)
    works = {name: every[name] for plain in ("sft", "lfu-lora") for name in (plain, f"{plain}, compiled")}
    for name in works:
        print(f"{name}: first call {timed(works[name]):.1f} s", flush=True)
    times = interleaved(works, parsed.rounds)
    for name, seconds in times.items():
        print(f"{name}: {spread(seconds, times[name.split(',')[0]])}", flush=True)


if __name__ == "__main__":
    main()

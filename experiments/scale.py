"""The step at true sizes: an 8B model's shapes on one machine, and how cost grows with tokens and blocks.

    python -m experiments.scale step --shape llama-3.1-8b --folder runs/llama-3.1-8b
    python -m experiments.scale growth

`step` writes random weights in the shape of a published model, once, as bfloat16 shards (16 GB for the larger one), and
takes one LfU (LoRA) and one LfU (RepS) gradient from one row. The weights stay mapped from the file; what is resident
beyond them is the step's own. `growth` takes blocks of Llama-3.1-8B's shape, and shows time per token over lengths
and time over depths; and what the count of operations says of a model half as large again.
"""

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.costs import one_step
from experiments.miniature import paper
from lfu import model
from lfu.io.config import Config, read_config, tensor_shapes
from lfu.io.files import write_json, write_tensors
from lfu.model import Params
from lfu.profiling import bench
from lfu.profiling.bench import RANK
from lfu.profiling.memory import peak

LARGE: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}
SHAPES = {
    "llama-3.1-8b": LARGE
    | {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "mistral-7b-v0.3": LARGE
    | {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "vocab_size": 32768,
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
        "sliding_window": None,
    },
}
SHARD = 4 * 10**9
METHODS = ("lfu-lora", "lfu-reps")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("step")
    one.add_argument("--shape", choices=SHAPES, required=True)
    one.add_argument("--folder", type=Path, required=True)
    one.add_argument("--length", type=int, default=64)
    one.add_argument("--remat", action="store_true")
    one.set_defaults(run=lambda parsed: step(parsed.shape, parsed.folder, parsed.length, parsed.remat))
    commands.add_parser("growth").set_defaults(run=lambda _: growth())
    parsed = parser.parse_args()
    parsed.run(parsed)


# --- one step at full size -------------------------------------------------------------------------


def step(shape: str, folder: Path, length: int, remat: bool) -> None:
    if not (folder / "model.safetensors.index.json").is_file():
        write(SHAPES[shape], folder)
    start = time.perf_counter()
    config, base = model.load(folder, dtype=torch.bfloat16)
    print(f"{shape}: loaded in {time.perf_counter() - start:.1f} s, {resident():.1f} GiB resident", flush=True)
    print("| method | first step, s | second, s | tensors of the step, GiB | resident at most, GiB | swapped, GiB |")
    print("|---|---|---|---|---|---|")
    for name in METHODS:
        work = gradient(name, config, base, length, remat=remat)
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        first, second, size = bench.timed(work), bench.timed(work), peak(work) / 2**30
        memory = " | ".join(f"{each:.2f}" for each in (size, resident("VmHWM"), resident("VmSwap")))
        print(f"| {name} | {first:.1f} | {second:.1f} | {memory} |", flush=True)


def gradient(name: str, config: Config, base: Params, length: int, *, remat: bool = False) -> bench.Work:
    """One gradient of a method from one row, three fifths of which are answer."""
    here = config, base, bench.fresh_task(config, base, RANK)
    return one_step(here, name, 1, length, round(0.6 * length), remat=remat)[1]


def resident(line: str = "VmRSS") -> float:
    """GiB of this process by Linux's own account, the mapped weights included."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(each for each in lines if each.startswith(line)).split()[1]) / 2**20


def write(settings: dict[str, Any], folder: Path) -> None:
    """Random weights, a shard at a time, so that the whole model is never in memory."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", settings)
    config = read_config(folder / "config.json")
    shards = list(sharded(tensor_shapes(config)))
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    for number, shapes in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(folder / file, {name: drawn(shape, generator) for name, shape in shapes.items()})
        weight_map |= dict.fromkeys(shapes, file)
        print(f"{folder / file}: {len(shapes)} tensors", flush=True)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def config_of(settings: dict[str, Any]) -> Config:
    """The `Config` of what config.json would say."""
    with tempfile.TemporaryDirectory() as folder:
        write_json(Path(folder) / "config.json", settings)
        return read_config(Path(folder) / "config.json")


def sharded(shapes: dict[str, tuple[int, ...]]) -> Iterator[dict[str, tuple[int, ...]]]:
    """The tensors in order, as many to a shard as fit."""
    shard: dict[str, tuple[int, ...]] = {}
    size = 0
    for name, shape in shapes.items():
        size += 2 * math.prod(shape)
        if size > SHARD:
            yield shard
            shard, size = {}, 2 * math.prod(shape)
        shard[name] = shape
    yield shard


def drawn(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """A matrix as models are initialised, on the generator's device; the weight of a norm is one."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16, device=generator.device)
    return torch.randn(shape, generator=generator, device=generator.device).mul_(0.02).to(torch.bfloat16)


# --- growth ----------------------------------------------------------------------------------------

LENGTHS, DEPTHS = (128, 256, 512, 1024, 2048), (1, 2, 3, 4)


def growth() -> None:
    config = shaped(max(DEPTHS))
    generator = torch.Generator().manual_seed(0)
    tensors = {name: drawn(shape, generator) for name, shape in tensor_shapes(config).items()}
    base = model.assemble(config, tensors)
    print("| tokens of one row, 2 blocks | " + " | ".join(f"{name}, ms a token" for name in METHODS) + " | counted |")
    print("|---|---|---|---|")
    for length in LENGTHS:
        cells = [f"{1e3 * seconds / length:.2f}" for seconds in medians(shaped(2), base, length)]
        print(f"| {length} | {' | '.join(cells)} | {counted(shaped(2), length) / length / 1e9:.2f} GFLOP |", flush=True)
    print("\n| blocks, 512 tokens | " + " | ".join(f"{name}, s" for name in METHODS) + " | counted |")
    print("|---|---|---|---|")
    for depth in DEPTHS:
        cells = [f"{seconds:.2f}" for seconds in medians(shaped(depth), base, 512)]
        print(f"| {depth} | {' | '.join(cells)} | {counted(shaped(depth), 512) / 1e9:.0f} GFLOP |", flush=True)
    print(f"\n{larger_model()}")


def larger_model() -> str:
    """What the count says of Llama-2-13B over Llama-3.1-8B, beside the paper."""
    of_8b = shaped(32)._replace(vocab_size=128256)
    of_13b = of_8b._replace(
        vocab_size=32000, hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40,
        num_key_value_heads=40,
    )  # fmt: skip
    cells = []
    for name, published in paper.GROWTH.items():
        small, large = (bench.step_flops(each, bench.PASSES[name], 16, 200, 1920, RANK) for each in (of_8b, of_13b))
        cells.append(f"{name} {large / small:.2f} (there {published})")
    return f"Counted, a step of Llama-2-13B over one of Llama-3.1-8B, as in the paper's Table 10: {', '.join(cells)}."


def shaped(blocks: int) -> Config:
    """So many blocks of Llama-3.1-8B with a small vocabulary, so that the blocks are what is measured."""
    return config_of(SHAPES["llama-3.1-8b"] | {"vocab_size": 4096, "num_hidden_layers": blocks, "rope_scaling": None})


def medians(config: Config, base: Params, length: int) -> list[float]:
    """Seconds of a gradient of each method."""
    base = base._replace(layers=base.layers[: config.num_hidden_layers])
    works = {name: gradient(name, config, base, length) for name in METHODS}
    return [statistics.median(seconds) for seconds in bench.interleaved(works, 3).values()]


def counted(config: Config, length: int) -> int:
    """Floating-point operations of an LfU (LoRA) step."""
    return bench.step_flops(config, bench.PASSES["lfu-lora"], 1, length, round(0.6 * length), RANK)


if __name__ == "__main__":
    main()

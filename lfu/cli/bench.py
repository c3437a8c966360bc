"""`lfu bench`: what a step costs on this machine. Read next: `main.py`."""

from dataclasses import dataclass

import torch

from lfu import model
from lfu.cli.options import ModelOptions, choose_device, choose_dtype, option, require_counts
from lfu.data.tokens import load_tokenizer
from lfu.errors import InputError
from lfu.io.huggingface import resolve_model
from lfu.methods import require_compiler
from lfu.profiling import bench as benchmark


@dataclass(frozen=True, kw_only=True)
class BenchOptions(ModelOptions):
    rows: int = option("rows of the batch", 4)
    length: int = option("tokens of a row", 200)
    answer: int = option("tokens of a row that carry loss", 120)
    rank: int = option("rank of the LoRA", 8)
    rounds: int = option("rounds in which everything is timed once", 7)
    prompts: int = option("prompts to decode together, of up to --length tokens", 32)
    new_tokens: int = option("tokens to decode for each prompt", 64)
    compile: bool = option("also measure our steps through torch.compile: minutes at the start", False)
    seed: int = option("seed of the random tokens and adapters", 42)


def bench(options: BenchOptions) -> str:
    """What a step costs, of SFT and of both kinds of LfU, and the speed of decoding.

    Beside transformers and peft where they are installed. Prints and returns two tables in Markdown.
    """
    require_counts(options, "rows", "length", "answer", "rank", "rounds", "prompts", "new_tokens")
    if options.compile:
        require_compiler("lfu-lora")
    if options.answer >= options.length:
        raise InputError(f"answer must be less than length, {options.length}, not {options.answer}.")
    device, folder = choose_device(options.device), resolve_model(options.model)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # the clock waits for this one
    config, base = model.load(folder, dtype=choose_dtype(options.dtype, folder, device), device=device)
    batch = benchmark.random_batch(config, options.rows, options.length, options.answer, options.seed, device)
    tokenizer, peers = load_tokenizer(folder, config.vocab_size), benchmark.load_peers(folder, base, options.rank)
    how = {"rank": options.rank, "rounds": options.rounds}
    steps = benchmark.step_table(config, base, peers, batch, compile=options.compile, **how)
    print(steps, flush=True)
    asked = {name: getattr(options, name) for name in ("prompts", "length", "new_tokens", "seed")}
    decoding = benchmark.decoding_table(config, base, tokenizer, peers, **asked, **how)
    print(f"\n{decoding}")
    return f"{steps}\n\n{decoding}"

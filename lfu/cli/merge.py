"""`lfu merge`: an adapter added to the weights of its model. Read next: `distill.py`."""

from dataclasses import dataclass
from pathlib import Path

import torch

from lfu import lora, model
from lfu.baselines.averages import ensemble
from lfu.cli.options import adapter_format, cast_adapter, check_writable, format_flags, option
from lfu.errors import InputError
from lfu.io.config import read_config, rope_keys
from lfu.io.huggingface import resolve_model, write_model
from lfu.io.tensors import stored_dtype


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    model: str = option("model folder or hub id")
    adapter: str = option("adapter folder")
    weight: float = option("the adapter's share: 1 - β in Table 11 a of the paper, where β weighs the bare model", 1.0)
    out: str = option("folder for the merged model; must not exist")


def merge(options: MergeOptions) -> Path:
    """Write the model with the adapter added to its weights, as a complete Hugging Face folder in the model's dtype.

    Prints the largest change that the rounding of the merged weights makes to the logits of 64 random tokens.
    """
    source, out = resolve_model(options.model), Path(options.out)
    if out.exists():
        raise InputError(f"{out} exists already; choose another --out.")
    check_writable(out)
    if not 0 <= options.weight <= 1:
        raise InputError(f"weight is a share from 0 to 1, not {options.weight}.")
    config = read_config(source / "config.json")
    form = adapter_format(Path(options.adapter), source)
    saved = ensemble(lora.load(Path(options.adapter), config), 1 - options.weight)
    config, base = model.load(source, dtype=stored_dtype(source, "model.embed_tokens.weight"))
    adapter = cast_adapter(saved, base)
    merged = lora.merge(base, adapter)
    write_model(out, source, model.named_tensors(config, merged), rope_keys(config))
    tokens = torch.randint(config.vocab_size, (1, 64), generator=torch.Generator().manual_seed(0))
    beside, inside = model.forward(config, base, tokens, [adapter])[0], model.forward(config, merged, tokens)[0]
    print(
        f"{out}: merged in {base.embed.dtype}. On 64 random tokens the logits change by at most "
        f"{float((inside - beside).abs().max()):.3g}, of at most {float(beside.abs().max()):.3g}."
    )
    if (Path(options.adapter) / "lfu_config.json").is_file():
        apart = "" if form.loss_on == "answer" else f", nearly: with {form.loss_on} questions are tokenised apart"
        print(f"A merged folder does not know its prompts: ask it with {format_flags(form)}{apart}.")
    return out

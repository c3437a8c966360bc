"""`lfu merge`: an adapter added to the weights of its model. Read next: `distill.py`."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from lfu import lora, model
from lfu.baselines.averages import ensemble
from lfu.cli.options import Options, StrPath, adapter_format, cast_adapter, check_writable, format_flags, option
from lfu.errors import InputError
from lfu.io.config import Config, read_config, rope_keys
from lfu.io.files import require_finite
from lfu.io.huggingface import resolve_model, write_model


@dataclass(frozen=True, kw_only=True)
class MergeOptions(Options):
    model: StrPath = option("model folder or hub id")
    adapter: StrPath = option("adapter folder")
    weight: float = option("the adapter's share: 1 - β in Table 11 a of the paper, where β weighs the bare model", 1.0)
    out: StrPath = option("folder for the merged model; must not exist")


def merge(options: MergeOptions) -> Path:
    """Write the model with the adapter added to its weights, as a complete Hugging Face folder, each in its dtype.

    Prints the largest change that the rounding of the merged weights makes to the logits of 64 random tokens.
    InputError, and nothing is written, where those weights or logits are not finite.
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
    base = model.read_params(source, config)
    adapter = cast_adapter(saved, base)
    merged = lora.merge(base, adapter)
    tensors = model.named_tensors(config, merged)
    require_finite(tensors, dict.fromkeys(tensors, f"{options.adapter} merged into {source}"))
    change, largest = rounding_change(config, base, merged, adapter)
    dtypes = " and ".join(sorted({str(tensor.dtype) for tensor in tensors.values()}))
    if not math.isfinite(change):
        raise InputError(f"Merged in {dtypes}, {source} and {options.adapter} give logits that are not finite.")
    write_model(out, source, tensors, rope_keys(config), None if form is None else form._asdict())
    print(
        f"{out}: merged in {dtypes}. On 64 random tokens the logits change by at most {change:.3g}, of at most "
        f"{largest:.3g}."
    )
    if not (source / "tokenizer.json").is_file():
        print(f"{source} has no tokenizer.json, and so {out} has none.")
    if form is not None:
        apart = "" if form.loss_on == "answer" else " and questions tokenised apart"
        print(f"Its lfu_config.json tells lfu to ask it with {format_flags(form)}{apart}. Tell other programs.")
    return out


def rounding_change(
    config: Config, base: model.Params, merged: model.Params, adapter: lora.Adapter
) -> tuple[float, float]:
    """How far the logits of 64 random tokens are from those of the adapter beside the weights, and how large these."""
    tokens = torch.randint(config.vocab_size, (1, 64), generator=torch.Generator().manual_seed(0))
    beside, inside = model.forward(config, base, tokens, [adapter])[0], model.forward(config, merged, tokens)[0]
    return float((inside - beside).abs().max()), float(beside.abs().max())

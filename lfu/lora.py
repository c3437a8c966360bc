"""LoRA: a low-rank term s·B A beside a frozen weight, as a value (Hu et al. 2022; PEFT `tuners/lora/layer.py`).

A `Lora` is a plain tree of tensors, so it can be differentiated, stepped, stacked, merged and saved. It enters the
decoder in `model.linear_with_adapters`; nothing is wrapped or patched. The scale lora_alpha / r stays outside the tree:
it is not trained.

Files have PEFT's layout and load in `peft` unchanged. Read next: `steering.py`.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lfu.errors import InputError, quote
from lfu.io.config import MODULES, Config, layer_shapes
from lfu.io.files import first_few, read_json, write_json, write_tensors
from lfu.io.keys import ADAPTER_KEYS, flag, positive, refuse_unsupported
from lfu.io.tensors import read_tensors, tensor_files
from lfu.model import Adapter, Lora, LowRank, Params, stream_dtype

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""All seven linear layers of a block, the published choice."""


def init(
    config: Config,
    rank: int,
    *,
    generator: torch.Generator,
    targets: tuple[str, ...] = TARGETS,
    dtype: torch.dtype = torch.float32,
) -> Lora:
    """A fresh adapter on the generator's device: A ~ U(-1/√in, 1/√in), drawn in float32, and B = 0: it changes nothing.

    InputError for a rank below 1 and for targets that are no linear layer of a block.
    """
    if rank < 1:
        raise InputError(f"The rank of a LoRA must be at least 1, not {rank}.")
    unknown = set(targets) - set(TARGETS)
    if unknown or not targets:
        raise InputError(f"LoRA targets must be some of {', '.join(TARGETS)}; not {sorted(unknown) or 'none at all'}.")
    shapes, device = layer_shapes(config), generator.device

    def fresh(out: int, in_: int) -> LowRank:
        A = torch.empty(rank, in_, device=device).uniform_(-1 / math.sqrt(in_), 1 / math.sqrt(in_), generator=generator)
        return LowRank(A.to(dtype), torch.zeros(out, rank, device=device, dtype=dtype))

    return [{name: fresh(*shapes[name]) for name in targets} for _ in range(config.num_hidden_layers)]


def stack(*adapters: Adapter) -> Adapter:
    """One adapter that acts as all of them: s₁B₁A₁ + s₂B₂A₂ = [s₁B₁ s₂B₂][A₁; A₂], a single pair of products.

    A scale that all share stays outside.
    """
    alike = len({scale for _, scale in adapters}) == 1
    loras = [lora if alike else fold_scale(lora, scale) for lora, scale in adapters]
    return [concatenate_ranks(layers) for layers in zip(*loras, strict=True)], adapters[0][1] if alike else 1.0


def fold_scale(lora: Lora, scale: float) -> Lora:
    """The adapter that needs no scale any more."""
    return [{name: LowRank(A, scale * B) for name, (A, B) in layer.items()} for layer in lora]


def concatenate_ranks(layers: Sequence[dict[str, LowRank]]) -> dict[str, LowRank]:
    """The ranks of one block's adapters side by side; a name may be missing from some of them."""
    pairs = {name: [layer[name] for layer in layers if name in layer] for layer in layers for name in layer}
    return {
        name: LowRank(torch.cat([A for A, _ in both]), torch.cat([B for _, B in both], dim=1))
        for name, both in pairs.items()
    }


def merge(params: Params, adapter: Adapter) -> Params:
    """W + s·B A for every adapted weight, added in the stream dtype and rounded once to the dtype of W."""
    lora, scale = adapter

    def merged(W: Tensor, pair: LowRank) -> Tensor:
        stream = torch.promote_types(W.dtype, stream_dtype(params))
        return (W.to(stream) + scale * (pair.B.to(stream) @ pair.A.to(stream))).to(W.dtype)

    layers = [
        layer._replace(**{name: merged(getattr(layer, name), pair) for name, pair in adapted.items()})
        for layer, adapted in zip(params.layers, lora, strict=True)
    ]
    return params._replace(layers=layers)


# --- PEFT's adapter folder ------------------------------------------------------------------------


def save(folder: str | Path, adapter: Adapter, *, base: str | Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors into an existing folder.

    `base` is what a reader should load below the adapter: an absolute path or a hub id. InputError for an adapter whose
    blocks have different ranks or layers, for which that folder has no form, or whose values are not finite.
    """
    folder, (lora, scale) = Path(folder), adapter
    rank = next(iter(lora[0].values())).A.shape[0]
    if any(set(layer) != set(lora[0]) or any(len(pair.A) != rank for pair in layer.values()) for layer in lora):
        raise InputError(
            f"{folder}: a PEFT folder has one rank and one set of layers for all blocks; this adapter has more."
        )
    write_tensors(folder / "adapter_model.safetensors", to_peft_tensors(lora))
    write_json(
        folder / "adapter_config.json",
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": str(base),
            "r": rank,
            "lora_alpha": scale * rank,
            "target_modules": list(lora[0]),
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": True,
            "use_rslora": False,
            "use_dora": False,
            "modules_to_save": None,
            "rank_pattern": {},
            "alpha_pattern": {},
        },
    )


def to_peft_tensors(lora: Lora) -> dict[str, Tensor]:
    """A Lora under PEFT's tensor names."""
    return {
        peft_name(index, name, part): getattr(pair, part)
        for index, layer in enumerate(lora)
        for name, pair in layer.items()
        for part in LowRank._fields
    }


def peft_name(index: int, name: str, part: str) -> str:
    """What PEFT calls factor `part` (A or B) of a layer."""
    return f"base_model.model.model.layers.{index}.{MODULES[name]}.lora_{part}.weight"


def load(
    folder: str | Path, config: Config, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> Adapter:
    """Read a PEFT LoRA folder for the model of `config`; float32 unless `dtype` says otherwise.

    InputError for options that change the computation and are not supported (DoRA, biases, per-layer ranks, ...), and
    for an adapter of another model: every tensor must be there, nothing else, and each in its shape.
    """
    folder = Path(folder)
    path = folder / "adapter_config.json"
    options = read_json(path)
    if options.get("peft_type") != "LORA":
        raise InputError(f"{path}: peft_type must be 'LORA', not {quote(options.get('peft_type'))}.")
    refuse_unsupported(path, options, ADAPTER_KEYS)
    rank, alpha = positive(path, options, "r"), positive(path, options, "lora_alpha", kind=float)
    scale = alpha / (math.sqrt(rank) if flag(path, options, "use_rslora") else rank)
    targets = read_targets(folder, options, config.num_hidden_layers)
    shapes = layer_shapes(config)
    expected: dict[str, tuple[int, ...]] = {
        peft_name(index, name, part): (rank, shapes[name][1]) if part == "A" else (shapes[name][0], rank)
        for index in range(config.num_hidden_layers)
        for name in targets
        for part in LowRank._fields
    }
    tensors = read_tensors(folder, expected, stem="adapter_model", dtype=dtype or torch.float32, device=device)
    lora = [
        {name: LowRank(*(tensors[peft_name(index, name, part)] for part in LowRank._fields)) for name in targets}
        for index in range(config.num_hidden_layers)
    ]
    return lora, scale


def read_targets(folder: Path, options: dict[str, Any], layers: int) -> tuple[str, ...]:
    """The adapted layers, by the tensors' names: `target_modules` may be a pattern in PEFT. A list must agree."""
    if (folder / "adapter_model.bin").is_file() and not (folder / "adapter_model.safetensors").is_file():
        convert = "save_file(torch.load('adapter_model.bin', weights_only=True), 'adapter_model.safetensors')"
        raise InputError(
            f"{folder} has its weights in adapter_model.bin, which is not read: a pickle can run code. Convert it by "
            f"safetensors.torch.{convert}."
        )
    tensors = tensor_files(folder, "adapter_model")
    held = tuple(name for name in TARGETS if any(f".{MODULES[name]}.lora_" in tensor for tensor in tensors))
    listed = options.get("target_modules")
    if isinstance(listed, list) and listed_targets(folder, listed, layers) != set(held):
        names = first_few(sorted(held), 7) or "none of the supported layers"
        raise InputError(
            f"{folder}: adapter_config.json lists target_modules {quote(sorted(listed))}, but "
            f"adapter_model.safetensors holds tensors for {names}."
        )
    return held


def listed_targets(folder: Path, listed: list[Any], layers: int) -> set[str]:
    """What modules a list means: an entry is a module's name or its end, as in PEFT's `check_target_module_exists`."""
    if not all(isinstance(entry, str) for entry in listed):
        raise InputError(f"{folder}: adapter_config.json has target_modules that are no names: {quote(listed)}.")
    modules = {f"model.layers.{layer}.{MODULES[name]}": name for name in TARGETS for layer in range(layers)}
    modules |= {"lm_head": "lm_head", "model.embed_tokens": "embed_tokens"}
    return {name for module, name in modules.items() if any(f".{module}".endswith(f".{entry}") for entry in listed)}

"""Tiny random models of every supported kind: as lfu values, and as Hugging Face folders written by transformers.

Small, but no feature is allowed to sleep in them: weights are wide, norm weights are not 1, the epsilon is large enough
to matter, the sliding window and the original context are shorter than the sequences, and there are fewer key/value
heads than query heads wherever the real model has fewer.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lfu.io.config import Config, Llama3Scaling, layer_shapes
from lfu.lora import TARGETS, Lora, LowRank, save
from lfu.model import Layer, Params

LENGTH = 96
"""Tokens in a comparison: longer than the windows and original contexts below."""

LLAMA2 = Config(
    model_type="llama",
    vocab_size=80,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=8,
    rms_norm_eps=1e-3,
    rope_theta=10000.0,
    rope_scaling=None,
    sliding_window=None,
    tie_word_embeddings=False,
)
GROUPED = LLAMA2._replace(num_key_value_heads=2)

CONFIGS = {
    "llama2": LLAMA2,
    # With this theta and original context, one rotary frequency of eight stays, one is blended and six are stretched.
    "llama31": GROUPED._replace(head_dim=16, rope_theta=5e5, rope_scaling=Llama3Scaling(8.0, 1.0, 4.0, 64)),
    "smollm2": GROUPED._replace(rope_theta=1e5, tie_word_embeddings=True),
    "mistral_v01": GROUPED._replace(model_type="mistral", sliding_window=24),
    "mistral_v03": GROUPED._replace(model_type="mistral", rope_theta=1e6),
    "qwen2": GROUPED._replace(model_type="qwen2", rope_theta=1e6),
    "qwen3": GROUPED._replace(model_type="qwen3", head_dim=16, rope_theta=1e6, tie_word_embeddings=True),
    "qwen3_untied": GROUPED._replace(model_type="qwen3", head_dim=16, rope_theta=1e6, num_hidden_layers=2),
}
KINDS = tuple(CONFIGS)


def tiny_config(kind: str) -> Config:
    return CONFIGS[kind]


def random_params(config: Config, *, seed: int, dtype: torch.dtype = torch.float64, std: float = 0.2) -> Params:
    """Weights ~ N(0, std²), norm weights ~ U(0.5, 1.5). Drawn in float64, so that every dtype rounds the same model."""
    generator = torch.Generator().manual_seed(seed)

    def draw(shape: tuple[int, ...]) -> Tensor:
        return random_weight(shape, std, generator).to(dtype)

    embed = draw((config.vocab_size, config.hidden_size))
    layers = [
        Layer(**{field: draw(shape) for field, shape in layer_shapes(config).items()})
        for _ in range(config.num_hidden_layers)
    ]
    head = embed if config.tie_word_embeddings else draw(tuple(embed.shape))
    return Params(embed, layers, draw((config.hidden_size,)), head)


def random_weight(shape: tuple[int, ...], std: float, generator: torch.Generator) -> Tensor:
    """A matrix is normal, a vector, the weight of a norm or a bias, lies around 1."""
    if len(shape) == 1:
        return torch.rand(shape, dtype=torch.float64, generator=generator) + 0.5
    return std * torch.randn(shape, dtype=torch.float64, generator=generator)


def random_lora(
    config: Config,
    rank: int,
    *,
    seed: int,
    dtype: torch.dtype = torch.float64,
    std: float = 0.2,
    targets: tuple[str, ...] = TARGETS,
) -> Lora:
    """An adapter in the middle of training: neither A nor B is zero."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return random_weight(shape, std, generator).to(dtype)

    shapes = layer_shapes(config)
    return [
        {name: LowRank(draw(rank, shapes[name][1]), draw(shapes[name][0], rank)) for name in targets}
        for _ in range(config.num_hidden_layers)
    ]


def needs(method: str, config: Config, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """What `methods.bind` must be given for a method, beside what all are given."""
    return {"reference": (random_lora(config, 2, seed=9, dtype=dtype), 0.5)} if method == "anchored" else {}


def needs_folder(method: str, config: Config, folder: Path) -> dict[str, Any]:
    """The same as an option of `lfu train`: the adapter is written to `folder`."""
    given = {name: (folder / name, adapter) for name, adapter in needs(method, config, torch.float32).items()}
    for path, adapter in given.values():
        path.mkdir()
        save(path, adapter, base="")
    return {name: str(path) for name, (path, _) in given.items()}


def random_tokens(config: Config, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


# --- the same models by transformers ----------------------------------------------------------------------------------


def reference_model(kind: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, std: float = 0.2) -> Any:
    """A random transformers model of this kind, with plain eager attention."""
    return reference_from(CONFIGS[kind], seed=seed, dtype=dtype, std=std)


def reference_from(
    config: Config, *, seed: int = 0, dtype: torch.dtype = torch.float32, std: float = 0.2, **changes: Any
) -> Any:
    """The same of any configuration; `changes` are to transformers' own configuration."""
    from transformers import AutoModelForCausalLM

    foreign = reference_config(config)
    foreign.update(changes)
    model = AutoModelForCausalLM.from_config(foreign, attn_implementation="eager", dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(random_weight(tuple(parameter.shape), std, generator))
    return model.eval()


def save_reference(kind: str, folder: Path, **options: Any) -> Any:
    """Write such a model to `folder` with transformers, and return it."""
    model = reference_model(kind, **options)
    model.save_pretrained(folder)
    return model


def reference_config(config: Config) -> Any:
    from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        rope |= {"rope_type": "llama3", **config.rope_scaling._asdict()}
    options = config._asdict() | {"rope_parameters": rope, "max_position_embeddings": 4 * LENGTH}
    for key in ("model_type", "rope_theta", "rope_scaling"):
        del options[key]
    if config.model_type != "mistral":
        del options["sliding_window"]
    classes = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
    return classes[config.model_type](**options, bos_token_id=1, eos_token_id=2)

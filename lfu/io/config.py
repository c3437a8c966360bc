"""config.json, as transformers 4 and 5 write it: what this decoder needs of it, and a sentence for all it cannot do.

Read next: `huggingface.py`.
"""

from pathlib import Path
from typing import Any, NamedTuple

from lfu.errors import InputError
from lfu.io.files import read_json


class Llama3Scaling(NamedTuple):
    """How Llama 3.1 stretches the slow rotary frequencies to contexts longer than it was first trained on."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


class Config(NamedTuple):
    """Everything that shapes the computation, from config.json alone. Immutable and hashable."""

    model_type: str  # llama, mistral or qwen3
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: Llama3Scaling | None
    sliding_window: int | None  # a query sees this many positions, itself included; None: all
    tie_word_embeddings: bool


ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen3": "Qwen3ForCausalLM"}


def read_config(path: Path) -> Config:
    """What of a config.json shapes the computation.

    Other keys are ignored; values that the decoder cannot compute (biases, other activations, other rope types,
    quantisation) raise InputError with the key and the value.
    """
    raw = read_json(path)
    kind = str(raw.get("model_type"))
    if kind not in ARCHITECTURES or raw.get("architectures") not in (None, [ARCHITECTURES[kind]]):
        given = f"model_type {raw.get('model_type')!r} with architectures {raw.get('architectures')!r}"
        known = ", ".join(f"{name} ({architecture})" for name, architecture in ARCHITECTURES.items())
        raise InputError(f"{path}: {given} is not supported; these are: {known}.")
    refuse_unsupported(path, raw)
    hidden_size, heads = positive(path, raw, "hidden_size"), positive(path, raw, "num_attention_heads")
    theta, scaling = read_rope(path, raw)
    config = Config(
        model_type=kind,
        vocab_size=positive(path, raw, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=positive(path, raw, "intermediate_size"),
        num_hidden_layers=positive(path, raw, "num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=positive(path, raw, "num_key_value_heads", heads),
        head_dim=positive(path, raw, "head_dim", 128 if kind == "qwen3" else hidden_size // heads),
        rms_norm_eps=positive(path, raw, "rms_norm_eps", kind=float),
        rope_theta=theta,
        rope_scaling=Llama3Scaling(**scaling) if scaling else None,
        sliding_window=read_window(path, raw),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
    )
    require_divisible(path, raw, config)
    return config


def positive(path: Path, raw: dict[str, Any], key: str, default: float | None = None, kind: type = int) -> Any:
    """A positive number of this kind; null or an absent key mean the default, if there is one."""
    value = default if raw.get(key) is None else raw[key]
    accepted = (int,) if kind is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, accepted) or not value > 0:
        raise InputError(
            f"{path}: {key} must be a positive {'integer' if kind is int else 'number'}, not {raw.get(key)!r}."
        )
    return kind(value)


def refuse_unsupported(path: Path, raw: dict[str, Any]) -> None:
    """InputError for settings that change the computation in ways this decoder does not know."""
    accepted = {
        "hidden_act": ("silu", None),
        "attention_bias": (False, None),
        "mlp_bias": (False, None),
        "use_sliding_window": (False, None),
        "quantization_config": (None,),
    }
    for key, values in accepted.items():
        if raw.get(key) not in values:
            raise InputError(f"{path}: {key} = {raw[key]!r} is not supported.")
    kinds = set(raw.get("layer_types") or ["full_attention"])
    if raw["model_type"] != "mistral" and kinds != {"full_attention"}:
        raise InputError(f"{path}: layer_types {sorted(kinds)} are not supported; every layer must be full_attention.")


def require_divisible(path: Path, raw: dict[str, Any], config: Config) -> None:
    """InputError for heads that do not divide what they share."""
    hidden_size, heads, shared = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    if heads % shared:
        raise InputError(
            f"{path}: {heads} attention heads cannot share {shared} key/value heads evenly (num_attention_heads, "
            "num_key_value_heads)."
        )
    if raw.get("head_dim") is None and config.model_type != "qwen3" and hidden_size % heads:
        raise InputError(f"{path}: hidden_size {hidden_size} is no multiple of num_attention_heads.")
    if config.head_dim % 2:
        raise InputError(f"{path}: head_dim must be even for rotary embedding, not {config.head_dim}.")


def read_window(path: Path, raw: dict[str, Any]) -> int | None:
    """Mistral's window: 4096 where the key is absent, none where it is null. Other families have none."""
    if raw["model_type"] != "mistral" or raw.get("sliding_window", 4096) is None:
        return None
    return positive(path, raw, "sliding_window", 4096)


def read_rope(path: Path, raw: dict[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """Base and scaling of the rotary embedding, from `rope_theta` and `rope_scaling` (transformers 4),
    `rope_parameters` (5), or both where they agree."""
    blocks = {key: raw[key] for key in ("rope_scaling", "rope_parameters") if raw.get(key)}
    scalings = [read_scaling(path, key, block) for key, block in blocks.items()]
    holders = [raw, *blocks.values()]
    thetas = [positive(path, each, "rope_theta", kind=float) for each in holders if each.get("rope_theta") is not None]
    if any(each != scalings[0] for each in scalings) or any(each != thetas[0] for each in thetas):
        raise InputError(
            f"{path}: rope_theta, rope_scaling and rope_parameters disagree. Keep one, or make them equal."
        )
    return thetas[0] if thetas else 10000.0, scalings[0] if scalings else None


def read_scaling(path: Path, key: str, block: Any) -> dict[str, Any] | None:
    """One block of rotary settings; only the types `default` and `llama3` are known."""
    if not isinstance(block, dict):
        raise InputError(f"{path}: {key} must be an object, not {block!r}.")
    kind = block.get("rope_type") or block.get("type") or "default"
    if kind not in ("default", "llama3"):
        raise InputError(f"{path}: {key} has rope type {kind!r}; supported are 'default' and 'llama3'.")
    unknown = set(block) - {"rope_type", "type", "rope_theta", *LLAMA3}
    if unknown:
        raise InputError(f"{path}: {key} has keys that are not known here: {', '.join(sorted(unknown))}.")
    if kind == "default":
        return None
    scaling = {name: positive(path, block, name, kind=number) for name, number in LLAMA3.items()}
    if scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise InputError(f"{path}: {key} must have a low_freq_factor below its high_freq_factor.")
    return scaling


LLAMA3 = {
    "factor": float,
    "low_freq_factor": float,
    "high_freq_factor": float,
    "original_max_position_embeddings": int,
}


NORMS = ("input_layernorm", "post_attention_layernorm")


ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")


MLP = ("gate_proj", "up_proj", "down_proj")


MODULES = {
    **{field: field for field in NORMS},
    **{field: f"self_attn.{field}" for field in ATTENTION},
    **{field: f"mlp.{field}" for field in MLP},
}
"""Layer field -> the module's name inside `model.layers.{i}`, in Hugging Face and PEFT files alike."""


def tensor_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model, by its Hugging Face name."""
    table = (config.vocab_size, config.hidden_size)
    shapes = {"model.embed_tokens.weight": table, "model.norm.weight": (config.hidden_size,), "lm_head.weight": table}
    for i in range(config.num_hidden_layers):
        shapes |= {f"model.layers.{i}.{MODULES[field]}.weight": shape for field, shape in layer_shapes(config).items()}
    return shapes


def layer_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Layer field -> shape. What `Layer` says in comments, the loader enforces from here."""
    D, F_ = config.hidden_size, config.intermediate_size
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"input_layernorm": (D,), "post_attention_layernorm": (D,)}
    shapes |= {"q_proj": (queries, D), "k_proj": (keys, D), "v_proj": (keys, D), "o_proj": (D, queries)}
    shapes |= {"gate_proj": (F_, D), "up_proj": (F_, D), "down_proj": (D, F_)}
    if config.model_type == "qwen3":
        shapes |= {"q_norm": (config.head_dim,), "k_norm": (config.head_dim,)}
    return shapes


def rope_keys(config: Config) -> dict[str, Any]:
    """The rotary keys of config.json in both forms, for a folder that any transformers will read the same."""
    scaling = {"rope_type": "llama3", **config.rope_scaling._asdict()} if config.rope_scaling else None
    parameters = (scaling or {"rope_type": "default"}) | {"rope_theta": config.rope_theta}
    return {"rope_theta": config.rope_theta, "rope_scaling": scaling, "rope_parameters": parameters}

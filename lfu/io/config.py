"""config.json, as transformers 4 and 5 write it: what this decoder needs of it, and a sentence for all it cannot do.

Read next: `huggingface.py`.
"""

from pathlib import Path
from typing import Any, NamedTuple

from lfu.errors import InputError, quote
from lfu.io.files import first_few, read_json
from lfu.io.keys import CONFIG_KEYS, flag, positive, refuse_unsupported


class Llama3Scaling(NamedTuple):
    """How Llama 3.1 stretches the slow rotary frequencies to contexts longer than it was first trained on."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


class Config(NamedTuple):
    """Everything that shapes the computation, from config.json alone. Immutable and hashable."""

    model_type: str  # llama, mistral, qwen2 or qwen3
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


ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def read_config(path: Path) -> Config:
    """What of a config.json shapes the computation.

    InputError, with the key and the value, for what the decoder cannot compute (biases other than Qwen2's, other
    activations, other rope types, quantisation) and for keys that nobody here knows: see `keys.py`.
    """
    raw = read_json(path)
    kind = read_architecture(path, raw)
    refuse_unsupported(path, raw, CONFIG_KEYS)
    hidden_size, heads = positive(path, raw, "hidden_size"), positive(path, raw, "num_attention_heads")
    layers = positive(path, raw, "num_hidden_layers")
    shared = heads if "num_key_value_heads" in raw else {"mistral": 8, "qwen2": 32, "qwen3": 32}.get(kind, heads)
    theta, scaling = read_rope(path, raw)
    config = Config(
        model_type=kind,
        vocab_size=positive(path, raw, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=positive(path, raw, "intermediate_size"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=positive(path, raw, "num_key_value_heads", shared),
        head_dim=positive(path, raw, "head_dim", 128 if kind == "qwen3" else hidden_size // heads),
        rms_norm_eps=positive(path, raw, "rms_norm_eps", 1e-6, float),
        rope_theta=theta,
        rope_scaling=Llama3Scaling(**scaling) if scaling else None,
        sliding_window=read_window(path, raw, layers),
        tie_word_embeddings=flag(path, raw, "tie_word_embeddings"),
    )
    require_divisible(path, raw, config)
    return config


def read_architecture(path: Path, raw: dict[str, Any]) -> str:
    """The model_type; InputError unless it is a known one, and no other model with the same block stands on it."""
    kind = str(raw.get("model_type"))
    if kind not in ARCHITECTURES or raw.get("architectures") not in (None, [ARCHITECTURES[kind]]):
        given = f"model_type {quote(raw.get('model_type'))} with architectures {quote(raw.get('architectures'))}"
        known = ", ".join(f"{name} ({architecture})" for name, architecture in ARCHITECTURES.items())
        raise InputError(f"{path}: {given} is not supported; these are: {known}.")
    return kind


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


def read_window(path: Path, raw: dict[str, Any], layers: int) -> int | None:
    """The window that every layer has; InputError where some have one and others none, which is not supported.

    layer_types decides, of a Mistral too: with it, transformers reads one as a Ministral. Where it is absent, all
    layers of a Mistral have the window, if there is one, and of a Qwen those from max_window_layers onward.
    """
    window, types = stated_window(path, raw), raw.get("layer_types")
    if types is None:
        all_layers = raw["model_type"] == "mistral" or raw.get("max_window_layers") == 0
        first = 0 if all_layers or window is None else positive(path, raw, "max_window_layers", 28)
        types = ["sliding_attention" if window and layer >= first else "full_attention" for layer in range(layers)]
    if not isinstance(types, list) or len(types) != layers:
        raise InputError(f"{path}: layer_types must be a list of {layers} names, not {quote(types)}.")
    if all(each == "full_attention" for each in types):
        return None
    if window is None or any(each != "sliding_attention" for each in types):
        raise InputError(
            f"{path}: layer_types {quote(types)} with a window of {window} are not supported: every layer must be "
            "full_attention, or every layer sliding_attention with a window."
        )
    return window


def stated_window(path: Path, raw: dict[str, Any]) -> int | None:
    """sliding_window where the architecture looks at it: 4096 if the key is absent, none if it is null."""
    used = {"llama": False, "mistral": True}.get(raw["model_type"], flag(path, raw, "use_sliding_window"))
    if not used or raw.get("sliding_window", 4096) is None:
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
        raise InputError(f"{path}: {key} must be an object, not {quote(block)}.")
    kind = block.get("rope_type") or block.get("type") or "default"
    if kind not in ("default", "llama3"):
        raise InputError(f"{path}: {key} has rope type {quote(kind)}; supported are 'default' and 'llama3'.")
    if block.get("partial_rotary_factor", 1.0) not in (None, 1.0):
        raise InputError(f"{path}: {key} has a partial_rotary_factor, which is not supported.")
    given = {name for name, value in block.items() if value is not None}
    if unknown := given - {"rope_type", "type", "rope_theta", "partial_rotary_factor", *LLAMA3}:
        raise InputError(f"{path}: {key} has keys that are not known here: {first_few(sorted(unknown))}.")
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
        shapes |= {tensor_name(i, field): shape for field, shape in layer_shapes(config).items()}
    return shapes


def tensor_name(layer: int, field: str) -> str:
    """What Hugging Face files call a `Layer` field of this block."""
    part = "bias" if field.endswith("_bias") else "weight"
    return f"model.layers.{layer}.{MODULES[field.removesuffix('_bias')]}.{part}"


def layer_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Layer field -> shape. What `Layer` says in comments, the loader enforces from here."""
    D, F_ = config.hidden_size, config.intermediate_size
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"input_layernorm": (D,), "post_attention_layernorm": (D,)}
    shapes |= {"q_proj": (queries, D), "k_proj": (keys, D), "v_proj": (keys, D), "o_proj": (D, queries)}
    shapes |= {"gate_proj": (F_, D), "up_proj": (F_, D), "down_proj": (D, F_)}
    if config.model_type == "qwen2":
        shapes |= {"q_proj_bias": (queries,), "k_proj_bias": (keys,), "v_proj_bias": (keys,)}
    if config.model_type == "qwen3":
        shapes |= {"q_norm": (config.head_dim,), "k_norm": (config.head_dim,)}
    return shapes


def rope_keys(config: Config) -> dict[str, Any]:
    """The rotary keys of config.json in both forms, for a folder that any transformers will read the same."""
    scaling = {"rope_type": "llama3", **config.rope_scaling._asdict()} if config.rope_scaling else None
    parameters = (scaling or {"rope_type": "default"}) | {"rope_theta": config.rope_theta}
    return {"rope_theta": config.rope_theta, "rope_scaling": scaling, "rope_parameters": parameters}

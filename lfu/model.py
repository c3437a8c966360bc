"""The decoder: Llama, Mistral, Qwen2 and Qwen3 as pure functions over the tensors of a Hugging Face folder.

    embed -> block, block, ... -> unembed

`block` is the whole architecture. What the method needs enters it at two points only: every linear layer goes through
`linear`, where LoRA adds its low-rank term, and `trunk` adds the steering vector after each block, where the
representation h_l of Eqs. 3 and 4 is taken. Parameters are never changed.

Shapes: B batch, T time, D model, H query heads, G key/value heads, h head size, F feed-forward, V vocabulary, K layers,
r rank. Weights are [out, in], as in the file. The *stream* dtype is float32, or float64 when the weights are float64:
the residual stream, norms, softmax and adapters are computed in it. Only the product W x runs in the dtype of W.

`Config` is in `io/config.py`. Formulas: transformers 5, `models/{llama,mistral,qwen2,qwen3}` and
`modeling_rope_utils.py`. Read next: `lora.py`.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lfu.half import ScaledLinear
from lfu.io.config import Config, layer_shapes, read_config, tensor_name, tensor_shapes
from lfu.io.huggingface import resolve_model
from lfu.io.tensors import check_tied, read_tensors, stored_dtype


class Layer(NamedTuple):
    """The weights of one block."""

    input_layernorm: Tensor  # [D]
    q_proj: Tensor  # [H*h, D]
    k_proj: Tensor  # [G*h, D]
    v_proj: Tensor  # [G*h, D]
    o_proj: Tensor  # [D, H*h]
    post_attention_layernorm: Tensor  # [D], which in spite of its name precedes the MLP
    gate_proj: Tensor  # [F, D]
    up_proj: Tensor  # [F, D]
    down_proj: Tensor  # [D, F]
    q_norm: Tensor | None = None  # [h], Qwen3 only
    k_norm: Tensor | None = None  # [h], Qwen3 only
    q_proj_bias: Tensor | None = None  # [H*h], Qwen2 only
    k_proj_bias: Tensor | None = None  # [G*h], Qwen2 only
    v_proj_bias: Tensor | None = None  # [G*h], Qwen2 only


class Params(NamedTuple):
    """The frozen base model."""

    embed: Tensor  # [V, D]
    layers: list[Layer]
    norm: Tensor  # [D]
    lm_head: Tensor  # [V, D]; the same tensor as `embed` where the two are tied


class LowRank(NamedTuple):
    """The two factors of one linear layer's low-rank term."""

    A: Tensor  # [r, in]
    B: Tensor  # [out, r]


Lora = list[dict[str, LowRank]]
"""One dict per block; keys are `Layer` fields, an absent key is a layer without adapter. A task's blocks have the same
keys and rank, as `init` and `load` make them."""
Adapter = tuple[Lora, float]
"""A Lora and its scale."""


class Steering(NamedTuple):
    """Vectors to add after each block, at the positions of the mask."""

    vectors: Tensor  # [K, D]
    mask: Tensor  # [B, T] bool


Product = Callable[[int, str, Tensor, Tensor], Tensor]
"""(layer, name, x, W) -> W x, the frozen part of a linear layer, in the dtype of x."""
Linear = Callable[[str, Tensor], Tensor]
"""(name, x) -> the linear layer of that name, adapters included."""
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(q [B,H,T,h], k [B,G,T,h], v [B,G,T,h]) -> [B,H,T,h]."""


def stream_dtype(params: Params) -> torch.dtype:
    """float32, or float64 where the weights are float64."""
    return torch.promote_types(params.embed.dtype, torch.float32)


# --- the forward pass -----------------------------------------------------------------------------


def frozen_linear(x: Tensor, W: Tensor) -> Tensor:  # [...,in], [out,in] -> [...,out]
    """W x in the dtype of W, cast to the dtype of x at once."""
    return F.linear(x.to(W.dtype), W).to(x.dtype)


def base_product(layer: int, name: str, x: Tensor, W: Tensor) -> Tensor:
    """The plain frozen product: it needs neither the layer's number nor its name."""
    return frozen_linear(x, W)


def forward(
    config: Config,
    params: Params,
    tokens: Tensor,
    adapters: Sequence[Adapter] = (),
    steering: Steering | None = None,
    product: Product = base_product,
) -> tuple[Tensor, list[Tensor]]:  # [B,T] int64 -> [B,T,V], K x [B,T,D]
    """Logits and the K representations h_l. Rows are right-padded: causal attention needs no padding mask."""
    hidden = trunk(config, params, embed(params, tokens), adapters, steering, product)
    return unembed(config, params, hidden[-1]), hidden


def embed(params: Params, tokens: Tensor) -> Tensor:  # [B,T] -> [B,T,D]
    """Token embeddings, in the stream dtype."""
    return params.embed[tokens].to(stream_dtype(params))


def trunk(
    config: Config,
    params: Params,
    x: Tensor,
    adapters: Sequence[Adapter] = (),
    steering: Steering | None = None,
    product: Product = base_product,
) -> list[Tensor]:  # [B,T,D] -> K x [B,T,D]
    """The residual stream after each block, before the final norm: M^(l) of Eqs. 3 and 4, l = 1..K."""
    rotary = rotary_tables(config, torch.arange(x.shape[1], device=x.device), x.dtype)
    attend = causal_attention(config, x.shape[1], x.device)
    hidden = []
    for index, layer in enumerate(params.layers):
        # The loss uses h_l beside the next block. Through a view, what flows back from the block is summed first, as in
        # `remat.rematerialised`: so recomputing changes no bit.
        x = block(config, layer, x.view_as(x), rotary, linear_with_adapters(layer, index, adapters, product), attend)
        if steering is not None:
            x = x + steering.mask[..., None] * steering.vectors[index]
        hidden.append(x)
    return hidden


def unembed(config: Config, params: Params, h: Tensor) -> Tensor:  # [...,D] -> [...,V]
    """Final norm and output layer, in the stream dtype."""
    return frozen_linear(rms_norm(h, params.norm, config.rms_norm_eps), params.lm_head)


def block(
    config: Config, layer: Layer, x: Tensor, rotary: tuple[Tensor, Tensor], linear: Linear, attend: Attend
) -> Tensor:  # [B,T,D] -> [B,T,D]
    """One decoder block. Training, the perturbed pass and cached decoding differ only in `linear` and `attend`."""
    z = rms_norm(x, layer.input_layernorm, config.rms_norm_eps)
    q, k, v = (split_heads(linear(name, z), config.head_dim) for name in ("q_proj", "k_proj", "v_proj"))
    if layer.q_norm is not None and layer.k_norm is not None:
        q, k = rms_norm(q, layer.q_norm, config.rms_norm_eps), rms_norm(k, layer.k_norm, config.rms_norm_eps)
    heads = attend(rotate(q, rotary), rotate(k, rotary), v)  # [B,H,T,h]
    x = x + linear("o_proj", heads.transpose(1, 2).flatten(2))
    z = rms_norm(x, layer.post_attention_layernorm, config.rms_norm_eps)
    return x + linear("down_proj", F.silu(linear("gate_proj", z)) * linear("up_proj", z))


def linear_with_adapters(layer: Layer, index: int, adapters: Sequence[Adapter], product: Product) -> Linear:
    """The linear layers of one block: W x + b + Σ s·B A x. The one place where LoRA enters, and Qwen2's biases."""

    def linear(name: str, x: Tensor) -> Tensor:  # [...,in] -> [...,out]
        y = product(index, name, x, getattr(layer, name))
        if (bias := getattr(layer, f"{name}_bias", None)) is not None:
            y = y + bias.to(y.dtype)
        for lora, scale in adapters:
            if name in lora[index]:
                A, B = lora[index][name]
                # B laid out as [r,out]: the CPU's products of rank 8, forward and backward, are 2 to 3 times faster so.
                y = y + F.linear(x, A) @ (scale * B).T.contiguous()
        return y

    return linear


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:  # [...,D] -> [...,D]
    """x / √(mean x² + eps), times the weight."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.to(x.dtype)


def split_heads(x: Tensor, head_dim: int) -> Tensor:  # [B,T,H*h] -> [B,H,T,h]
    """The features of each head apart."""
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def causal_attention(config: Config, length: int, device: torch.device) -> Attend:
    """Attention over one whole sequence. Grouped queries: query head i reads key/value head i // (H/G)."""
    positions = torch.arange(length, device=device)
    window = config.sliding_window if config.sliding_window and config.sliding_window < length else None
    mask = attention_mask(positions, positions, window) if window else None

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # Expanded, because CUDA's memory-efficient kernel, the one for float32, does not take grouped heads.
        k, v = (heads.repeat_interleave(q.shape[1] // heads.shape[1], dim=1) for heads in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)

    return attend


def attention_mask(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:  # [...,T], [S] -> [...,T,S] bool
    """Which key positions a query position sees: none ahead, and with a window the last `window`, itself included."""
    queries = queries[..., None]
    return (keys <= queries) & (keys > queries - window) if window else keys <= queries


# --- how the perturbed pass keeps its precision ---------------------------------------------------


Record = dict[tuple[int, str], tuple[Tensor, Tensor]]


def recording(record: Record) -> Product:
    """`base_product` that also keeps (x, W x) of every linear layer, for `relative_to`."""

    def product(layer: int, name: str, x: Tensor, W: Tensor) -> Tensor:
        y = F.linear(x.to(W.dtype), W)
        record[layer, name] = (x, y)
        return y.to(x.dtype)

    return product


def relative_to(record: Record) -> Product:
    """Difference-exact products: W x = y₀ + W (x - x₀), where y₀ = W x₀ was recorded.

    The perturbed representations differ from the clean ones by far less than their size. Rounding both to bfloat16
    would leave noise where their difference is the loss; here only the difference itself is rounded, and for float16
    scaled (`half.py`). Each entry is used once and dropped, so that memory falls as the pass goes.
    """

    def product(layer: int, name: str, x: Tensor, W: Tensor) -> Tensor:
        x0, y0 = record.pop((layer, name))
        linear = ScaledLinear.apply if W.dtype == torch.float16 else frozen_linear
        return y0.to(x.dtype) + linear(x - x0, W)

    return product


# --- rotary position embedding --------------------------------------------------------------------


def rotary_tables(config: Config, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of position x frequency, [..., T] -> [..., T, h] each.

    Computed in float32 whatever the dtype: bfloat16 cannot even hold the position 257. As transformers does.
    """
    # From the CPU, where transformers computes them too; a copy so small does not wait for an accelerator's queue.
    angles = positions[..., None].float() * inverse_frequencies(config).to(positions.device, non_blocking=True)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def inverse_frequencies(config: Config) -> Tensor:  # [h/2] float32
    """theta^(-2i/h); under `llama3` scaling slow ones are divided by the factor and the middle is blended."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64, device="cpu").float() / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    if config.rope_scaling is None:
        return frequencies
    factor, low, high, original = config.rope_scaling
    turns = original * frequencies / (2 * math.pi)  # full turns within the original context
    blend = ((turns - low) / (high - low)).clamp(0, 1)  # 0: slow, stretched; 1: fast, left alone
    return (1 - blend) * frequencies / factor + blend * frequencies


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:  # [B,H,T,h] -> [B,H,T,h]
    """Turn each pair (x_i, x_{i+h/2}) by its angle."""
    cos, sin = rotary
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


# --- reading a Hugging Face folder ----------------------------------------------------------------


def load(
    path: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> tuple[Config, Params]:
    """Read config.json and the weights of a folder or hub id.

    `dtype` None means the file's own dtype on an accelerator and float32 on the CPU. Weights that need no conversion
    are views of the memory-mapped file (CPU) or go straight to the device. InputError names whatever is missing,
    unexpected, mis-shaped or not supported.
    """
    folder = resolve_model(path)
    config = read_config(folder / "config.json")
    return config, read_params(folder, config, dtype or default_dtype(folder, torch.device(device)), device)


def read_params(
    folder: Path, config: Config, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> Params:
    """The weights of a folder; `dtype` None leaves each tensor in its own."""
    shapes, tied = tensor_shapes(config), ["lm_head.weight"] if config.tie_word_embeddings else []
    tensors = read_tensors(folder, shapes, optional=tied, ignored=[".rotary_emb.inv_freq"], dtype=dtype, device=device)
    if config.tie_word_embeddings:
        check_tied(folder, tensors)
    return assemble(config, tensors)


def default_dtype(folder: Path, device: torch.device) -> torch.dtype:
    """float32 on the CPU, elsewhere the dtype of the folder's weights."""
    return torch.float32 if device.type == "cpu" else stored_dtype(folder, "model.embed_tokens.weight")


def assemble(config: Config, tensors: dict[str, Tensor]) -> Params:
    """Hugging Face names -> Params."""
    layers = [
        Layer(**{field: tensors[tensor_name(i, field)] for field in layer_shapes(config)})
        for i in range(config.num_hidden_layers)
    ]
    embed = tensors["model.embed_tokens.weight"]
    head = embed if config.tie_word_embeddings else tensors["lm_head.weight"]
    return Params(embed, layers, tensors["model.norm.weight"], head)


def named_tensors(config: Config, params: Params) -> dict[str, Tensor]:
    """Params -> Hugging Face names, the inverse of `assemble`; a tied output layer is left out."""
    tensors = {"model.embed_tokens.weight": params.embed, "model.norm.weight": params.norm}
    for i, layer in enumerate(params.layers):
        tensors |= {tensor_name(i, field): getattr(layer, field) for field in layer_shapes(config)}
    return tensors if config.tie_word_embeddings else tensors | {"lm_head.weight": params.lm_head}

"""Two decoders for the oracle: one written out by hand in float64, and the one of transformers.

The plain one shares no line with lfu: attention goes head by head, and rotary embedding is multiplication by complex
numbers. The other is transformers' model, to which adapters, steering and the reading of h_l are hung from outside, by
forward hooks. Read next: `cases.py`.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from gradients.oracle import Decoder, Steering
from tiny import reference_config
from torch import Tensor, nn

# --- by hand --------------------------------------------------------------------------------------


def plain(config: Any, params: Any) -> Decoder:
    """A decoder, one row at a time, over any tensors with the names of a Hugging Face folder."""

    def decoder(tokens: list[int], adapters: list[Any], steering: Steering | None) -> tuple[list[Tensor], Tensor]:
        turn = rotations(config, len(tokens))
        x = params.embed[tokens]
        stream = [x]
        for index, layer in enumerate(params.layers):
            x = block(config, layer, index, x, turn, adapters)
            if steering is not None:
                vectors, positions = steering
                steered = torch.zeros(len(tokens), 1, dtype=x.dtype)
                steered[positions] = 1.0
                x = x + steered * vectors[index]
            stream.append(x)
        return stream, normed(x, params.norm, config.rms_norm_eps) @ params.lm_head.T

    return decoder


def block(config: Any, layer: Any, index: int, x: Tensor, turn: Tensor, adapters: list[Any]) -> Tensor:
    """Attention and MLP, each added to the stream."""
    z = normed(x, layer.input_layernorm, config.rms_norm_eps)
    q, k, v = (linear(layer, index, name, z, adapters) for name in ("q_proj", "k_proj", "v_proj"))
    x = x + linear(layer, index, "o_proj", attention(config, layer, q, k, v, turn), adapters)
    z = normed(x, layer.post_attention_layernorm, config.rms_norm_eps)
    gate, up = linear(layer, index, "gate_proj", z, adapters), linear(layer, index, "up_proj", z, adapters)
    return x + linear(layer, index, "down_proj", gate / (1 + (-gate).exp()) * up, adapters)


def attention(config: Any, layer: Any, q: Tensor, k: Tensor, v: Tensor, turn: Tensor) -> Tensor:
    """Head by head."""
    length, size = len(q), config.head_dim
    group = config.num_attention_heads // config.num_key_value_heads
    window = config.sliding_window or length
    seen = torch.tensor([[q - window < k <= q for k in range(length)] for q in range(length)])
    heads = []
    for head in range(config.num_attention_heads):
        mine = slice(head * size, (head + 1) * size)
        shared = slice(head // group * size, (head // group + 1) * size)
        query, key, value = q[:, mine], k[:, shared], v[:, shared]
        if config.model_type == "qwen3":
            query = normed(query, layer.q_norm, config.rms_norm_eps)
            key = normed(key, layer.k_norm, config.rms_norm_eps)
        scores = rotated(query, turn) @ rotated(key, turn).T / math.sqrt(size)
        weights = torch.where(seen, scores.exp(), 0.0)
        heads.append(weights / weights.sum(dim=-1, keepdim=True) @ value)
    return torch.cat(heads, dim=-1)


def linear(layer: Any, index: int, name: str, x: Tensor, adapters: list[Any]) -> Tensor:
    """W x, with the bias where there is one, and for every adapter a separate s·B(A x)."""
    y = torch.einsum("oi,ti->to", getattr(layer, name), x)
    if name in ("q_proj", "k_proj", "v_proj") and layer.q_proj_bias is not None:
        y = y + getattr(layer, f"{name}_bias").expand_as(y)
    for lora, scale in adapters:
        if name in lora[index]:
            A, B = lora[index][name]
            y = y + scale * torch.einsum("or,ri,ti->to", B, A, x)
    return y


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm."""
    return weight * x / ((x * x).sum(dim=-1, keepdim=True) / x.shape[-1] + eps).sqrt()


def rotations(config: Any, length: int) -> Tensor:  # [T, h/2] complex
    """e^(i·t·ω). Frequencies and angles are single precision by convention, so here too, and only here."""
    frequencies = []
    for pair in range(config.head_dim // 2):
        omega = 1 / config.rope_theta ** torch.tensor(2 * pair / config.head_dim)
        if config.rope_scaling is not None:
            factor, low, high, original = config.rope_scaling
            turns = original * omega / (2 * math.pi)
            if turns < low:
                omega = omega / factor
            elif turns < high:
                share = (turns - low) / (high - low)
                omega = (1 - share) * omega / factor + share * omega
        frequencies.append(omega)
    angles = torch.arange(length)[:, None] * torch.stack(frequencies)
    return torch.complex(angles.cos().double(), angles.sin().double())


def rotated(x: Tensor, turn: Tensor) -> Tensor:
    """The pair (x_i, x_{i+h/2}) as one complex number, turned."""
    half = x.shape[-1] // 2
    z = torch.complex(x[:, :half], x[:, half:]) * turn
    return torch.cat([z.real, z.imag], dim=-1)


# --- by transformers ------------------------------------------------------------------------------


def hooked(config: Any, params: Any) -> Decoder:
    """transformers' model of this configuration with these weights.

    The stream is read where it leaves each block: the last entry of transformers' own `hidden_states` would be the
    output of the final norm.
    """
    model = transformers_model(config, params)

    def decoder(tokens: list[int], adapters: list[Any], steering: Steering | None) -> tuple[list[Tensor], Tensor]:
        stream: list[Tensor] = []
        with hooks(model, adapters, steering, stream):
            logits = model(torch.tensor([tokens]), use_cache=False).logits
        return [model.model.embed_tokens.weight[tokens], *stream], logits[0]

    return decoder


def exact(config: Any, params: Any) -> Decoder:
    """The same in float64 throughout: transformers looks the name `torch.float32` up whenever it enters a norm."""
    decoder = hooked(config, params)

    def widened(*arguments: Any) -> tuple[list[Tensor], Tensor]:
        with patch.object(torch, "float32", torch.float64):
            return decoder(*arguments)

    return widened


def transformers_model(config: Any, params: Any) -> nn.Module:
    """A transformers model in float64, but for its norms and its softmax, which it computes in float32 all the same."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(reference_config(config), attn_implementation="eager", dtype=torch.float64)
    model.requires_grad_(False)
    decoder = model.model
    decoder.embed_tokens.weight.copy_(params.embed)
    decoder.norm.weight.copy_(params.norm)
    model.lm_head.weight.copy_(params.lm_head)
    for module, layer in zip(decoder.layers, params.layers, strict=True):
        for name, tensor in layer._asdict().items():
            if tensor is not None:
                holder = part(module, name.removesuffix("_bias"))
                (holder.bias if name.endswith("_bias") else holder.weight).copy_(tensor)
    return model.eval()


def part(layer: nn.Module, name: str) -> nn.Module:
    """The module of this name, wherever it sits inside a decoder layer."""
    holders = (layer, layer.self_attn, layer.mlp)
    return next(getattr(holder, name) for holder in holders if hasattr(holder, name))


@contextmanager
def hooks(model: nn.Module, adapters: list[Any], steering: Steering | None, stream: list[Tensor]) -> Iterator[None]:
    """Hang adapters and steering into the model, and collect what leaves its blocks, as long as the context lasts."""
    handles = [
        part(layer, name).register_forward_hook(low_rank(A, B, scale))
        for lora, scale in adapters
        for layer, pairs in zip(model.model.layers, lora, strict=True)
        for name, (A, B) in pairs.items()
    ]
    for index, layer in enumerate(model.model.layers):
        if steering is not None:
            handles.append(layer.register_forward_hook(added(steering[0][index], steering[1])))
        handles.append(layer.register_forward_hook(lambda _, __, y: stream.append(y[0])))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


Hook = Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]


def low_rank(A: Tensor, B: Tensor, scale: float) -> Hook:
    """Adds s·B A x to what a linear module returns."""
    return lambda _, inputs, y: y + scale * (inputs[0] @ A.T @ B.T)


def added(vector: Tensor, positions: list[int]) -> Hook:
    """Adds a vector to what a block returns, at some positions."""
    return lambda _, __, y: y.index_add(1, torch.tensor(positions), vector.expand(1, len(positions), -1))

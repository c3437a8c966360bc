"""A Hugging Face folder from the GGUF file of a Llama, for a machine that cannot ask a hub. Needs `pip install gguf`.

    python -m experiments.gguf OUT FILE [FILE ...]

Several files are the parts of one, in this order. Every weight is dequantised and rounded to bfloat16: the model is
what the file holds, not what it was made from. Formats: the `gguf` package, and llama.cpp's `convert_hf_to_gguf.py`,
which stores the rows of q and k with the two halves of each rotary pair side by side.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from lfu.io.config import MODULES
from lfu.io.files import write_json, write_tensors

FIELDS = {
    "attn_norm": "input_layernorm", "attn_q": "q_proj", "attn_k": "k_proj", "attn_v": "v_proj", "attn_output": "o_proj",
    "ffn_norm": "post_attention_layernorm", "ffn_gate": "gate_proj", "ffn_up": "up_proj", "ffn_down": "down_proj",
}  # fmt: skip
"""GGUF's name of a block's tensor -> the `Layer` field."""
OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("files", type=Path, nargs="+")
    parsed = parser.parse_args()
    with tempfile.NamedTemporaryFile(suffix=".gguf") as whole:
        for part in parsed.files:
            whole.write(part.read_bytes())
        whole.flush()
        convert(Path(whole.name), parsed.out)


def convert(source: Path, out: Path) -> None:
    """Write config.json, model.safetensors, tokenizer.json and what stands beside them."""
    from gguf import GGUFReader, dequantize

    reader = GGUFReader(source)
    told = {key: field.contents() for key, field in reader.fields.items()}
    out.mkdir(parents=True)
    tensors = {}
    for each in reader.tensors:
        weight = dequantize(each.data, each.tensor_type).reshape(tuple(reversed(each.shape.tolist())))
        for kind, heads in (("attn_q", "head_count"), ("attn_k", "head_count_kv")):
            if f".{kind}." in each.name:
                weight = halves_apart(weight, told[f"llama.attention.{heads}"])
        tensors[hugging_face_name(each.name)] = to_bfloat16(weight)
    write_tensors(out / "model.safetensors", tensors)
    write_json(out / "config.json", settings(told, tied="lm_head.weight" not in tensors))
    write_tokenizer(out, told)


def hugging_face_name(name: str) -> str:
    """token_embd.weight, blk.3.attn_q.weight, ... by their names in a Hugging Face folder."""
    first, *rest = name.split(".")
    if first != "blk":
        return f"{OUTSIDE[first]}.weight"
    return f"model.layers.{rest[0]}.{MODULES[FIELDS[rest[1]]]}.weight"


def halves_apart(weight: np.ndarray, heads: int) -> np.ndarray:  # [H*h,D] -> [H*h,D]
    """The rows of a head from pairs, (0, h/2), (1, h/2 + 1), ..., to one half after the other."""
    return weight.reshape(heads, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def to_bfloat16(weight: np.ndarray) -> Tensor:
    return torch.from_numpy(weight.astype(np.float32)).to(torch.bfloat16)


def settings(told: dict[str, Any], *, tied: bool) -> dict[str, Any]:
    """config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": told["llama.embedding_length"],
        "intermediate_size": told["llama.feed_forward_length"],
        "num_hidden_layers": told["llama.block_count"],
        "num_attention_heads": told["llama.attention.head_count"],
        "num_key_value_heads": told["llama.attention.head_count_kv"],
        "max_position_embeddings": told["llama.context_length"],
        "rms_norm_eps": round(float(told["llama.attention.layer_norm_rms_epsilon"]), 8),
        "rope_theta": float(told["llama.rope.freq_base"]),
        "tie_word_embeddings": tied,
        "vocab_size": len(told["tokenizer.ggml.tokens"]),
        "bos_token_id": told["tokenizer.ggml.bos_token_id"],
        "eos_token_id": told["tokenizer.ggml.eos_token_id"],
        "torch_dtype": "bfloat16",
    }


def write_tokenizer(out: Path, told: dict[str, Any]) -> None:
    """A byte-level BPE that splits numbers into digits, as SmolLM2's does; GGUF marks control tokens with type 3."""
    tokens, merges = told["tokenizer.ggml.tokens"], told["tokenizer.ggml.merges"]
    pairs = [tuple(merge.split(" ")) for merge in merges]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = told["tokenizer.ggml.token_type"]
    control = [AddedToken(token, special=True, normalized=False) for token, kind in zip(tokens, kinds) if kind == 3]
    tokenizer.add_special_tokens(control)
    tokenizer.save(str(out / "tokenizer.json"))
    eos = tokens[told["tokenizer.ggml.eos_token_id"]]
    write_json(out / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos})


if __name__ == "__main__":
    main()

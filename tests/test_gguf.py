"""A model that went through GGUF is the model that it was: the same weights, and the same tokens for a text."""

from pathlib import Path

import numpy as np
import pytest
import torch
from commands import MINI
from gguf import GGUFWriter
from safetensors.torch import load_file
from tokenizers import Tokenizer

from experiments import gguf
from lfu import model
from lfu.io.config import MODULES, read_config

KINDS = {"NORMAL": 1, "CONTROL": 3}  # of a token, gguf.TokenType


def write(path: Path) -> None:
    """The miniature as llama.cpp's converter would write it, in float32."""
    config, params = model.load(MINI)
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_context_length(256)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    tokens = ["<end>", *"abcdefgĠ", "ab"]
    writer.add_token_list(tokens)
    writer.add_token_types([KINDS["CONTROL"], *[KINDS["NORMAL"]] * 9])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    names = {theirs: ours for ours, theirs in gguf.OUTSIDE.items()}
    modules = {MODULES[field]: ours for ours, field in gguf.FIELDS.items()}
    for name, tensor in model.named_tensors(config, params).items():
        parts, weight = name.removesuffix(".weight").split("."), tensor.float().numpy()
        if parts[1] != "layers":
            writer.add_tensor(f"{names[name.removesuffix('.weight')]}.weight", weight)
            continue
        module = ".".join(parts[3:])
        for kind, heads in (("q", config.num_attention_heads), ("k", config.num_key_value_heads)):
            if module == f"self_attn.{kind}_proj":
                out, width = weight.shape
                halves = weight.reshape(heads, 2, out // heads // 2, width)
                weight = np.stack([halves[:, 0], halves[:, 1]], axis=2).reshape(out, width)
        writer.add_tensor(f"blk.{parts[2]}.{modules[module]}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_the_folder_holds_the_same_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "mini.gguf")
    whole = (tmp_path / "mini.gguf").read_bytes()
    parts = [tmp_path / "first", tmp_path / "second"]
    for part, content in zip(parts, (whole[: len(whole) // 2], whole[len(whole) // 2 :])):
        part.write_bytes(content)
    out = tmp_path / "out"
    monkeypatch.setattr("sys.argv", ["gguf.py", str(out), *map(str, parts)])
    gguf.main()
    config, params = model.load(MINI)
    read = read_config(out / "config.json")
    assert read == config._replace(vocab_size=10)
    tensors = load_file(out / "model.safetensors")
    expected = model.named_tensors(config, params)
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name].bfloat16()) for name in expected)
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    assert tokenizer.encode("abc a<end>").tokens == ["ab", "c", "Ġ", "a", "<end>"]

"""Bad input gets a sentence that names the thing and the file; writing leaves the old state or the new one."""

import json
import math
import os
import shutil
import stat
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from tiny import random_lora, reference_model, tiny_config
from torch import Tensor
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from lfu import lora
from lfu.errors import InputError
from lfu.io import files, huggingface
from lfu.io.config import read_config
from lfu.io.files import new_folder, write_json, write_tensors, write_text
from lfu.io.huggingface import resolve_model
from lfu.io.keys import ADAPTER_KEYS, CONFIG_KEYS
from lfu.lora import TARGETS
from lfu.model import load

LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4665f6a4\nsize 16060556664\n"
Q0 = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def folder(folder_of: Callable[[str], Path], tmp_path: Path) -> Path:
    """A sound model folder, to be spoilt."""
    shutil.copytree(folder_of("llama31"), tmp_path / "model")
    load(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """The same in several files."""
    reference_model("llama31").save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    load(tmp_path / "sharded")
    return tmp_path / "sharded"


def refused(sentence: str) -> Any:
    return pytest.raises(InputError, match=sentence)


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(file: Path, changes: dict[str, Tensor | None]) -> None:
    """Replace tensors, add them, or, with None, take them out."""
    tensors = load_file(file) | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file)


# --- which folder -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nowhere", "./no/where", "/no/where", "a/b/c", "../where"])
def test_neither_folder_nor_hub_id(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with refused(f"^{name} is neither a folder nor a hub id"):
        load(name)


def test_a_file_is_not_a_folder(folder: Path) -> None:
    with refused("model.safetensors is neither a folder nor a hub id"):
        load(folder / "model.safetensors")


def test_a_mistyped_folder_is_not_asked_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights" / "mini").mkdir(parents=True)
    monkeypatch.setattr(huggingface, "snapshot_download", lambda *_, **__: pytest.fail("the hub was asked"))
    with refused(r"^weights/mni does not exist; what there is in weights: mini\.$"):
        load("weights/mni")


def test_a_model_with_an_adapter_in_its_folder(folder: Path, adapter: Path) -> None:
    """Transformers would apply it."""
    shutil.copy(adapter / "adapter_config.json", folder)
    with refused("holds an adapter_config.json, by which transformers would add an adapter to the model"):
        load(folder)


def test_hub_says_no(monkeypatch: pytest.MonkeyPatch) -> None:
    def no(*_: Any, **__: Any) -> None:
        raise OSError("offline")

    monkeypatch.setattr(huggingface, "snapshot_download", no)
    with refused("no folder some/model, and the hub did not give it: offline.*HF_TOKEN"):
        load("some/model")


HUB = {
    "config.json", "generation_config.json", "model-00001-of-00004.safetensors", "model.safetensors.index.json",
    "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "merges.txt", "chat_template.jinja",
    "additional_chat_templates/tool_use.jinja",
}  # fmt: skip
"""Of what meta-llama/Llama-3.1-8B and mistralai/Mistral-7B-v0.3 hold, that which is read, or that merging hands on."""
ELSEWHERE = {
    ".gitattributes", "LICENSE", "README.md", "consolidated.safetensors", "original/consolidated.00.pth",
    "original/tokenizer.model", "pytorch_model-00001-of-00002.bin",
}  # fmt: skip


def test_of_a_hub_id_only_what_is_needed_is_downloaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(name: str, **patterns: Any) -> str:
        asked.append((name, set(filter_repo_objects(HUB | ELSEWHERE, **patterns))))
        return str(folder)

    monkeypatch.setattr(huggingface, "snapshot_download", download)
    assert resolve_model("meta-llama/Llama-3.1-8B") == folder
    assert asked == [("meta-llama/Llama-3.1-8B", HUB)]


# --- config.json ------------------------------------------------------------------------------------------------------


def test_config_missing(folder: Path) -> None:
    (folder / "config.json").unlink()
    with refused(r"config\.json does not exist"):
        load(folder)


@pytest.mark.parametrize(
    "content, sentence",
    [
        (b'{"model_type": "llama",}', "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b'["llama"]', "must hold a JSON object, not list"),
        (b'{"a": ' + 10**5 * b"[", "not valid JSON: it is nested too deeply"),
        (b'{"x": {"a": 1, "\\u001b": 2, "\\u001b": 3}}', r"not valid JSON: an object has the key \\x1b twice"),
    ],
)
def test_config_not_an_object(folder: Path, content: bytes, sentence: str) -> None:
    (folder / "config.json").write_bytes(content)
    with refused(rf"config\.json.*{sentence}"):
        load(folder)


YARN = {"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"model_type": "gpt2"}, r"model_type 'gpt2'.*not supported.*llama \(LlamaForCausalLM\)"),
        ({"model_type": None}, "model_type None with"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification.*not supported"),
        ({"model_type": "qwen3"}, "model_type 'qwen3' with architectures.*LlamaForCausalLM.*not supported"),
        ({"attention_bias": True}, "attention_bias = True is not supported"),
        ({"mlp_bias": True}, "mlp_bias = True is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config = .*gptq.* is not supported"),
        ({"use_sliding_window": "false"}, "use_sliding_window must be true or false, not 'false'"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings must be true or false, not 'false'"),
        ({"layer_types": ["full_attention"]}, r"layer_types must be a list of 3 names, not \['full_attention'\]"),
        ({"layer_types": [[], {}, 1]}, r"layer_types \[\[\], {}, 1\] with a window of None are not supported"),
        ({"layer_types": 3 * ["sliding_attention"]}, "layer_types .*sliding_attention.* with a window of None are not"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not supported"),
        ({"rope_parameters": LLAMA3 | {"partial_rotary_factor": 0.5}}, "rope_parameters has a partial_rotary_factor"),
        ({"logit_scale": 0.5}, "logit_scale = 0.5 is not known here, and may change what is computed. If it does not,"),
        ({"\x1b[2J": "x" * 500}, r"\\x1b\[2J = 'x{76}\.\.\. is not known here"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000 is beyond that of any model"),
        ({"hidden_size": 10**18}, "hidden_size = 1000000000000000000 is beyond that of any model"),
        ({"rms_norm_eps": math.inf}, "rms_norm_eps = inf is beyond"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps must be a positive number, not nan"),
        ({"rope_parameters": LLAMA3 | {"rope_theta": 10**400}}, r"rope_theta = 10{76}\.\.\. is beyond"),
        ({"rope_parameters": LLAMA3 | {"factor": math.inf}}, "factor = inf is beyond"),
        ({"rope_parameters": YARN}, "rope_parameters has rope type 'yarn'.*'default' and 'llama3'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling has rope type 'linear'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling has rope type 'dynamic'"),
        ({"rope_scaling": LLAMA3 | {"factor": 4.0}}, "rope_scaling and rope_parameters disagree"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "low_freq_factor below its high_freq_factor"),
        ({"rope_scaling": {"rope_type": "default"}}, "rope_scaling and rope_parameters disagree"),
        ({"rope_theta": 10000.0}, "rope_theta, rope_scaling and rope_parameters disagree"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}, "factor must be a positive number, not None"),
        ({"hidden_size": None}, "hidden_size must be a positive integer, not None"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive integer, not 0"),
        ({"vocab_size": "80"}, "vocab_size must be a positive integer, not '80'"),
        ({"rms_norm_eps": 0}, "rms_norm_eps must be a positive number, not 0"),
        ({"num_key_value_heads": 3}, "4 attention heads cannot share 3 key/value heads"),
        ({"num_key_value_heads": "2"}, "num_key_value_heads must be a positive integer, not '2'"),
        ({"rope_parameters": LLAMA3 | {"rope_theta": "abc"}}, "rope_theta must be a positive number, not 'abc'"),
        ({"rope_parameters": LLAMA3 | {"rope_theta": 0}}, "rope_theta must be a positive number, not 0"),
        ({"rope_scaling": LLAMA3 | {"rope_theta": 1e4}}, "rope_theta, rope_scaling and rope_parameters disagree"),
        ({"rope_scaling": "x"}, "rope_scaling must be an object, not 'x'"),
        (
            {"rope_parameters": {"full_attention": LLAMA3}},
            "rope_parameters has keys that are not known.*full_attention",
        ),
        ({"head_dim": "8"}, "head_dim must be a positive integer, not '8'"),
        ({"head_dim": 7}, "head_dim must be even"),
        ({"hidden_size": 30, "head_dim": None}, "hidden_size 30 is no multiple of num_attention_heads"),
        ({"hidden_size": 32.5}, "hidden_size must be a positive integer, not 32.5"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be a positive integer, not True"),
        ({"model_type": ["llama"]}, r"model_type \['llama'\]"),
    ],
)
def test_config_refused(folder: Path, changes: dict, sentence: str) -> None:
    change_json(folder / "config.json", **changes)
    with refused(rf"config\.json: .*{sentence}"):
        load(folder)


HARMLESS = {
    "partial_rotary_factor": 1.0, "quantization_config": {}, "use_sliding_window": True, "max_window_layers": 3,
    "layer_types": 3 * ["full_attention"], "pretraining_tp": 1, "attention_dropout": 0.1, "temperature": 0.6,
    "some_new_key": None, "another": False,
    "rope_parameters": LLAMA3 | {"rope_theta": 5e5, "attention_factor": None, "original_max_position_embeddings": 64.0},
}  # fmt: skip


def test_what_changes_nothing_is_accepted(folder: Path) -> None:
    change_json(folder / "config.json", **HARMLESS)
    assert read_config(folder / "config.json") == tiny_config("llama31")


@pytest.mark.parametrize("kind", [LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config, LoraConfig])
def test_no_key_of_transformers_and_peft_is_unknown(kind: Any) -> None:
    """A newer version's new one fails here, by its name: read it, or say why it changes nothing, or refuse it."""
    known = ADAPTER_KEYS if kind is LoraConfig else CONFIG_KEYS
    assert {each.name for each in fields(kind)} | set(kind().to_dict()) <= known.known()


def test_a_key_is_in_one_list_only() -> None:
    for keys in (CONFIG_KEYS, ADAPTER_KEYS):
        assert len(" ".join([keys.read, *keys.harmless.values(), keys.refused]).split()) == len(keys.known())
        assert set(keys.accepted) <= set(keys.refused.split())


def test_window_must_be_positive(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(folder_of("mistral_v01"), tmp_path / "model")
    change_json(tmp_path / "model" / "config.json", sliding_window=-1)
    with refused("sliding_window must be a positive integer, not -1"):
        load(tmp_path / "model")


def test_theta_inside_rope_scaling_counts(folder: Path) -> None:
    change_json(folder / "config.json", rope_scaling=LLAMA3 | {"rope_theta": 5e5}, rope_parameters=None)
    assert read_config(folder / "config.json").rope_theta == 5e5


def test_architectures_may_be_null(folder: Path) -> None:
    change_json(folder / "config.json", architectures=None)
    assert read_config(folder / "config.json").model_type == "llama"


def test_both_forms_that_agree_are_accepted(folder: Path) -> None:
    change_json(folder / "config.json", rope_theta=5e5, rope_scaling=LLAMA3)
    assert read_config(folder / "config.json") == tiny_config("llama31")


# --- weights ----------------------------------------------------------------------------------------------------------


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with refused(r"has neither model\.safetensors nor model\.safetensors\.index\.json"):
        load(folder)


def test_truncated(folder: Path) -> None:
    file = folder / "model.safetensors"
    content = file.read_bytes()
    for length in (len(content) - 1, len(content) // 2, 100, 4, 0):
        file.write_bytes(content[:length])
        with refused(r"model\.safetensors is not a complete safetensors file.*download it again"):
            load(folder)


def test_git_lfs_pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text(LFS_POINTER)
    with refused(r"model\.safetensors is not a complete safetensors file.*Git LFS pointer"):
        load(folder)


def test_missing_tensor(folder: Path) -> None:
    change_tensors(folder / "model.safetensors", {Q0: None})
    with refused(f"lacks 1 tensors that its configuration implies: {Q0}"):
        load(folder)


def test_missing_output_layer(folder: Path) -> None:
    """It is not the embedding unless config.json says so."""
    change_tensors(folder / "model.safetensors", {"lm_head.weight": None})
    with refused(r"lacks 1 tensors.*lm_head\.weight"):
        load(folder)
    change_json(folder / "config.json", tie_word_embeddings=True)
    load(folder)


def test_unexpected_tensor(folder: Path) -> None:
    """A bias, or one block more than the configuration has."""
    bias = Q0.replace("weight", "bias")
    change_tensors(folder / "model.safetensors", {bias: torch.zeros(64)})
    with refused(f"holds 1 tensors that the model has no place for: {bias}"):
        load(folder)
    change_tensors(folder / "model.safetensors", {bias: None})
    change_json(folder / "config.json", num_hidden_layers=2)
    with refused(r"holds 9 tensors that the model has no place for: model\.layers\.2\..* and 5 more"):
        load(folder)


def test_stored_frequencies_are_passed_over(folder: Path) -> None:
    """Old files carry them; they follow from the configuration."""
    change_tensors(
        folder / "model.safetensors",
        {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8, dtype=torch.float64)},
    )
    load(folder)


def test_misshaped_tensor(folder: Path) -> None:
    change_tensors(folder / "model.safetensors", {Q0: torch.zeros(32, 64)})
    with refused(rf"model\.safetensors: {Q0} has shape \(32, 64\), the configuration implies \(64, 32\)"):
        load(folder)


@pytest.mark.parametrize("dtype, name", [(torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3"), (torch.int64, "I64")])
def test_quantised_tensor(folder: Path, dtype: torch.dtype, name: str) -> None:
    change_tensors(folder / "model.safetensors", {Q0: torch.zeros(64, 32).to(dtype)})
    with refused(rf"model\.safetensors: {Q0} is stored as {name}; quantised weights are not supported"):
        load(folder)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite(folder: Path, adapter: Path, value: float) -> None:
    """Read, and, for an adapter, written: then nothing is."""
    change_tensors(folder / "model.safetensors", {Q0: torch.zeros(64, 32).index_fill(0, torch.tensor([63]), value)})
    with refused(rf"model\.safetensors: {Q0} holds values that are not finite"):
        load(folder)
    change_tensors(adapter / "adapter_model.safetensors", {UP2: torch.full((4, 32), value)})
    with refused(rf"adapter_model\.safetensors: {UP2} holds values that are not finite"):
        lora.load(adapter, CONFIG)
    spoilt = random_lora(CONFIG, 4, seed=0)
    spoilt[2]["up_proj"].A[1, 2] = value
    with refused(f"{UP2} holds values that are not finite"):
        lora.save(folder / "new", (spoilt, 1.0), base="base")
    assert not (folder / "new").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_finite_weights_whose_sum_is_not_are_read(folder: Path, dtype: torch.dtype) -> None:
    change_tensors(folder / "model.safetensors", {Q0: torch.full((64, 32), 0.9 * torch.finfo(dtype).max, dtype=dtype)})
    assert load(folder)[1].layers[0].q_proj.isfinite().all()
    if dtype == torch.float32:
        with refused(f"{Q0} holds values that are not finite"):
            load(folder, dtype=torch.float16)


def test_tie_conflict(folder: Path) -> None:
    change_json(folder / "config.json", tie_word_embeddings=True)
    with refused(r"ties lm_head\.weight to model\.embed_tokens\.weight, but the file holds two different tensors"):
        load(folder)


def test_missing_shard(sharded: Path) -> None:
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.unlink()
    with refused(rf"index\.json names files that are not there: {shard.name}\. Download them again"):
        load(sharded)


def test_shard_is_a_git_lfs_pointer(sharded: Path) -> None:
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.write_text(LFS_POINTER)
    with refused(f"{shard.name} is not a complete safetensors file"):
        load(sharded)


def test_index_disagrees_with_a_shard(sharded: Path) -> None:
    """A tensor the index places elsewhere, and one it does not know."""
    index = sharded / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    other = next(file for file in weight_map.values() if file != weight_map[Q0])
    change_json(index, weight_map=weight_map | {Q0: other})
    with refused(rf"index\.json and model-.* disagree about these tensors: {Q0}"):
        load(sharded)
    change_json(index, weight_map={name: file for name, file in weight_map.items() if name != Q0})
    with refused(rf"index\.json and {weight_map[Q0]} disagree about these tensors: {Q0}"):
        load(sharded)


@pytest.mark.parametrize("weight_map", [None, [], {"model.norm.weight": 1}])
def test_index_without_a_map(sharded: Path, weight_map: Any) -> None:
    change_json(sharded / "model.safetensors.index.json", weight_map=weight_map)
    with refused(r"index\.json has no 'weight_map' from tensor names to file names"):
        load(sharded)


@pytest.mark.parametrize("place", ["{outside}/x.safetensors", "../x.safetensors", "deep/x.safetensors"])
def test_index_that_leaves_its_folder(sharded: Path, place: str) -> None:
    index, outside = sharded / "model.safetensors.index.json", sharded.parent
    weight_map = json.loads(index.read_text())["weight_map"]
    shutil.copy(sharded / weight_map[Q0], outside / "x.safetensors")
    change_json(index, weight_map=weight_map | {Q0: place.format(outside=outside)})
    with refused(r"index\.json names files that are not in its folder: .*\.$"):
        load(sharded)


def test_names_of_tensors_reach_the_terminal_escaped(folder: Path) -> None:
    change_tensors(folder / "model.safetensors", {"\x1b[2J\nlfu: all is well": torch.zeros(1)})
    with refused(r"has no place for: \\x1b\[2J\\nlfu: all is well\.$"):
        load(folder)


# --- adapters ---------------------------------------------------------------------------------------------------------

CONFIG = tiny_config("llama31")
UP2 = "base_model.model.model.layers.2.mlp.up_proj.lora_A.weight"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A sound adapter folder, to be spoilt."""
    lora.save(tmp_path, (random_lora(CONFIG, 4, seed=0, dtype=torch.float32), 2.0), base="base")
    lora.load(tmp_path, CONFIG)
    return tmp_path


def test_adapter_of_another_model(adapter: Path) -> None:
    with refused(r"down_proj\.lora_B\.weight has shape \(32, 4\), the configuration implies \(40, 4\)"):
        lora.load(adapter, CONFIG._replace(hidden_size=40))
    with refused(r"lacks 14 tensors that its configuration implies: base_model\.model\.model\.layers\.3\."):
        lora.load(adapter, CONFIG._replace(num_hidden_layers=4))
    with refused(r"holds 14 tensors that the model has no place for: base_model\.model\.model\.layers\.2\."):
        lora.load(adapter, CONFIG._replace(num_hidden_layers=2))


def test_adapter_of_another_rank(adapter: Path) -> None:
    change_json(adapter / "adapter_config.json", r=8)
    with refused(r"down_proj\.lora_A\.weight has shape \(4, 48\), the configuration implies \(8, 48\)"):
        lora.load(adapter, CONFIG)


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"peft_type": "IA3"}, "peft_type must be 'LORA', not 'IA3'"),
        ({"peft_type": None}, "peft_type must be 'LORA', not None"),
        ({"r": 0}, "r must be a positive integer, not 0"),
        ({"r": None}, "r must be a positive integer, not None"),
        ({"r": True}, "r must be a positive integer, not True"),
        ({"lora_alpha": math.nan}, "lora_alpha must be a positive number, not nan"),
        ({"lora_alpha": 1e300}, r"lora_alpha = 1e\+300 is beyond that of any model"),
        ({"lora_alpha": 10**400}, r"lora_alpha = 10{76}\.\.\. is beyond that of any model"),
        ({"use_rslora": "false"}, "use_rslora must be true or false, not 'false'"),
        ({"use_magic": 1}, "use_magic = 1 is not known here"),
        ({"lora_alpha": "16"}, "lora_alpha must be a positive number, not '16'"),
        ({"use_dora": True}, "use_dora = True is not supported"),
        ({"bias": "all"}, "bias = 'all' is not supported"),
        ({"bias": "lora_only"}, "bias = 'lora_only' is not supported"),
        ({"lora_bias": True}, "lora_bias = True is not supported"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out = True is not supported"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save = \['lm_head'\] is not supported"),
        ({"layers_to_transform": [0]}, r"layers_to_transform = \[0\] is not supported"),
        ({"layers_pattern": "layers"}, "layers_pattern = 'layers' is not supported"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern = {'q_proj': 2} is not supported"),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern = {'q_proj': 2} is not supported"),
        ({"target_parameters": ["x"]}, "target_parameters = .* is not supported"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices = .* is not supported"),
        ({"layer_replication": [[0, 2]]}, "layer_replication = .* is not supported"),
        ({"exclude_modules": ["q_proj"]}, "exclude_modules = .* is not supported"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens = .* is not supported"),
    ],
)
def test_adapter_option_refused(adapter: Path, changes: dict, sentence: str) -> None:
    change_json(adapter / "adapter_config.json", **changes)
    with refused(rf"adapter_config\.json: {sentence}"):
        lora.load(adapter, CONFIG)


def test_adapter_without_config(adapter: Path) -> None:
    (adapter / "adapter_config.json").unlink()
    with refused(r"adapter_config\.json does not exist"):
        lora.load(adapter, CONFIG)


@pytest.mark.parametrize("targets", [list(TARGETS), "all-linear", None])
def test_adapter_without_weights(adapter: Path, targets: Any) -> None:
    change_json(adapter / "adapter_config.json", target_modules=targets)
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with refused(r"weights in adapter_model\.bin, which is not read.*save_file\(torch\.load\("):
        lora.load(adapter, CONFIG)
    (adapter / "adapter_model.bin").unlink()
    with refused(r"adapter_model\.safetensors"):
        lora.load(adapter, CONFIG)


def test_adapter_is_a_git_lfs_pointer(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").write_text(LFS_POINTER)
    with refused(r"adapter_model\.safetensors is not a complete safetensors file.*Git LFS pointer"):
        lora.load(adapter, CONFIG)


def test_adapter_lacks_a_tensor(adapter: Path) -> None:
    change_tensors(adapter / "adapter_model.safetensors", {UP2: None})
    with refused(f"lacks 1 tensors that its configuration implies: {UP2}"):
        lora.load(adapter, CONFIG)


def test_adapter_holds_another_tensor(adapter: Path) -> None:
    for name in ("base_model.model.lm_head.weight", UP2.replace("lora_A", "lora_magnitude_vector")):
        change_tensors(adapter / "adapter_model.safetensors", {name: torch.zeros(4)})
        with refused(f"holds 1 tensors that the model has no place for: {name}"):
            lora.load(adapter, CONFIG)
        change_tensors(adapter / "adapter_model.safetensors", {name: None})


def test_adapter_under_other_names(adapter: Path) -> None:
    """PEFT itself would only warn, and go on with an adapter that does nothing."""
    file = adapter / "adapter_model.safetensors"
    save_file({name.removeprefix("base_model.model."): tensor for name, tensor in load_file(file).items()}, file)
    with refused(r"lacks 42 tensors that its configuration implies: base_model\.model\.model\.layers\.0"):
        lora.load(adapter, CONFIG)


def test_adapter_lists_other_targets(adapter: Path) -> None:
    change_json(adapter / "adapter_config.json", target_modules=["q_proj", "lm_head"])
    with refused(
        r"lists target_modules \['lm_head', 'q_proj'\].* adapter_model\.safetensors holds tensors for down_proj"
    ):
        lora.load(adapter, CONFIG)


@pytest.mark.parametrize("targets", [[1, "q_proj"], [["q_proj"]], [None]])
def test_adapter_lists_what_are_no_names(adapter: Path, targets: Any) -> None:
    change_json(adapter / "adapter_config.json", target_modules=targets)
    with refused("has target_modules that are no names"):
        lora.load(adapter, CONFIG)


# --- writing ----------------------------------------------------------------------------------------------------------


class Interrupted(Exception):
    """Stands for whatever ends a write early."""


def test_folder_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "run"
    with new_folder(target) as folder:
        write_text(folder / "a.txt", "new")
        assert not target.exists()
        assert folder.parent == target.parent
    assert [path.name for path in target.parent.iterdir()] == ["run"]
    assert {path.name: path.read_text() for path in target.iterdir()} == {"a.txt": "new"}


def test_folder_replaces_the_old_one(tmp_path: Path) -> None:
    """Nothing of the old content stays behind, in the folder or beside it."""
    target = tmp_path / "run"
    target.mkdir()
    (target / "old.txt").write_text("old")
    with new_folder(target) as folder:
        (folder / "new.txt").write_text("new")
        assert (target / "old.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert [path.name for path in target.iterdir()] == ["new.txt"]


@pytest.mark.parametrize("existed", [True, False])
def test_folder_is_untouched_by_an_error(tmp_path: Path, existed: bool) -> None:
    target = tmp_path / "run"
    if existed:
        target.mkdir()
        (target / "old.txt").write_text("old")
    with pytest.raises(Interrupted), new_folder(target) as folder:
        (folder / "half.txt").write_text("ha")
        raise Interrupted
    assert [path.name for path in tmp_path.iterdir()] == ["run"] * existed
    assert not existed or {path.name: path.read_text() for path in target.iterdir()} == {"old.txt": "old"}


def test_text_appears_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "deep" / "settings.json"
    write_json(target, {"λ": 5.0})
    assert json.loads(target.read_text(encoding="utf-8")) == {"λ": 5.0}

    def interrupted(path: Path) -> None:
        assert path.read_text() == "new"
        raise Interrupted

    monkeypatch.setattr(files, "fsync", interrupted)
    with pytest.raises(Interrupted):
        write_text(target, "new")
    assert json.loads(target.read_text(encoding="utf-8")) == {"λ": 5.0}
    assert [path.name for path in target.parent.iterdir()] == ["settings.json"]


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_modes_follow_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        with new_folder(tmp_path / "adapter") as folder:
            lora.save(folder, (random_lora(CONFIG, 2, seed=0), 2.0), base="base")
        # Asking for the umask must not have changed it.
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "adapter").iterdir()}
    assert modes == {"adapter_config.json": mode, "adapter_model.safetensors": mode}


def test_tensors_written_are_the_tensors_read(tmp_path: Path) -> None:
    """Views and transposes as well: what is stored is the value, not the memory behind it."""
    table = torch.arange(12.0).reshape(3, 4)
    write_tensors(tmp_path / "t.safetensors", {"view": table[:, 1:3], "transposed": table.T})
    tensors = load_file(tmp_path / "t.safetensors")
    assert torch.equal(tensors["view"], table[:, 1:3])
    assert torch.equal(tensors["transposed"], table.T)


@pytest.mark.parametrize("value", [False, "gaussian", "eva", "orthogonal"])
def test_adapter_of_the_plain_base_is_accepted(adapter: Path, value: Any) -> None:
    before = lora.load(adapter, CONFIG)
    change_json(adapter / "adapter_config.json", init_lora_weights=value, r=4.0, lora_alpha=8.0, eva_config={"rho": 1})
    assert lora.load(adapter, CONFIG)[1] == before[1] == 2.0


@pytest.mark.parametrize("value", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga"])
def test_adapter_of_a_changed_base_is_refused(adapter: Path, value: str) -> None:
    """With these PEFT moves part of W into the adapter, which then means nothing on the plain base."""
    change_json(adapter / "adapter_config.json", init_lora_weights=value)
    with refused(f"init_lora_weights = '{value}' is not supported"):
        lora.load(adapter, CONFIG)


def test_missing_adapter_weights_are_called_missing(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    with refused("has neither adapter_model.safetensors nor"):
        lora.load(adapter, CONFIG)


def test_save_refuses_what_a_peft_folder_cannot_say(tmp_path: Path) -> None:
    first = random_lora(CONFIG, 4, seed=0, targets=("q_proj", "k_proj")), 1.0
    second = random_lora(CONFIG, 2, seed=0, targets=("q_proj",)), 1.0
    with refused("one rank and one set of layers"):
        lora.save(tmp_path, lora.stack(first, second), base="base")
    assert not list(tmp_path.iterdir())


def test_old_folder_survives_a_failing_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "run"
    target.mkdir()
    (target / "old.txt").write_text("old")
    rename = Path.rename

    def failing(self: Path, to: Path) -> Path:
        if Path(to) == target and not self.name.endswith(".old.tmp"):
            raise OSError("no rename today")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="no rename today"), new_folder(target) as folder:
        (folder / "new.txt").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert (target / "old.txt").read_text() == "old"

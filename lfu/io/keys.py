"""The keys of config.json and adapter_config.json: each is read, or changes nothing here, or is refused.

A key that is passed over may mean another model, so one of no list here is refused too, unless it is empty. Sources:
transformers 4 and 5, `configuration_utils.py` and `models/{llama,mistral,qwen2,qwen3}`; PEFT, `tuners/lora/config.py`.
Read next: `config.py`.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lfu.errors import InputError, escape, quote


class Keys(NamedTuple):
    """What the keys of a file mean here; a text holds them side by side."""

    read: str
    harmless: Mapping[str, str]  # why they change nothing -> which they are
    refused: str
    accepted: Mapping[str, Collection[Any]]  # of a refused key, the values that are as if it were absent

    def known(self) -> set[str]:
        """All that are in a list."""
        return set(" ".join([self.read, *self.harmless.values(), self.refused]).split())


CONFIG_KEYS = Keys(
    read="model_type architectures vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
    "num_key_value_heads head_dim rms_norm_eps rope_theta rope_scaling rope_parameters use_sliding_window "
    "sliding_window max_window_layers layer_types tie_word_embeddings max_position_embeddings bos_token_id "
    "eos_token_id pad_token_id",
    harmless={
        "who wrote the file": "transformers_version _name_or_path name_or_path _commit_hash unsloth_version "
        "unsloth_fixed is_llama_config transformers.js_config tokenizer_class processor_class",
        "the dtype is that of the tensors, or --dtype": "dtype torch_dtype",
        "code of the folder, which is not run": "auto_map",
        "how it was trained": "initializer_range attention_dropout hidden_dropout resid_pdrop embd_pdrop attn_pdrop "
        "gradient_checkpointing max_sequence_length model_max_length",
        "how it is computed, not what": "use_cache pretraining_tp chunk_size_feed_forward torchscript use_bfloat16 "
        "_attn_implementation _attn_implementation_autoset attn_implementation _flash_attn_2_enabled use_flash_attn",
        "what is handed back": "output_attentions output_hidden_states return_dict use_return_dict",
        "for heads other than the language model's": "num_labels id2label label2id problem_type finetuning_task "
        "task_specific_params classifier_dropout",
        "for an encoder": "is_decoder decoder_start_token_id sep_token_id",
        "decoding is told on the command line": "do_sample early_stopping num_beams num_beam_groups diversity_penalty "
        "temperature top_k top_p typical_p min_length max_length max_new_tokens repetition_penalty length_penalty "
        "no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores prefix "
        "return_dict_in_generate forced_bos_token_id forced_eos_token_id remove_invalid_values suppress_tokens "
        "exponential_decay_length_penalty begin_suppress_tokens",
    },
    refused="hidden_act attention_bias mlp_bias partial_rotary_factor quantization_config is_encoder_decoder",
    accepted={"hidden_act": ("silu",), "partial_rotary_factor": (1.0,)},
)

ADAPTER_KEYS = Keys(
    read="peft_type r lora_alpha use_rslora target_modules",
    harmless={
        "who wrote the file, for which model": "peft_version auto_mapping task_type base_model_name_or_path revision "
        "inference_mode",
        "how it was trained": "lora_dropout",
        "how it is computed, not what": "runtime_config megatron_config megatron_core ensure_weight_tying",
        "how it was begun": "loftq_config eva_config corda_config lora_ga_config",
        "options of a variant that is refused": "qalora_group_size",
    },
    refused="bias init_lora_weights use_dora use_qalora use_bdlora fan_in_fan_out lora_bias modules_to_save "
    "layers_to_transform layers_pattern layer_replication rank_pattern alpha_pattern target_parameters exclude_modules "
    "trainable_token_indices alora_invocation_tokens arrow_config kasa_config monteclora_config velora_config",
    accepted={"bias": ("none",), "init_lora_weights": (True, "gaussian", "eva", "orthogonal")},
)
"""Refused is what makes an adapter more than s·B A on every block, or, when it is begun, changes the base weights."""


def refuse_unsupported(path: Path, raw: dict[str, Any], keys: Keys) -> None:
    """InputError for the first key that may mean more than is computed here; empty values mean nothing."""
    for key, value in raw.items():
        if value and key in keys.refused.split() and value not in keys.accepted.get(key, ()):
            raise InputError(f"{path}: {key} = {quote(value)} is not supported.")
        if value and key not in keys.known():
            raise InputError(
                f"{path}: {escape(key)} = {quote(value)} is not known here, and may change what is computed. If it "
                "does not, remove the key."
            )


LARGEST = {"num_hidden_layers": 10_000}
"""Of the others, ten million, and 10¹² where it is no size: beyond that, no model is meant."""


def positive(path: Path, raw: dict[str, Any], key: str, default: float | None = None, kind: type = int) -> Any:
    """A positive number of this kind, 8.0 being an integer; null or an absent key mean the default, if there is one."""
    value: Any = default if raw.get(key) is None else raw[key]
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not value > 0 or (kind is int and value % 1 != 0):
        name = "integer" if kind is int else "number"
        raise InputError(f"{path}: {key} must be a positive {name}, not {quote(raw.get(key))}.")
    if value > LARGEST.get(key, 10**7 if kind is int else 10**12):
        raise InputError(f"{path}: {key} = {quote(value)} is beyond that of any model.")
    return kind(value)


def flag(path: Path, raw: dict[str, Any], key: str) -> bool:
    """true or false; null or an absent key mean false."""
    value = raw.get(key)
    if not isinstance(value, bool | None):
        raise InputError(f"{path}: {key} must be true or false, not {quote(value)}.")
    return bool(value)

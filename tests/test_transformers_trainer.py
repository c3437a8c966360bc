"""examples/transformers_trainer.py takes the step of `lfu_gradient`, and leaves the model as it found it."""

import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from compare import cosine, distance
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import random_lora, random_tokens, tiny_config
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    PhiConfig,
    Qwen2Config,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import examples.transformers_trainer as plugin
from lfu import lora, model, steering
from lfu.data.batches import Batch
from lfu.lora import TARGETS, Lora, LowRank, to_peft_tensors
from lfu.loss import answer_mask
from lfu.train import Aux, lfu_gradient

KIND = "llama31"
CONFIG = tiny_config(KIND)
RANK, SCALE = 2, 2.0
TASK = random_lora(CONFIG, RANK, seed=7, dtype=torch.float32)
VARIANTS = ["lora", "reps"]

CLOSE = 1e-5
"""Relative error of a gradient in float32. Measured: at most 5e-6."""


class Seen(TrainerCallback):
    """The gradient before the optimizer has it, and what is logged."""

    def __init__(self) -> None:
        self.gradient: dict[str, Tensor] = {}
        self.logs: list[dict[str, float]] = []
        self.batches: list[dict[str, Tensor]] = []
        self.draws: list[Tensor] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        self.gradient = {name.replace(".default", ""): g.clone() for name, g in trained.items()}

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        self.logs.append(logs)


def rows(vocabulary: int = CONFIG.vocab_size) -> list[dict[str, Tensor]]:
    """Four rows of one width, with 1 to 8 labelled tokens and padding."""
    tokens = random_tokens(CONFIG, 4, 14) % vocabulary
    labels, attended = tokens.clone(), torch.ones_like(tokens)
    for row, (start, end) in enumerate([(3, 4), (5, 13), (9, 14), (2, 5)]):
        labels[row, :start] = labels[row, end:] = -100
        attended[row, end:] = 0
    return [{"input_ids": t, "labels": y, "attention_mask": a} for t, y, a in zip(tokens, labels, attended)]


def peft_model(folder: Path, tmp_path: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model of a folder with TASK, which is in the middle of training."""
    (tmp_path / "task").mkdir()
    lora.save(tmp_path / "task", (TASK, SCALE), base=str(folder))
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return PeftModel.from_pretrained(base, tmp_path / "task", is_trainable=True)


def train(
    peft: nn.Module,
    tmp_path: Path,
    *,
    accumulate: int = 1,
    data: list[dict[str, Tensor]] | None = None,
    source: Any = plugin,
    mean_of_means: bool = False,
    arguments: dict[str, Any] | None = None,
    **options: Any,
) -> Seen:
    """One epoch of a single step over four rows; every micro-batch and every draw is remembered."""
    seen = Seen()

    class Recorder(source.LfuMixin, Trainer):  # type: ignore[misc, name-defined]
        def training_step(self, model: nn.Module, inputs: dict[str, Tensor], *rest: Any) -> Tensor:
            seen.batches.append(inputs)
            return super().training_step(model, inputs, *rest)

    how: dict[str, Any] = {"per_device_train_batch_size": 4 // accumulate, "gradient_accumulation_steps": accumulate}
    how |= {"num_train_epochs": 1, "logging_steps": 1, "report_to": [], "use_cpu": True, "save_strategy": "no"}
    how |= {"max_grad_norm": 0.0, "learning_rate": 0.01, "disable_tqdm": True} | (arguments or {})
    trainer = Recorder(
        peft, TrainingArguments(str(tmp_path), **how), train_dataset=data or rows(), callbacks=[seen], **options
    )
    trainer.model_accepts_loss_kwargs &= not mean_of_means
    draw = nn.init.kaiming_uniform_
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.init, "kaiming_uniform_", lambda A, a: seen.draws.append(draw(A, a=a)) or A)
        trainer.train()
    return seen


def auxiliaries(seen: Seen, variant: str, dtype: torch.dtype) -> list[Aux]:
    """What the plug-in started from in each micro-batch."""
    if variant == "reps":
        return [steering.zeros(CONFIG, dtype=dtype) for _ in seen.batches]
    draws = iter(seen.draws)
    assert len({float(A.sum()) for A in seen.draws}) == len(seen.batches) * len(TASK) * len(TARGETS)  # all are new

    def one() -> Lora:
        return [
            {name: LowRank(next(draws).to(dtype), torch.zeros_like(layer[name].B, dtype=dtype)) for name in TARGETS}
            for layer in TASK
        ]

    return [one() for _ in seen.batches]


def expected(
    folder: Path,
    seen: Seen,
    variant: str,
    *,
    mean_of_means: bool = False,
    weights: torch.dtype = torch.float32,
    dtype: torch.dtype = torch.float32,
    **how: Any,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Σ n_b/N over the same micro-batches of what lfu makes of them, with rounded weights and all else in `dtype`."""
    config, rounded = model.load(folder, dtype=weights)
    base = tree_map_only(Tensor, lambda tensor: tensor.to(dtype), rounded)
    task = [{name: LowRank(*(part.to(dtype) for part in pair)) for name, pair in layer.items()} for layer in TASK]
    counts = [int(answer_mask(inputs["labels"]).sum()) for inputs in seen.batches]
    total: dict[str, Tensor] = {name: torch.zeros_like(tensor) for name, tensor in to_peft_tensors(task).items()}
    metrics = dict.fromkeys(("sft", "consistency", "ascent_norm"), 0.0)
    for inputs, aux, count in zip(seen.batches, auxiliaries(seen, variant, dtype), counts, strict=True):
        batch = Batch(inputs["input_ids"], inputs["labels"])
        gradient, values = lfu_gradient(config, base, task, aux, batch, scale=SCALE, **how)
        weight = 1 / len(counts) if mean_of_means else count / sum(counts)
        for name, part in to_peft_tensors(gradient).items():
            total[name] += weight * part
        metrics = {name: metrics[name] + weight * float(values[name]) for name in metrics}
    return total, metrics


def error(seen: Seen, gradient: dict[str, Tensor]) -> float:
    assert set(seen.gradient) == set(gradient)
    return distance({name: seen.gradient[name] for name in gradient}, gradient)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_has_the_gradient_of_lfu(
    folder_of: Callable[[str], Path], tmp_path: Path, variant: str, accumulate: int, checkpointing: bool
) -> None:
    peft, how = peft_model(folder_of(KIND), tmp_path), {"alpha": 0.1, "lam": 5.0}
    arguments = {"gradient_checkpointing": checkpointing}
    seen = train(peft, tmp_path, accumulate=accumulate, arguments=arguments, variant=variant, **how)
    gradient, metrics = expected(folder_of(KIND), seen, variant, **how)
    assert len(seen.batches) == accumulate
    assert error(seen, gradient) < CLOSE
    assert seen.logs[0]["loss"] == pytest.approx(metrics["sft"], rel=1e-4)  # which the Trainer rounds
    assert seen.logs[0]["consistency"] == pytest.approx(metrics["consistency"], rel=CLOSE)
    assert seen.logs[0]["ascent_norm"] == pytest.approx(metrics["ascent_norm"], rel=CLOSE)


def test_micro_batches_count_as_they_do_in_the_sft_loss(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    """A model that cannot be told the number of tokens: there the Trainer takes the mean of the means."""
    peft, how = peft_model(folder_of(KIND), tmp_path), {"alpha": 0.1, "lam": 5.0, "mean_of_means": True}
    seen = train(peft, tmp_path, accumulate=2, **how)
    assert error(seen, expected(folder_of(KIND), seen, "lora", **how)[0]) < CLOSE


MISTAKES = [
    ("lora", "weight * self.lam", "2 * weight * self.lam"),
    ("lora", "alpha / norm", "alpha"),
    ("lora", "processes * mask.sum() / num_items_in_batch", "0.5"),
    ("lora", "-100, (0, 1))", "-100, (1, 0))"),
    ("lora", "layer.scaling[name] * F.linear(F", "F.linear(F"),
    ("reps", "mask[..., None] * d", "d"),
    ("reps", "F.mse_loss(states[at], h.detach())", "F.mse_loss(states[at].detach(), h)"),
    ("reps", "F.mse_loss(states[at], h.detach())", "F.mse_loss(states[at], h)"),
]


def mistaken(old: str, new: str) -> ModuleType:
    """The plug-in with one piece of its text changed."""
    text = Path(plugin.__file__).read_text(encoding="utf-8")
    assert text.count(old) == 1
    module = ModuleType("mistaken")
    exec(text.replace(old, new), vars(module))
    return module


@pytest.mark.parametrize(("variant", "old", "new"), MISTAKES)
def test_the_comparison_sees_a_mistake(
    folder_of: Callable[[str], Path], tmp_path: Path, variant: str, old: str, new: str
) -> None:
    peft, how = peft_model(folder_of(KIND), tmp_path), {"alpha": 0.1, "lam": 5.0}
    try:
        seen = train(peft, tmp_path, accumulate=2, source=mistaken(old, new), variant=variant, **how)
    except RuntimeError:  # of autograd, which has no graph for what should have been a constant
        return
    assert error(seen, expected(folder_of(KIND), seen, variant, **how)[0]) > 100 * CLOSE


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("alpha", "lam"), [(0.1, 5.0), (0.001, 500.0)])
def test_bfloat16_weights_leave_the_gradient_where_it_was(
    folder_of: Callable[[str], Path], tmp_path: Path, variant: str, alpha: float, lam: float
) -> None:
    how = {"alpha": alpha, "lam": lam}
    seen = train(peft_model(folder_of(KIND), tmp_path, torch.bfloat16), tmp_path, variant=variant, **how)
    assert bfloat16_cosine(folder_of(KIND), seen, variant, **how) > 0.99  # measured: 0.996; so lfu_gradient in bfloat16


def test_rounding_the_perturbed_states_would_show(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    how = {"alpha": 0.001, "lam": 500.0}
    rounding = mistaken("if linear not in record", "if True")
    seen = train(peft_model(folder_of(KIND), tmp_path, torch.bfloat16), tmp_path, source=rounding, **how)
    assert bfloat16_cosine(folder_of(KIND), seen, "lora", **how) < 0.9


def bfloat16_cosine(folder: Path, seen: Seen, variant: str, **how: Any) -> float:
    """Of the gradient with the same computed in float64 from the same weights."""
    gradient, _ = expected(folder, seen, variant, weights=torch.bfloat16, dtype=torch.float64, **how)
    return cosine({name: seen.gradient[name] for name in gradient}, gradient)


def test_what_is_saved_is_the_task_lora_alone(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder = folder_of(KIND)
    peft = peft_model(folder, tmp_path)
    before = {name: parameter.clone() for name, parameter in peft.named_parameters()}
    train(peft, tmp_path, arguments={"save_strategy": "steps", "save_steps": 1})
    changed = {name for name, parameter in peft.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {name for name in before if "lora_" in name}
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    peft.eval()
    logits = peft(rows()[0]["input_ids"][None]).logits
    peft.save_pretrained(tmp_path / "adapter")
    for saved in (checkpoint, tmp_path / "adapter"):
        again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), saved)
        assert torch.equal(again.eval()(rows()[0]["input_ids"][None]).logits, logits)
        own, scale = lora.load(saved, CONFIG)
        trained = {name.replace(".default", ""): p for name, p in peft.named_parameters() if "lora_" in name}
        assert scale == SCALE and to_peft_tensors(own).keys() == trained.keys()
        assert all(torch.equal(tensor, trained[name]) for name, tensor in to_peft_tensors(own).items())


SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "pad_token_id": 0}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
OTHERS = {"gemma": GemmaConfig(**SMALL, **HEADS, head_dim=8), "phi": PhiConfig(**SMALL, **HEADS)}
OTHERS["qwen2"] = Qwen2Config(**SMALL, **HEADS)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("kind", "dtype", "targets"),
    [
        *((kind, torch.float32, "all-linear") for kind in OTHERS),
        ("gemma", torch.bfloat16, "all-linear"),
        ("qwen2", torch.bfloat16, ["q_proj", "v_proj"]),
    ],
)
def test_other_architectures_train(tmp_path: Path, kind: str, dtype: torch.dtype, targets: Any, variant: str) -> None:
    base = AutoModelForCausalLM.from_config(OTHERS[kind], dtype=dtype)
    peft = get_peft_model(base, LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"))
    before = {name: parameter.clone() for name, parameter in peft.named_parameters()}
    seen = train(peft, tmp_path, accumulate=2, data=rows(64), variant=variant)
    assert seen.logs[0]["consistency"] > 0 and seen.logs[0]["ascent_norm"] > 0
    assert all(math.isfinite(value) for value in seen.logs[0].values())
    changed = {name for name, parameter in peft.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {name for name in before if "lora_B" in name}  # of a fresh LoRA A has no gradient
    assert not any("forward" in vars(module) or module._forward_pre_hooks for module in base.modules())
    assert not any(module._forward_hooks for module in base.modules())


def test_dropout_is_the_same_in_both_passes(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(folder_of(KIND))
    how = {"r": RANK, "init_lora_weights": False, "lora_dropout": 0.5, "task_type": "CAUSAL_LM"}
    seen = train(get_peft_model(base, LoraConfig(**how, target_modules="all-linear")), tmp_path, alpha=0.0)
    assert seen.logs[0]["consistency"] == 0


def test_a_micro_batch_without_labels_adds_nothing(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    peft, data = peft_model(folder_of(KIND), tmp_path), rows()
    for row in data[1:]:
        row["labels"] = torch.full_like(row["labels"], -100)
    seen = train(peft, tmp_path, accumulate=4, data=data)
    seen.batches = [inputs for inputs in seen.batches if answer_mask(inputs["labels"]).any()]
    assert len(seen.batches) == 1
    assert error(seen, expected(folder_of(KIND), seen, "lora", alpha=0.1, lam=5.0)[0]) < CLOSE


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variant": "sft"}, "The variant of LfU must be 'lora' or 'reps', not 'sft'."),
        ({"arguments": {"bf16": True}}, "Autocast rounds away"),
    ],
)
def test_what_is_refused(
    folder_of: Callable[[str], Path], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        train(peft_model(folder_of(KIND), tmp_path), tmp_path, **changes)


def test_a_model_without_lora_is_refused(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="LfU trains a LoRA, and this model has none"):
        train(AutoModelForCausalLM.from_pretrained(folder_of(KIND)), tmp_path)

"""LfU for the causal language models of transformers, with LoRA by PEFT: a mixin for Trainer, or TRL's SFTTrainer.

    class LfuTrainer(LfuMixin, Trainer): ...
    model = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct", dtype=torch.bfloat16)
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    trainer = LfuTrainer(model, TrainingArguments("out"), train_dataset=rows, variant="lora", alpha=0.1, lam=5.0)
    trainer.train()  # rows: {"input_ids", "attention_mask", "labels"}, labels -100 where there is no loss
    model.save_pretrained("out/adapter")

The step is `lfu.train.lfu_gradient`, Eqs. 2 to 6. The auxiliary component, a fresh LoRA or steering vectors, starts as
a no-op, so the Trainer's own backward pass of the SFT loss also gives its direction of ascent; a second forward and
backward pass adds the gradient of the consistency loss. No optimizer and no adapter file knows of the component.

The perturbed states differ from the clean ones by less than bfloat16 can tell: with α = 0.001 the consistency gradient
of SmolLM2 would have a cosine of 0.09 with that of float64. So for the step the residual stream is float32, and of a
frozen linear layer the second pass computes the difference only, as in `lfu.model.relative_to`: 0.9997. Autocast would
undo this: it is refused. Quantised layers stay rounded; `nn.LayerNorm` (Phi) and experts need a model in float32.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

Aux = list[tuple[Tensor, nn.Module, Callable[..., Tensor]]]
"""The auxiliary component, part by part: a tensor that is moved, and how it acts: on a module, as a forward hook."""


class LfuMixin:
    """Goes before the Trainer in the list of bases. `variant` is "lora" (Algorithm 1) or "reps" (Algorithm 2).

    Logs "consistency" and "ascent_norm" beside "loss", which is the SFT loss. DeepSpeed and FSDP have not been tried.
    """

    def __init__(self, *args: Any, variant: str = "lora", alpha: float = 0.1, lam: float = 5.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.alpha, self.lam, self.sums = alpha, lam, {}
        self.fresh = {"lora": fresh_lora, "reps": fresh_steering}.get(variant)
        if self.fresh is None:
            raise ValueError(f"The variant of LfU must be 'lora' or 'reps', not {variant!r}.")
        if not any(isinstance(module, LoraLayer) for module in self.model.modules()):
            raise ValueError("LfU trains a LoRA, and this model has none: pass it through peft.get_peft_model first.")
        if self.args.bf16 or self.args.fp16:
            raise ValueError("Autocast rounds away what LfU compares. Pass bf16=False, and load the model in bfloat16.")

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        inputs = self._prepare_inputs(inputs)
        mask = F.pad(inputs["labels"][:, 1:] != -100, (0, 1))  # the positions that predict a labelled token
        if not mask.any():
            return super().training_step(model, inputs, num_items_in_batch)
        aux = self.fresh(self.model, mask)
        with stepping(self.model, aux, mask) as states:
            with torch.random.fork_rng([self.args.device] if mask.is_cuda else []):  # one dropout mask for both passes
                loss = super().training_step(model, inputs, num_items_in_batch)  # Eq. 1
            clean, norm = dict(states), ascend([moved for moved, *_ in aux], self.alpha)  # Eq. 2
            states.clear()
            model(**{**inputs, "labels": None, "use_cache": False, "logits_to_keep": 1})
            consistency = torch.stack([F.mse_loss(states[at], h.detach()) for at, h in clean.items()]).mean()  # Eq. 5
            weight = self.weight(mask, num_items_in_batch)
            self.accelerator.backward(weight * self.lam * consistency)  # Eq. 6
        metrics = {"weight": weight, "consistency": weight * consistency.detach(), "ascent_norm": norm}
        self.sums = {name: value + self.sums.get(name, 0.0) for name, value in metrics.items()}
        return loss

    def weight(self, mask: Tensor, num_items_in_batch: Any) -> Tensor | float:
        """n_b / N, the share of this micro-batch in its optimizer step, by the rules of the Trainer's SFT loss."""
        if num_items_in_batch is None:
            return 1 / self.current_gradient_accumulation_steps
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return processes * mask.sum() / num_items_in_batch

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and (weight := self.sums.pop("weight", 0)):
            logs |= {name: float(value / weight) for name, value in self.sums.items()}
            self.sums = {}
        super().log(logs, *args, **kwargs)


def fresh_lora(model: nn.Module, mask: Tensor) -> Aux:
    """Beside each LoRA one of the same rank and scale, as PEFT starts it. At B = 0 only B has a gradient."""

    def beside(layer: LoraLayer) -> tuple[Tensor, nn.Module, Callable[..., Tensor]]:
        (name,) = layer.active_adapters
        A = nn.init.kaiming_uniform_(torch.empty_like(layer.lora_A[name].weight), a=math.sqrt(5))
        B = torch.zeros_like(layer.lora_B[name].weight, requires_grad=True)
        return B, layer, lambda _, args, y: y + layer.scaling[name] * F.linear(F.linear(args[0].to(A.dtype), A), B)

    return [beside(module) for module in model.modules() if isinstance(module, LoraLayer)]


def fresh_steering(model: nn.Module, mask: Tensor) -> Aux:
    """A vector for each block, added to its output at the positions of the mask."""
    width = model.config.get_text_config().hidden_size
    vectors = [torch.zeros(width, device=mask.device, requires_grad=True) for _ in blocks(model)]
    return [(d, block, lambda _, args, h, d=d: h + mask[..., None] * d) for d, block in zip(vectors, blocks(model))]


def ascend(aux: list[Tensor], alpha: float) -> Tensor:
    """Moves aux by α·g/‖g‖₂, one norm over all, and returns ‖g‖₂. From here on aux is a constant."""
    norm = torch.stack([part.grad.norm() for part in aux]).norm()
    step = torch.where(norm > 0, alpha / norm, 0.0)
    for part in aux:
        part.requires_grad_(False).add_(step * part.grad)
    return norm


def blocks(model: nn.Module) -> list[nn.Module]:
    """The decoder's blocks: transformers marks them as what can be checkpointed."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


@contextmanager
def stepping(model: nn.Module, aux: Aux, mask: Tensor) -> Iterator[dict[nn.Module, Tensor]]:
    """The model as it is for one step. Yields where a pass leaves its states, [n, D] after each block."""
    states, record, positions = {}, {}, mask.nonzero(as_tuple=True)

    def keep(block: nn.Module, _: Any, h: Tensor) -> None:
        states.setdefault(block, h[positions])  # not again where checkpointing recomputes the block

    hooks = [(module, lambda _, args, x: x.float()) for module in model.modules() if isinstance(module, nn.Embedding)]
    hooks += [(module, act) for _, module, act in aux] + [(block, keep) for block in blocks(model)]
    with ExitStack() as undo:
        head = model.get_output_embeddings()
        undo.callback(head.register_forward_pre_hook(lambda _, args: args[0].to(head.weight.dtype)).remove)
        for module, hook in hooks:
            undo.callback(module.register_forward_hook(hook).remove)
        for module in [module for block in blocks(model) for module in block.modules()]:
            if type(module) is nn.Linear and not module.weight.requires_grad:
                module.forward = partial(exact, record, module)
                undo.callback(delattr, module, "forward")
        yield states


def exact(record: dict[nn.Module, tuple[Tensor, Tensor]], linear: nn.Linear, x: Tensor) -> Tensor:
    """W x + b in the dtype of W; from its second call on as y₀ + W (x - x₀), where only the difference is rounded."""
    W = linear.weight
    if linear not in record:
        y = F.linear(x.to(W.dtype), W, linear.bias)
        record[linear] = x.detach(), y.detach()
        return y.to(x.dtype)
    x0, y0 = record[linear]
    return y0.to(x.dtype) + F.linear((x - x0).to(W.dtype), W).to(x.dtype)

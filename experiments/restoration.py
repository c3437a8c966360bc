"""When parameters are put back before the backward pass: what the released code's gradients are then.

    python -m experiments.restoration --model SMOLLM2 --data gsm8k/train.jsonl --adapter ADAPTER
    python -m experiments.restoration --model weights/mini --data weights/mini/math/train.jsonl --template question
                                      --adapter runs/mini-3/adapter

The released LfU (LoRA) moves the parameters in place (`p.data += step`), computes the perturbed states, puts the
parameters back (`p.data = saved`) and only then differentiates. Whatever the backward pass reads from the parameters
themselves is then not what the forward pass used. What it does read depends on the precision and on gradient
checkpointing, which runs each block once more in the backward pass; so this is tried on transformers and peft, with the
released order of things, and compared with gradients that are taken before anything is put back.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from experiments import fidelity
from lfu.data.batches import IGNORED, Batch, collate
from lfu.data.rows import read_rows
from lfu.data.tokens import Format, encode_row, load_tokenizer
from lfu.io.config import read_config
from lfu.profiling.bench import ALPHA

MODES = {
    "float32": (torch.float32, False),
    "float32, checkpointing": (torch.float32, True),
    "bfloat16 autocast": (torch.bfloat16, False),
    "bfloat16 autocast, checkpointing (as released)": (torch.bfloat16, True),
}


def main() -> None:
    parser = fidelity.arguments(__doc__)
    parsed = parser.parse_args()
    if parsed.adapter is None:
        parser.error("--adapter is needed: a fresh one has B = 0, and half of its gradient is zero")
    tokenizer = load_tokenizer(parsed.model, read_config(parsed.model / "config.json").vocab_size)
    examples = [encode_row(tokenizer, Format(parsed.template), row) for row in read_rows(parsed.data)[:8]]
    batch, other = collate(examples[:4]), collate(examples[4:])
    print("| cosine, norm ratio | SFT term | consistency term |\n|---|---|---|")
    for name, (dtype, checkpointing) in MODES.items():
        peft = load(parsed.model, parsed.adapter, dtype, checkpointing)
        right = gradients(peft, batch, other, early=False)
        early = gradients(peft, batch, other, early=True)
        print(f"| {name} | " + " | ".join(map(str, map(fidelity.compared, early, right))) + " |", flush=True)


def load(folder: Path, adapter: Path, dtype: torch.dtype, checkpointing: bool) -> nn.Module:
    """The model as LLaMA-Factory trains it: base weights in `dtype`, adapters in float32."""
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    if checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        base.enable_input_require_grads()
    return PeftModel.from_pretrained(base, adapter, is_trainable=True).train()


def gradients(peft: nn.Module, batch: Batch, other: Batch, *, early: bool) -> tuple[Tensor, Tensor]:
    """Of the SFT term and of the consistency term, taken before the parameters are put back, or (`early`) after."""
    parameters = [p for p in peft.parameters() if p.requires_grad]
    saved = [p.detach().clone() for p in parameters]
    loss, clean = loss_and_states(peft, batch)
    sft = backward(loss, parameters)
    ascent = backward(loss_and_states(peft, other)[0], parameters).split([p.numel() for p in parameters])
    length = torch.cat(ascent).norm()
    for p, g in zip(parameters, ascent, strict=True):
        p.data += (ALPHA * g / length).view_as(p).to(p.dtype)
    _, perturbed = loss_and_states(peft, batch)
    distance = mean_squared(perturbed, clean, batch.labels != IGNORED)
    if early:
        put_back(parameters, saved)
        sft = backward(loss, parameters)
    consistency = backward(distance, parameters)
    put_back(parameters, saved)
    return sft, consistency


def loss_and_states(peft: nn.Module, batch: Batch) -> tuple[Tensor, tuple[Tensor, ...]]:
    low = next(p for p in peft.parameters() if not p.requires_grad).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
        outputs = peft(input_ids=batch.tokens, labels=batch.labels, output_hidden_states=True, use_cache=False)
    return outputs.loss, outputs.hidden_states


def mean_squared(perturbed: tuple[Tensor, ...], clean: tuple[Tensor, ...], chosen: Tensor) -> Tensor:
    pairs = zip(perturbed, clean, strict=True)
    return torch.stack([F.mse_loss(p[chosen], c[chosen].detach()) for p, c in pairs]).mean()


def backward(value: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    """The gradient as one float64 vector. (`torch.autograd.grad` does not go through reentrant checkpointing.)"""
    for p in parameters:
        p.grad = None
    value.backward(retain_graph=True)
    return torch.cat(
        [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters]
    ).double()


def put_back(parameters: list[nn.Parameter], saved: list[Tensor]) -> None:
    for p, before in zip(parameters, saved, strict=True):
        p.data = before


if __name__ == "__main__":
    main()

"""The benchmark measures what it says: its slow contestant is the same gradient, its arithmetic PyTorch's own count."""

import re

import pytest
import torch
from commands import MINI
from compare import distance, relative
from gradients.cases import AUXILIARIES, SETTINGS, case, fresh
from tiny import CONFIGS, random_lora, random_params
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lfu.cli import main
from lfu.data.tokens import load_tokenizer
from lfu.model import load
from lfu.profiling import bench
from lfu.train import lfu_gradient

CLOSE = 1e-12
"""Relative error in float64. Measured: at most 3e-14."""


@pytest.mark.parametrize("auxiliary", AUXILIARIES)
def test_three_passes_give_the_gradient_of_two(auxiliary: str) -> None:
    config, base, task, _ = case()
    aux = fresh(config, auxiliary)
    fused = lfu_gradient(config, base, task, aux, case().batch, **SETTINGS)
    three = bench.three_pass_gradient(config, base, task, aux, case().batch, **SETTINGS)
    assert distance(three[0], fused[0]) < CLOSE
    assert set(three[1]) == set(fused[1])
    assert all(relative(float(three[1][name]), float(fused[1][name])) < CLOSE for name in fused[1])


def block_flops_error(name: str) -> float:
    """By what a third block adds, because the first one does less: nobody differentiates its input.

    PyTorch counts whole scores, not their causal half, and four products backward from scores that were kept: twelve
    halves in place of our seven.
    """
    (ours, theirs), (before, theirs_before) = counts(name, blocks=3), counts(name, blocks=2)
    attention = 2 * ROWS * LENGTH * (LENGTH / 2) * WIDE.num_attention_heads * WIDE.head_dim
    return relative(ours - before + 5 * attention * len(bench.PASSES[name]), theirs - theirs_before)


def head_flops_error(name: str) -> float:
    """By what a larger vocabulary adds."""
    (ours, theirs), (before, theirs_before) = counts(name, vocabulary=160), counts(name, vocabulary=96)
    return relative(ours - before, theirs - theirs_before)


OWN = ("sft", "lfu-lora", "lfu-reps", "lfu-lora, three passes")
WIDE = CONFIGS["smollm2"]._replace(hidden_size=64, intermediate_size=96)
ROWS, LENGTH, ANSWER, RANK = 2, 24, 14, 4
EQUAL = 1e-9


@pytest.mark.parametrize("name", OWN)
def test_the_arithmetic_is_what_pytorch_counts(name: str) -> None:
    assert block_flops_error(name) < EQUAL
    assert head_flops_error(name) < EQUAL


def counts(name: str, blocks: int = 2, vocabulary: int = 96) -> tuple[int, int]:
    """Our count and PyTorch's, of attention as plain matrix products, which are all it knows on a CPU."""
    config = WIDE._replace(num_hidden_layers=blocks, vocab_size=vocabulary)
    base, task = random_params(config, seed=1), random_lora(config, RANK, seed=2)
    batch = bench.random_batch(config, ROWS, LENGTH, ANSWER, 0, torch.device("cpu"))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        bench.own_steps(config, base, task, batch)[name]()
    ours = bench.step_flops(config, bench.PASSES[name], ROWS, LENGTH, ROWS * ANSWER, RANK)
    return ours, counter.get_total_flops()


def test_the_command_prints_every_contestant(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", str(MINI), "--rows", "2", "--length", "24", "--answer", "8", "--rounds", "1"]
    arguments += ["--prompts", "3", "--new-tokens", "4"]
    assert main(["bench", *arguments, "--dtype", "bfloat16"]) == 0
    table = capsys.readouterr().out
    for name in bench.PASSES:
        row = re.search(rf"^\| {re.escape(name)} \| (\d+\.\d\d) \(.*%", table, re.MULTILINE)
        assert row and float(row[1]) > 0
    for name in ("lfu", "lfu, with LoRA", "transformers", "transformers + peft"):
        assert re.search(rf"^\| {re.escape(name)} \| [1-9]\d* \| \d+\.\d\d \(", table, re.MULTILINE)
    assert "3 prompts of 16 to 24 tokens, 4 new tokens each" in table
    assert re.search(r"SFT's arithmetic: frozen weights \d+\.\d%, adapters .*, output layer \d+\.\d%\.", table)
    assert "2 x 24 tokens, 16 with loss, torch.bfloat16" in table


def test_all_decode_equally_many_tokens() -> None:
    config, base = load(MINI)
    tokenizer, peers = load_tokenizer(MINI, config.vocab_size), bench.load_peers(MINI, base, 4)
    prompts = [[5, 6, 7], [8, 9]]
    works = bench.decoding_works(config, base, tokenizer, peers, prompts, rank=4, new_tokens=30)
    for name in ("lfu", "lfu, with LoRA"):
        assert [len(completion.tokens) for _, completion in works[name]()] == [30, 30]
    for name in ("transformers", "transformers + peft"):
        assert works[name]().shape == (2, 33)


def test_an_answer_as_long_as_its_row_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--model", str(MINI), "--length", "8", "--answer", "8"]) == 2
    assert "answer must be less than length, 8, not 8." in capsys.readouterr().err

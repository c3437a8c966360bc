"""Memory: what is counted is what the allocator hands out, and taking less of it changes no bit of a gradient."""

from collections.abc import Callable
from functools import cache, partial
from itertools import accumulate
from typing import Any

import pytest
import torch
from compare import flat, relative
from gradients.cases import AUXILIARIES, SETTINGS, case, fresh
from tiny import CONFIGS, KINDS, needs, random_lora, random_params, random_tokens
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_map

from lfu.data.batches import Example, collate
from lfu.lora import Lora
from lfu.methods import METHODS, bind
from lfu.model import Config, Params, attention_mask, stream_dtype
from lfu.profiling.memory import expected_peak, peak
from lfu.train import Method, lfu_gradient, sft_gradient

LFU = ("lfu-lora", "lfu-reps")


# --- less memory for more time --------------------------------------------------------------------


def remat_gap(kind: str, auxiliary: str, dtype: torch.dtype) -> float:
    """The largest difference that `remat` makes anywhere in the gradient or the metrics."""
    given = case(kind)
    base = tree_map(lambda leaf: None if leaf is None else leaf.to(dtype), given.base)
    task = tree_map(partial(Tensor.to, dtype=stream_dtype(base)), given.task)
    if auxiliary == "none":
        gradient = partial(sft_gradient, given.config, base, task, given.batch, scale=2.0)
    else:
        aux = tree_map(partial(Tensor.to, dtype=stream_dtype(base)), fresh(given.config, auxiliary))
        gradient = partial(lfu_gradient, given.config, base, task, aux, given.batch, **SETTINGS)
    return float((flat(gradient()) - flat(gradient(remat=True))).abs().max())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("auxiliary", ["none", *AUXILIARIES])
@pytest.mark.parametrize("kind", KINDS)
def test_remat_changes_no_bit(kind: str, auxiliary: str, dtype: torch.dtype) -> None:
    assert remat_gap(kind, auxiliary, dtype) == 0.0


@pytest.mark.parametrize("name", ["sft", *LFU])
def test_remat_keeps_little_but_the_states(name: str) -> None:
    """Of each block the plain pass keeps dozens of tensors, and remat one."""
    plain, again = (allocated(partial(step, method(name, remat=remat), 4, 64)) for remat in (False, True))
    assert again < 0.35 * plain


def test_remat_is_not_for_the_released_methods_nor_for_the_compiler() -> None:
    with pytest.raises(ValueError, match="remat and compile exclude each other"):
        method("sft", remat=True, compile=True)
    for option in ("remat", "compile"):
        with pytest.raises(ValueError, match="released-lora has no remat and cannot be compiled"):
            method("released-lora", **{option: True})


# --- how much a step takes ------------------------------------------------------------------------


@cache
def problem() -> tuple[Config, Params, Lora]:
    config = CONFIGS["llama31"]._replace(num_hidden_layers=6)
    return config, random_params(config, seed=1), random_lora(config, 2, seed=2)


def method(name: str, **options: Any) -> Method:
    config = problem()[0]
    return bind(name, config, scale=2.0, examples=rows(4, 64), **needs(name, config), **options)[0]


def rows(count: int, length: int) -> list[Example]:
    """Rows of this length, three fifths of which are answer."""
    config, prompt = problem()[0], length - round(0.6 * length)
    return [Example(random_tokens(config, length, seed=row).tolist(), prompt, row) for row in range(count)]


def step(method: Method, count: int, length: int) -> object:
    return method(*problem(), collate(rows(count, length)), torch.Generator().manual_seed(0))


def allocated(work: Callable[[], object]) -> int:
    """The most bytes at a time that PyTorch's own allocator reports to its profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    changes = [event.nbytes() for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(changes))


@pytest.mark.parametrize("name", METHODS)
def test_peak_is_what_the_allocator_reports(name: str) -> None:
    """But for temporaries inside an operation, which no one outside sees. Measured: at most 3 % apart."""
    work = partial(step, method(name), 4, 64)
    assert peak(work) == pytest.approx(allocated(work), rel=0.1)


NEAR = 5e-3
"""Relative error of the expected peak, beside `peak` itself: bytes, the same every time. Measured: at most 4.3e-3."""


def expected_peak_error(name: str, rank: int, remat: bool, shape: tuple[int, int] = (4, 200)) -> float:
    """For a model so wide that the adapters' gradients outweigh the states of a short row."""
    config = CONFIGS["llama31"]._replace(hidden_size=256, intermediate_size=512, num_hidden_layers=3)
    given = config, random_params(config, seed=1), random_lora(config, rank, seed=2)
    chosen = bind(name, config, scale=2.0, remat=remat)[0]
    expected = expected_peak(partial(chosen.probe, *given), shape[0] * shape[1], 0.6)
    batch = collate(rows(*shape))
    return relative(expected, peak(lambda: chosen(*given, batch, torch.Generator().manual_seed(0))))


@pytest.mark.parametrize("shape", [(1, 200), (4, 64), (2, 500)])
@pytest.mark.parametrize("rank", [8, 64])
@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("name", ["sft", *LFU])
def test_the_expected_peak_is_the_peak(name: str, remat: bool, rank: int, shape: tuple[int, int]) -> None:
    assert expected_peak_error(name, rank, remat, shape) < NEAR


def test_trying_a_method_leaves_its_state_alone() -> None:
    chosen = method("released-reps")
    chosen.probe(*problem(), rows(1, 16)[0])
    assert chosen.state == {}


@pytest.mark.parametrize("window", [None, 100])
def test_a_mask_takes_a_byte_for_each_pair_of_positions(window: int | None) -> None:
    """With a window, two masks are combined to a third; their difference in int64 took eight bytes more."""
    positions = torch.arange(1000)
    assert peak(lambda: attention_mask(positions, positions, window)) < (4 if window else 2) * len(positions) ** 2

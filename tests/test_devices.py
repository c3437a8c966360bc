"""What can be said of accelerators without one: which is chosen, where tensors are made, what a process keeps."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from commands import MINI, environment
from tiny import needs
from torch.utils._pytree import tree_leaves

from lfu import methods, model, train
from lfu.cli.options import best_device, choose_dtype
from lfu.data.batches import Example
from lfu.data.tokens import load_tokenizer
from lfu.errors import InputError
from lfu.evaluation.nll import answer_nll
from lfu.generate import generate
from lfu.profiling import bench
from lfu.schedule import Settings


@pytest.mark.parametrize(
    ("there", "best"), [(("cuda", "mps"), "cuda"), (("mps",), "mps"), ((), "cpu")], ids=["both", "mps", "none"]
)
def test_the_best_device_is_chosen(there: tuple[str, ...], best: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in there)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in there)
    assert best_device() == best


def test_mps_has_no_float64() -> None:
    with pytest.raises(InputError, match="The device mps has no float64: give --dtype float32, or --device cpu"):
        choose_dtype("float64", MINI, torch.device("mps"))
    assert choose_dtype("float32", MINI, torch.device("mps")) == torch.float32


# --- where things are made ------------------------------------------------------------------------


EXAMPLES = [Example([5] * 9 + [7] * 3, 6, row) for row in range(8)]


def gradient(name: str, remat: bool = False) -> Callable[[], Any]:
    config, base = model.load(MINI)
    task, batch = bench.fresh_task(config, base, 2), bench.random_batch(config, 2, 12, 6, 0, torch.device("cpu"))
    given = {"examples": EXAMPLES, "settings": Settings(batch_size=4), "remat": remat} | needs(
        name, config, torch.float32
    )
    method, _ = methods.bind(name, config, scale=2.0, **given)
    return lambda: method(config, base, task, batch, torch.Generator("cpu").manual_seed(0))


def other_works() -> dict[str, Callable[[], Any]]:
    config, base = model.load(MINI)
    task, tokenizer = bench.fresh_task(config, base, 2), load_tokenizer(MINI, config.vocab_size)
    settings = Settings(epochs=1, batch_size=4, micro_batch_size=2)
    method, _ = methods.bind("lfu-lora", config, scale=2.0)
    optimizer = torch.optim.SGD(tree_leaves(task))  # older releases make a number of AdamW's on the default device
    return {
        "train": lambda: list(train.train(config, base, task, optimizer, EXAMPLES, method, settings)),
        "generate": lambda: list(generate(config, base, tokenizer, [[5, 6, 7], [5, 6]], max_new_tokens=4)),
        "answer_nll": lambda: answer_nll(config, base, EXAMPLES),
    }


WORKS = (
    {name: lambda name=name: gradient(name)() for name in methods.METHODS}
    | {f"{name} remat": lambda name=name: gradient(name, remat=True)() for name in ("sft", "lfu-lora", "lfu-reps")}
    | {name: lambda name=name: other_works()[name]() for name in other_works()}
)


@pytest.mark.parametrize("work", WORKS.values(), ids=WORKS)
def test_everything_says_on_which_device_it_is_made(work: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A table or mask made on the default device, not on that of the tokens, would be on "meta" here, and no operation
    takes tensors of both."""
    load = model.load
    monkeypatch.setattr(model, "load", lambda *where, **how: on_cpu(lambda: load(*where, **how)))
    monkeypatch.setattr(bench, "random_batch", lambda *which: on_cpu(lambda make=RANDOM_BATCH: make(*which)))
    with torch.device("meta"):
        work()


RANDOM_BATCH = bench.random_batch


def on_cpu(make: Callable[[], Any]) -> Any:
    with torch.device("cpu"):
        return make()


def test_a_table_made_on_the_default_device_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "inverse_frequencies", lambda config: torch.ones(config.head_dim // 2))
    work = gradient("sft")
    with torch.device("meta"), pytest.raises((RuntimeError, NotImplementedError)):
        work()


# --- what a process keeps -------------------------------------------------------------------------

FAULTS = """
import resource, sys, torch
from lfu import cli
if sys.argv[1] == "keep":
    cli.keep_freed_memory()
def work():
    x = torch.ones(2**21)
    for _ in range(20):
        x = (x * 2.0 - x).square() + x
for _ in range(3):
    work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(how: str, **environ: str) -> int:
    """Of a chain of operations on 8 MiB, done five times, after it was done three times."""
    run = subprocess.run(
        [sys.executable, "-c", FAULTS, how], env=environment() | environ, capture_output=True, text=True, check=True
    )
    return int(run.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc is Linux's")
def test_freed_memory_is_kept() -> None:
    assert page_faults("keep") < page_faults("as it comes") / 4


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc is Linux's")
def test_who_tells_malloc_what_to_do_is_obeyed() -> None:
    assert page_faults("keep", MALLOC_TRIM_THRESHOLD_="131072") > 100

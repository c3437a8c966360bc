"""`compiled()` gives the compiler one graph per gradient for all shapes, and the same gradients as `differentiate`.

The backend here is `aot_eager`: it traces as the real one does, forward and backward, and leaves out the minutes in
which C++ is generated.
"""

import json
import re
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import MINI, lfu, sums, write_rows
from compare import distance
from gradients.cases import AUXILIARIES, SETTINGS, case, fresh
from safetensors.torch import load_file, save_file
from tiny import needs, random_tokens

from lfu.data.batches import Batch, Example, collate
from lfu.errors import InputError
from lfu.methods import bind, require_compiler
from lfu.train import compiled, lfu_gradient, sft_gradient

CLOSE = 1e-12
"""Relative error in float64. Measured: at most 4e-15."""
SHAPES = ((5, 10, 4), (2, 17, 1), (4, 12, 9))
"""Rows, length and prompt length. A row alone would be a graph of its own."""


@pytest.fixture(autouse=True)
def tracing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    yield
    torch._dynamo.reset()


def batch_of(count: int, length: int, prompt: int) -> Batch:
    config = case().config
    return collate([Example(random_tokens(config, length, seed=row).tolist(), prompt, row) for row in range(count)])


def compiles(name: str) -> Any:
    """A case of this method, left out where this torch is said not to compile it."""
    try:
        require_compiler(name)
    except InputError as error:
        return pytest.param(name, marks=pytest.mark.skip(reason=str(error)))
    return name


here = pytest.mark.skipif(not isinstance(compiles("sft"), str), reason="this torch is too old")


@here
@pytest.mark.parametrize("auxiliary", ["none", *AUXILIARIES])
def test_one_graph_serves_all_shapes_and_gives_the_same_gradient(auxiliary: str) -> None:
    differentiate = compiled()
    for shape in SHAPES:
        plain = gradient(auxiliary, batch_of(*shape), {})
        with torch._dynamo.config.patch(error_on_recompile=shape != SHAPES[0]):
            traced = gradient(auxiliary, batch_of(*shape), {"differentiate": differentiate})
        assert distance(traced[0], plain[0]) < CLOSE
        assert {name: float(value) for name, value in traced[1].items()} == pytest.approx(
            {name: float(value) for name, value in plain[1].items()}, rel=CLOSE
        )


def gradient(auxiliary: str, batch: Batch, how: dict[str, Any]) -> Any:
    config, base, task, _ = case()
    base, task = base._replace(layers=base.layers[:1]), task[:1]
    if auxiliary == "none":
        return sft_gradient(config, base, task, batch, scale=SETTINGS["scale"], **how)
    aux = fresh(config, auxiliary)[:1]
    return lfu_gradient(config, base, task, aux, batch, **SETTINGS, **how)


@pytest.mark.parametrize("name", [compiles(name) for name in ("l1", "logit-consistency", "anchored")])
def test_the_baselines_are_one_graph_too(name: str) -> None:
    config, base, task, _ = case()
    config, base, task = config._replace(num_hidden_layers=1), base._replace(layers=base.layers[:1]), task[:1]
    batch, given = batch_of(*SHAPES[0]), needs(name, config)

    def computed(traced: bool) -> Any:
        method, _ = bind(name, config, scale=2.0, compile=traced, **given)
        return method(config, base, task, batch, torch.Generator().manual_seed(0))[0]

    assert distance(computed(True), computed(False)) < CLOSE


@here
def test_a_run_that_is_compiled_trains_the_same_adapter(tmp_path: Path) -> None:
    """Of one block, for time; the last micro-batch is a row alone."""
    folder = shutil.copytree(MINI, tmp_path / "model", ignore=shutil.ignore_patterns("*.jsonl"))
    settings, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(settings | {"num_hidden_layers": 1}))
    first = {name: tensor for name, tensor in tensors.items() if not re.search(r"layers\.[1-9]", name)}
    save_file(first, folder / "model.safetensors")
    rows, adapters = write_rows(tmp_path / "rows.jsonl", sums(5)), []
    common = {"model": folder, "data": rows, "method": "sft", "dtype": "float64", "epochs": 1, "warmup": 0.0}
    for name, options in {"plain": {}, "traced": {"compile": True}}.items():
        assert lfu("train", out=tmp_path / name, **common, **options) == 0
        adapters.append(list(load_file(tmp_path / name / "adapter" / "adapter_model.safetensors").values()))
    assert distance(*adapters) < 1e-10


@pytest.mark.parametrize(
    ("version", "name", "least"),
    [
        ("2.7.1+cu126", "sft", "2.8"),
        ("2.12.0", "l1", "2.13"),
        ("2.12.0", "logit-consistency", "2.13"),
        ("2.8.0", "sft", None),
    ],
)
def test_a_torch_that_cannot_compile_a_method_says_so(
    version: str, name: str, least: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    if least is None:
        require_compiler(name)
        return
    with pytest.raises(
        InputError, match=f"torch {least} or newer is needed, and this is {re.escape(version)}: leave out"
    ):
        bind(name, case().config, scale=2.0, compile=True)

"""Going on from an adapter, and averages of adapters, through the command: `--adapter`, `--ema`, `merge --weight`."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import MINI, lfu, read_lines, refusal, sums, write_rows
from compare import gap
from safetensors.torch import load_file
from torch import Tensor

from lfu import lora
from lfu.checkpoints import checkpoints
from lfu.io.files import sha256
from lfu.model import load

ROUNDED = 1e-6
"""Averages of float32 numbers of at most 1 in another order. Measured: 6e-8."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", sums(12))


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps with an average, every one of them saved."""
    return trained(data, tmp_path_factory.mktemp("run") / "run", keep=9, save_every=1, ema=0.5)


def trained(data: Path, out: Path, **options: Any) -> Path:
    assert lfu("train", **settings(data) | {"out": out} | options) == 0
    return out


def settings(data: Path) -> dict[str, Any]:
    how = {"method": "sft", "template": "plain", "epochs": 2, "batch_size": 4, "learning_rate": 0.01}
    return {"model": MINI, "data": data} | how


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_ema_is_the_moving_average_of_every_step(run: Path) -> None:
    steps = checkpoints(run)
    assert len(steps) == 6
    # The start is not saved; with learning rate 0 in the first step, it is what the first step left.
    average = tensors(steps[0])
    for step in steps:
        average = {name: 0.5 * average[name] + 0.5 * value for name, value in tensors(step).items()}
        assert all(gap(average[name], value) < ROUNDED for name, value in tensors(step / "ema").items())
    ended = tensors(run / "ema")
    assert all(torch.equal(ended[name], value) for name, value in tensors(steps[-1] / "ema").items())
    assert any(gap(ended[name], value) > 1e-3 for name, value in tensors(run / "adapter").items())


def test_a_run_with_an_average_resumes_bit_for_bit(data: Path, run: Path, tmp_path: Path) -> None:
    again = trained(data, tmp_path / "again", keep=9, save_every=1, ema=0.5)
    for step in checkpoints(again)[2:]:
        for file in sorted(step.rglob("*"), reverse=True):
            file.rmdir() if file.is_dir() else file.unlink()
        step.rmdir()
    for name in ("adapter", "ema"):
        for file in (again / name).iterdir():
            file.unlink()
        (again / name).rmdir()
    trained(data, again, keep=9, save_every=1, ema=0.5, resume=True)
    for name in ("adapter", "ema"):
        expected = tensors(run / name)
        assert all(torch.equal(value, expected[key]) for key, value in tensors(again / name).items())


def test_a_run_goes_on_from_an_adapter(data: Path, run: Path, tmp_path: Path) -> None:
    """With learning rate 0 it ends where it began; otherwise it begins with the loss it was left at."""
    start = run / "adapter"
    still = trained(data, tmp_path / "still", adapter=start, learning_rate=0.0)
    assert all(torch.equal(value, tensors(start)[name]) for name, value in tensors(still / "adapter").items())
    on = trained(data, tmp_path / "on", adapter=start)
    first, fresh = (read_lines(folder / "log.jsonl")[0]["sft"] for folder in (on, run))
    assert first < 0.8 * fresh
    settings = json.loads((on / "settings.json").read_text())
    assert settings["adapter_sha256"] == sha256(start / "adapter_model.safetensors")


def test_a_damaged_average_is_refused(
    data: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(run, tmp_path / "run")
    damaged = checkpoints(out)[-1] / "ema" / "adapter_model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    assert lfu("train", **settings(data) | {"out": out, "keep": 9, "save_every": 1, "ema": 0.5, "resume": True}) == 2
    assert refusal(capsys).startswith(f"{damaged} is damaged")


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_merge_with_a_weight_adds_that_share_of_the_update(run: Path, tmp_path: Path, weight: float) -> None:
    assert lfu("merge", model=MINI, adapter=run / "adapter", out=tmp_path / "merged", weight=weight) == 0
    config, base = load(MINI)
    pairs, scale = lora.load(run / "adapter", config)
    W, (A, B) = base.layers[0].down_proj, pairs[0]["down_proj"]
    expected = (W + weight * scale * B @ A).bfloat16()
    assert torch.equal(load(tmp_path / "merged", dtype=torch.bfloat16)[1].layers[0].down_proj, expected)
    assert torch.equal(expected, W.bfloat16()) == (weight == 0)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"adapter": "RUN", "rank": 4}, "has rank 8 and scale 2: give --rank 8 --lora-alpha 16."),
        ({"adapter": "RUN", "lora_alpha": 8}, "has rank 8 and scale 2: give --rank 8 --lora-alpha 16."),
        ({"adapter": "nowhere"}, "adapter_config.json does not exist"),
        ({"adapter": "FOLDER"}, "is the folder of a run: give "),
        ({"adapter": "RUN", "template": "question"}, "with other prompts: give --template plain --bos."),
        ({"adapter": "RUN", "bos": False}, "with other prompts: give --template plain --bos."),
        ({"ema": 1.0}, "ema must be at least 0 and less than 1, not 1.0."),
    ],
)
def test_train_refuses(
    options: dict[str, Any], sentence: str, data: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"RUN": run / "adapter", "FOLDER": run}
    options = {name: places.get(value, value) for name, value in options.items()}
    assert lfu("train", **settings(data) | {"out": tmp_path / "run"} | options) == 2
    assert sentence in refusal(capsys)
    assert not (tmp_path / "run").exists()


def test_a_run_does_not_resume_from_another_adapter(
    data: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = trained(data, tmp_path / "run", adapter=run / "adapter")
    assert lfu("train", **settings(data) | {"out": out, "resume": True}) == 2
    assert "the adapter to continue from differs" in refusal(capsys)


def test_merge_refuses_a_weight_that_is_no_share(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lfu("merge", model=MINI, adapter=run / "adapter", out=tmp_path / "merged", weight=1.5) == 2
    assert refusal(capsys) == "weight is a share from 0 to 1, not 1.5."

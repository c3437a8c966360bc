"""The random weights of `experiments/scale.py` are a model folder like any other, shard by shard."""

from pathlib import Path

import pytest
import torch

from experiments import scale
from lfu import model
from lfu.io.config import read_config, tensor_shapes
from lfu.io.files import write_json


@pytest.mark.parametrize("shape", scale.SHAPES)
def test_what_is_written_can_be_loaded(shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 128}
    monkeypatch.setattr(scale, "SHARD", 40_000)
    scale.write(scale.SHAPES[shape] | small, tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    config, base = model.load(tmp_path, dtype=torch.bfloat16)
    assert config.model_type == scale.SHAPES[shape]["model_type"]
    assert 0.019 < float(base.layers[1].down_proj.float().std()) < 0.021
    assert torch.equal(base.norm, torch.ones(64, dtype=torch.bfloat16))


def test_the_published_shapes_have_their_published_sizes(tmp_path: Path) -> None:
    sizes = {"llama-3.1-8b": 8_030_261_248, "mistral-7b-v0.3": 7_248_023_552}
    for shape, size in sizes.items():
        write_json(tmp_path / f"{shape}.json", scale.SHAPES[shape])
        shapes = tensor_shapes(read_config(tmp_path / f"{shape}.json"))
        assert sum(torch.Size(each).numel() for each in shapes.values()) == size


def test_the_count_says_what_a_larger_model_costs() -> None:
    assert "Table 10: sft 1.75 (there 1.15), lfu-lora 1.78 (there 1.16)" in scale.larger_model()

"""LoRA is PEFT's LoRA: the same logits from the same files, in both directions, and the same merged model.

And the algebra that the method leans on: a fresh adapter changes nothing, two stacked adapters act as the two together.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compare import gap
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import (
    random_lora,
    random_params,
    random_tokens,
    random_weight,
    reference_model,
    tiny_config,
)
from torch import Tensor

from lfu import lora
from lfu.errors import InputError
from lfu.io.config import Llama3Scaling
from lfu.lora import TARGETS, Adapter, LowRank
from lfu.model import Params, forward, load

# Against PEFT, in float32: 8.6e-6 measured, on logits of size 6. One decade on top.
TOLERANCE = 1e-4
# The same sums in another order, in float64: 2.0e-14 measured, on logits of size 6.
EXACT = 1e-12

KIND = "smollm2"  # q_proj and o_proj are square, so that even A and B exchanged would fit
CONFIG = tiny_config(KIND)
TOKENS = random_tokens(CONFIG, 2, 40)


def logits(params: Params, *adapters: Adapter) -> Tensor:
    return forward(CONFIG, params, TOKENS, adapters)[0]


# --- a fresh adapter --------------------------------------------------------------------------------------------------


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def fresh_error(dtype: torch.dtype = torch.float32) -> float:
    """How far a fresh adapter moves the logits."""
    params = random_params(CONFIG, seed=0, dtype=dtype)
    stream = torch.promote_types(dtype, torch.float32)
    fresh = [
        {name: LowRank(A.to(stream), B.to(stream)) for name, (A, B) in layer.items()}
        for layer in lora.init(CONFIG, 4, generator=generator())
    ]
    return gap(logits(params, (fresh, 2.0)), logits(params))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_fresh_adapter_changes_nothing(dtype: torch.dtype) -> None:
    assert fresh_error(dtype) == 0.0


def misdrawn() -> int:
    """How many factors are not drawn as PEFT draws them: A ~ U(-1/√in, 1/√in), with deviation bound/√3, and B = 0."""
    count = 0
    for layer in lora.init(CONFIG, 64, generator=generator()):
        for A, B in layer.values():
            bound = 1 / math.sqrt(A.shape[1])
            within = 0.99 * bound < A.max() <= bound and -bound <= A.min() < -0.99 * bound
            # 2048 draws or more: 4 standard errors of a uniform distribution's deviation are 0.04 of it.
            uniform = math.isclose(A.std().item(), bound / math.sqrt(3), rel_tol=0.04)
            count += not (within and uniform) + bool(B.any())
    return count


def test_init_as_peft() -> None:
    fresh = lora.init(CONFIG, 64, generator=generator())
    assert len(fresh) == CONFIG.num_hidden_layers
    assert all(tuple(layer) == TARGETS for layer in fresh)
    assert {factor.dtype for layer in fresh for pair in layer.values() for factor in pair} == {torch.float32}
    assert misdrawn() == 0


def test_init_is_determined_by_the_generator() -> None:
    first, same, other = (lora.init(CONFIG, 2, generator=generator(seed)) for seed in (0, 0, 1))
    pairs = [(a[name].A, b[name].A, c[name].A) for a, b, c in zip(first, same, other) for name in TARGETS]
    assert all(torch.equal(a, b) and not torch.equal(a, c) for a, b, c in pairs)
    assert not torch.equal(first[0]["q_proj"].A, first[1]["q_proj"].A)


def test_count_for_llama31_8b() -> None:
    """Rank 8 on all seven layers: 655,360 numbers in each of the 32 blocks, 20,971,520 together."""
    config = CONFIG._replace(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=1,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        rope_theta=5e5,
        rope_scaling=Llama3Scaling(8.0, 1.0, 4.0, 8192),
    )
    (layer,) = lora.init(config, 8, generator=generator())
    assert 32 * sum(A.numel() + B.numel() for A, B in layer.values()) == 20_971_520


@pytest.mark.parametrize("rank, targets", [(0, TARGETS), (4, ("q_proj", "lm_head")), (4, ())])
def test_init_refuses(rank: int, targets: tuple[str, ...]) -> None:
    with pytest.raises(InputError, match=r"rank of a LoRA|targets must be some of q_proj"):
        lora.init(CONFIG, rank, generator=generator(), targets=targets)


# --- PEFT -------------------------------------------------------------------------------------------------------------

VARIANTS = {
    "published": {"target_modules": list(TARGETS), "lora_alpha": 8},
    "other alpha": {"target_modules": list(TARGETS), "lora_alpha": 5},
    "subset": {"target_modules": ["v_proj", "down_proj"], "lora_alpha": 6},
    "one layer": {"target_modules": ["k_proj"], "lora_alpha": 6},
    "rslora": {"target_modules": ["q_proj", "o_proj", "gate_proj"], "lora_alpha": 3, "use_rslora": True},
    "ends of names": {"target_modules": ["self_attn.q_proj", "up_proj", "absent_proj"], "lora_alpha": 6},
    "pattern": {"target_modules": r".*\.(q_proj|up_proj)", "lora_alpha": 6},
    "all-linear": {"target_modules": "all-linear", "lora_alpha": 6},
}


@pytest.fixture(params=VARIANTS)
def peft_model(request: pytest.FixtureRequest) -> PeftModel:
    return trained(request.param)


def trained(variant: str) -> PeftModel:
    """A PEFT model whose B is random, as after training."""
    options = LoraConfig(r=4, task_type="CAUSAL_LM", **VARIANTS[variant])
    torch.manual_seed(0)  # PEFT draws A from torch's own generator
    wrapped = get_peft_model(reference_model(KIND), options)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.copy_(random_weight(tuple(parameter.shape), 0.2, generator(len(name))))
    return wrapped.eval()


@torch.no_grad()
def reference_logits(reference: Any) -> Tensor:
    return reference(TOKENS).logits


def reading_error(folder: Path, params: Params, expected: Tensor) -> float:
    """How far the logits with the adapter of a folder are from those of the model that wrote it."""
    return gap(logits(params, lora.load(folder, CONFIG)), expected)


def test_reads_what_peft_writes(peft_model: PeftModel, folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    peft_model.save_pretrained(tmp_path)
    _, params = load(folder_of(KIND))
    expected = reference_logits(peft_model)
    assert reading_error(tmp_path, params, expected) < TOLERANCE
    assert gap(logits(params), expected) > 100 * TOLERANCE


@pytest.mark.parametrize("end", ["self_attn.q_proj", "model.layers.{}.self_attn.q_proj"])
def test_reads_names_and_their_ends(end: str, tmp_path: Path) -> None:
    """PEFT writes them as they were given."""
    adapter = (random_lora(CONFIG, 4, seed=1, dtype=torch.float32, targets=("q_proj",)), 1.5)
    lora.save(tmp_path, adapter, base="base")
    change_json(tmp_path / "adapter_config.json", target_modules=[end.format(layer) for layer in range(3)])
    assert same(lora.load(tmp_path, CONFIG), adapter)


def test_reads_a_pattern_that_peft_has_not_resolved(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    """PEFT writes the list it resolved "all-linear" to; others write the words themselves."""
    adapter = (random_lora(CONFIG, 4, seed=1, dtype=torch.float32), 1.5)
    lora.save(tmp_path, adapter, base="base")
    change_json(tmp_path / "adapter_config.json", target_modules="all-linear")
    assert same(lora.load(tmp_path, CONFIG), adapter)


@pytest.mark.parametrize("targets, scale", [(TARGETS, 2.0), (TARGETS, 0.3), (("o_proj", "up_proj"), 1.5)])
def test_peft_reads_what_lfu_writes(
    targets: tuple[str, ...], scale: float, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    _, params = load(folder_of(KIND))
    adapter = (random_lora(CONFIG, 4, seed=1, dtype=torch.float32, targets=targets), scale)
    lora.save(tmp_path, adapter, base=str(folder_of(KIND)))
    reread = PeftModel.from_pretrained(reference_model(KIND), tmp_path).eval()
    assert gap(logits(params, adapter), reference_logits(reread)) < TOLERANCE
    assert gap(logits(params), reference_logits(reread)) > 100 * TOLERANCE
    assert same(lora.load(tmp_path, CONFIG), adapter)


def same(first: Adapter, second: Adapter) -> bool:
    """Bit-equal tensors, equal scales."""
    return math.isclose(first[1], second[1], rel_tol=1e-15) and all(
        set(a) == set(b) and all(torch.equal(x, y) for name in a for x, y in zip(a[name], b[name]))
        for a, b in zip(first[0], second[0], strict=True)
    )


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- what the comparison with PEFT would notice -----------------------------------------------------------------------


def exchanged(first: str, second: str) -> Callable[[Adapter], Adapter]:
    return lambda adapter: (
        [layer | {first: layer[second], second: layer[first]} for layer in adapter[0]],
        adapter[1],
    )


def transposed(adapter: Adapter) -> Adapter:
    return [layer | {"q_proj": LowRank(layer["q_proj"].B.T, layer["q_proj"].A.T)} for layer in adapter[0]], adapter[1]


MISREAD: dict[str, Callable[[Adapter], Adapter]] = {
    "blocks in reverse": lambda adapter: (adapter[0][::-1], adapter[1]),
    "gate and up exchanged": exchanged("gate_proj", "up_proj"),
    "k and v exchanged": exchanged("k_proj", "v_proj"),
    "A and B exchanged": transposed,
}


@pytest.mark.parametrize("name", MISREAD)
def test_notices(name: str) -> None:
    params = random_params(CONFIG, seed=0, dtype=torch.float32)
    adapter = (random_lora(CONFIG, 4, seed=1, dtype=torch.float32), 1.5)
    assert gap(logits(params, MISREAD[name](adapter)), logits(params, adapter)) > 100 * TOLERANCE


# --- merging ----------------------------------------------------------------------------------------------------------


def test_merge_as_peft(peft_model: PeftModel, folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    peft_model.save_pretrained(tmp_path)
    config, params = load(folder_of(KIND))
    merged = lora.merge(params, lora.load(tmp_path, config))
    reference = peft_model.merge_and_unload()
    for ours, theirs, before in zip(merged.layers, reference.model.layers, params.layers, strict=True):
        for name in TARGETS:
            part = theirs.self_attn if hasattr(theirs.self_attn, name) else theirs.mlp
            # Equal to the bit where measured; another order of the four products could move the last one.
            assert gap(getattr(ours, name), getattr(part, name).weight) < 1e-6
            touched = name in {key for layer in lora.load(tmp_path, config)[0] for key in layer}
            assert touched == (getattr(ours, name) is not getattr(before, name))
    assert gap(logits(merged), reference_logits(reference)) < TOLERANCE


def test_merge_leaves_biases_alone(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    """Read, applied and merged as by PEFT beside linear layers that have one."""
    options = LoraConfig(r=4, init_lora_weights=False, **VARIANTS["published"])
    wrapped = get_peft_model(reference_model("qwen2"), options).eval()
    wrapped.save_pretrained(tmp_path)
    config, params = load(folder_of("qwen2"))
    adapter = lora.load(tmp_path, config)
    merged = lora.merge(params, adapter)
    expected = reference_logits(wrapped)
    assert gap(forward(config, params, TOKENS, [adapter])[0], expected) < TOLERANCE
    assert gap(forward(config, merged, TOKENS)[0], expected) < TOLERANCE
    for name in ("q_proj_bias", "k_proj_bias", "v_proj_bias"):
        assert all(getattr(a, name) is getattr(b, name) for a, b in zip(merged.layers, params.layers, strict=True))


def merge_error() -> float:
    """How far the merged weights' logits are from the adapter's."""
    params, adapter = random_params(CONFIG, seed=0), (random_lora(CONFIG, 4, seed=1), 1.5)
    return gap(logits(lora.merge(params, adapter)), logits(params, adapter))


def test_merged_weights_act_as_the_adapter() -> None:
    assert merge_error() < EXACT


def misrounded() -> int:
    """How many merged bfloat16 weights are further from the exact sum than one rounding can take them.

    One rounding to 8 significant bits moves x ∈ [2ᵉ, 2ᵉ⁺¹) by 2ᵉ⁻⁸ at most; two would move some x further.
    """
    params = random_params(CONFIG, seed=0, dtype=torch.bfloat16)
    adapter = (random_lora(CONFIG, 4, seed=1, dtype=torch.float32), 1.5)
    count = 0
    for before, pairs, after in zip(params.layers, adapter[0], lora.merge(params, adapter).layers, strict=True):
        for name, (A, B) in pairs.items():
            W, change = getattr(before, name), 1.5 * B.double() @ A.double()
            exact, merged = W.double() + change, getattr(after, name)
            # The sum itself is taken in float32, 1e-7 apart from the exact one at most.
            half_a_unit = 2.0 ** (exact.abs().log2().floor() - 8) + 1e-7
            count += int(((merged.double() - exact).abs() > half_a_unit).sum())
    return count


def test_merge_rounds_once() -> None:
    assert misrounded() == 0


def test_merge_keeps_the_dtype() -> None:
    params = random_params(CONFIG, seed=0, dtype=torch.bfloat16)
    merged = lora.merge(params, (random_lora(CONFIG, 4, seed=1, dtype=torch.float32), 1.5))
    assert {getattr(layer, name).dtype for layer in merged.layers for name in TARGETS} == {torch.bfloat16}


# --- stacking ---------------------------------------------------------------------------------------------------------


Half = tuple[int, tuple[str, ...]]
"""Rank and targets of one of two adapters."""
HALVES: dict[str, tuple[Half, Half]] = {
    "same shape": ((4, TARGETS), (4, TARGETS)),
    "different ranks": ((3, TARGETS), (5, TARGETS)),
    "some on one side only": ((3, ("q_proj", "up_proj")), (2, ("up_proj", "down_proj"))),
    "all on one side only": ((2, ("v_proj",)), (2, ("o_proj",))),
}


def two_adapters(halves: str) -> list[Adapter]:
    """At different scales."""
    return [
        (random_lora(CONFIG, rank, seed=seed, targets=targets), scale)
        for (rank, targets), seed, scale in zip(HALVES[halves], (1, 2), (2.0, 0.7))
    ]


def stacking_error(halves: str) -> float:
    """How far the logits of the stack, in either order, are from those of the two one after the other."""
    params, adapters = random_params(CONFIG, seed=0), two_adapters(halves)
    stacks = lora.stack(*adapters), lora.stack(*reversed(adapters))
    return max(gap(logits(params, stack), logits(params, *adapters)) for stack in stacks)


@pytest.mark.parametrize("halves", HALVES)
def test_stacked_adapters_act_as_the_two(halves: str) -> None:
    params, adapters = random_params(CONFIG, seed=0), two_adapters(halves)
    assert stacking_error(halves) < EXACT
    assert min(gap(logits(params, adapter), logits(params, *adapters)) for adapter in adapters) > 0.1


def test_stacking_is_one_pair_of_products() -> None:
    adapters = [(random_lora(CONFIG, rank, seed=rank), 2.0) for rank in (3, 5)]
    layers, scale = lora.stack(*adapters)
    assert scale == 2.0
    assert {(A.shape[0], B.shape[1]) for layer in layers for A, B in layer.values()} == {(8, 8)}


def test_stacking_lets_gradients_through_to_both() -> None:
    """The method differentiates at the stack with respect to both parts."""
    params = random_params(CONFIG, seed=0)
    first, second = (random_lora(CONFIG, 2, seed=seed) for seed in (1, 2))

    def stacked(first: lora.Lora, second: lora.Lora) -> Tensor:
        return logits(params, lora.stack((first, 2.0), (second, 0.7))).square().sum()

    def separate(first: lora.Lora, second: lora.Lora) -> Tensor:
        return logits(params, (first, 2.0), (second, 0.7)).square().sum()

    gradients = [torch.func.grad(function, argnums=(0, 1))(first, second) for function in (stacked, separate)]
    ours, theirs = (
        [g for layers in pair for layer in layers for ab in layer.values() for g in ab] for pair in gradients
    )
    assert all(g.any() for g in ours)
    # 4.6e-15 measured, relative to the largest element.
    assert all(gap(a, b) < EXACT * b.abs().max().item() for a, b in zip(ours, theirs, strict=True))

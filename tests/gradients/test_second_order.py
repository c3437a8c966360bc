"""The second-order gradient is right, and is another gradient than the published one: by how much, is measured here.

Read next: `test_invariants.py`.
"""

from functools import cache
from pathlib import Path

import pytest
import torch
from compare import cosine, distance, flat
from gradients.cases import AUXILIARIES, EXACT, SETTINGS, by_oracle, case, fresh, randn, values
from gradients.finite import FINITE, slope_error
from gradients.second_order import second_order_gradient
from tiny import KINDS
from torch import Tensor
from torch.func import grad

from lfu import lora, steering
from lfu.data.batches import Batch, collate
from lfu.data.rows import read_rows
from lfu.data.tokens import Format, encode_row, load_tokenizer
from lfu.lora import Lora
from lfu.loss import answer_mask, consistency_loss
from lfu.model import Config, Params, load
from lfu.train import ascend, lfu_gradient

MINI = Path(__file__).parents[2] / "weights" / "mini"


def of_case(kind: str, auxiliary: str) -> Lora:
    config, base, task, _ = case(kind)
    return second_order_gradient(config, base, task, fresh(config, auxiliary), case(kind).batch, **SETTINGS)


@pytest.mark.parametrize("auxiliary", AUXILIARIES)
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_oracles_gradient_through_the_ascent(kind: str, auxiliary: str) -> None:
    expected = by_oracle(kind, auxiliary, wrong="gradient through the ascent")
    # Measured: 1.2e-13.
    assert distance(of_case(kind, auxiliary), expected.gradient) < EXACT


@pytest.mark.parametrize("auxiliary", AUXILIARIES)
def test_it_is_the_slope_of_a_loss_that_ascends_anew_wherever_it_is_asked(auxiliary: str) -> None:
    h, mask = values(case(), case().task, None)[1], answer_mask(case().batch.labels)
    aux = fresh(case().config, auxiliary)

    def loss(task: Lora) -> Tensor:
        sft, direction = values(case(), task, None)[0], grad(lambda aux: values(case(), task, aux)[0])(aux)
        perturbed = values(case(), task, ascend(aux, direction, SETTINGS["alpha"]))[1]
        return sft + SETTINGS["lam"] * consistency_loss(h, perturbed, mask)

    # Measured: 7e-13.
    assert slope_error(loss, case().task, of_case("llama31", auxiliary)) < FINITE


# --- how far it is from the published gradient ----------------------------------------------------

Problem = tuple[Config, Params, Lora, Batch]

MEASURED = {
    # (problem, auxiliary, α): cosine, norm ratio, relative distance of the second-order consistency gradient
    ("miniature", "lora", 0.1): (0.98995, 0.9087, 0.1631),
    ("miniature", "steering", 0.1): (0.99997, 0.9988, 0.00808),
    ("tiny", "lora", 0.1): (0.92749, 0.9623, 0.3755),
    ("tiny", "steering", 0.1): (0.99826, 1.0954, 0.1136),
    # With a shorter step the two come together, in proportion to α.
    ("tiny", "lora", 0.001): (0.99999, 0.9987, 0.003862),
    ("tiny", "steering", 0.001): (1.00000, 1.0009, 0.001121),
}
"""At the published α, 0.1 for both, and at a hundredth of it. "miniature": a pretrained model and its training rows."""


@pytest.mark.parametrize(("problem", "auxiliary", "alpha"), MEASURED)
def test_the_published_gradient_is_another_one(problem: str, auxiliary: str, alpha: float) -> None:
    first, second = both_orders(miniature() if problem == "miniature" else tiny(), auxiliary, alpha)
    expected = MEASURED[problem, auxiliary, alpha]
    assert cosine(first, second) == pytest.approx(expected[0], abs=0.01)
    assert float(second.norm() / first.norm()) == pytest.approx(expected[1], abs=0.02)
    assert distance(second, first) == pytest.approx(expected[2], rel=0.1)


def both_orders(problem: Problem, auxiliary: str, alpha: float) -> tuple[Tensor, Tensor]:
    """The consistency gradients, flat: first order as published, and with θ_aux following θ."""
    config, base, task, batch = problem
    rank, generator = len(task[0]["q_proj"].A), torch.Generator().manual_seed(11)
    aux = steering.zeros(config, dtype=torch.float64)
    if auxiliary == "lora":
        aux = lora.init(config, rank, generator=generator, dtype=torch.float64)
    settings = {"scale": 2.0, "alpha": alpha}
    (sft, _), (first, _) = (lfu_gradient(config, base, task, aux, batch, **settings, lam=lam) for lam in (0.0, 1.0))
    second = second_order_gradient(config, base, task, aux, batch, **settings, lam=1.0)
    return flat(first) - flat(sft), flat(second) - flat(sft)


def tiny() -> Problem:
    config, base, task, _ = case()
    return config, base, task, case().batch


@cache
def miniature() -> Problem:
    """The pretrained miniature in float64, four rows of its training data, and a task LoRA on its way."""
    config, base = load(MINI, dtype=torch.float64)
    tokenizer, generator = load_tokenizer(MINI, config.vocab_size), torch.Generator().manual_seed(0)
    rows = read_rows(MINI / "math" / "train.jsonl")[:4]
    fresh_task = lora.init(config, 8, generator=generator, dtype=torch.float64)
    task = [
        {name: pair._replace(B=randn(pair.B, generator, 0.02)) for name, pair in layer.items()} for layer in fresh_task
    ]
    return config, base, task, collate([encode_row(tokenizer, Format("question"), row) for row in rows])

"""The methods LfU is compared with: each gradient against its formula written out by hand, and what is exact about it.

`by_hand` is the oracle: any loss, from the states and logits of the plain decoder, row by row, differentiated by
`torch.autograd`. Nothing in it comes from lfu.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import distance, flat, gap, relative
from gradients import oracle
from gradients.cases import EXACT, Case, case, fresh, part
from gradients.decoders import plain
from tiny import needs
from torch import Tensor
from torch.utils._pytree import tree_map

from lfu.baselines import regularisers as baselines
from lfu.baselines.averages import ema, ensemble
from lfu.baselines.regularisers import feature_penalty, gem_loss, lengths, logit_divergence, uniform_noise
from lfu.data.batches import IGNORED, Batch, Example, collate
from lfu.lora import LowRank, merge
from lfu.loss import answer_mask
from lfu.methods import METHODS, Spec, bind
from lfu.model import forward
from lfu.train import lfu_gradient, sft_gradient

SCALE = 2.0
ROUNDED = 1e-6
"""Relative error of float32 numbers computed in another order. Measured: 5e-8."""
BASELINES = [name for name in METHODS if not name.startswith(("sft", "lfu", "released"))]
Terms = list[tuple[list[Tensor], Tensor, Tensor]]
"""For each answer token: the states after each block [D], the logits [V] that predict it, and its id."""


def gradient(name: str, given: Case, **changed: Any) -> Tensor:
    """A bound method's gradient, flat."""
    batch = changed.pop("batch", given.batch)
    method = bind(name, given.config, scale=SCALE, **needs(name, given.config), **changed)[0]
    return flat(method(given.config, given.base, given.task, batch, torch.Generator().manual_seed(5))[0])


def terms(given: Case, task: Any) -> Terms:
    """What the plain decoder computes at every position that predicts an answer token."""
    collected = []
    for tokens, prompt in given.rows:
        adapters = [] if task is None else [(task, SCALE)]
        stream, logits = plain(given.config, given.base)(tokens, adapters, None)
        for t in oracle.predicting((tokens, prompt)):
            collected.append(([h[t] for h in stream[1:]], logits[t], torch.tensor(tokens[t + 1])))
    return collected


def by_hand(given: Case, loss: Callable[[Terms], Tensor]) -> Tensor:
    """The gradient of a loss with respect to the task LoRA, flat."""
    task = oracle.requiring_gradients(given.task)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss(terms(given, task)), oracle.leaves(task))])


def cross_entropy(answers: Terms, beta: float = 1.0) -> Tensor:
    return sum(((z / beta).exp().sum().log() - z[y] / beta) for _, z, y in answers) / len(answers)


# --- all of them ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BASELINES)
def test_the_sft_loss_is_reported_whatever_is_minimised(name: str) -> None:
    given = case()
    still = {"alpha": 0.0} if name == "neftune" else {}
    method = bind(name, given.config, scale=SCALE, **needs(name, given.config), **still)[0]
    _, metrics = method(given.config, given.base, given.task, given.batch, torch.Generator())
    assert float(metrics["sft"]) == pytest.approx(float(cross_entropy(terms(given, given.task))), rel=EXACT)


@pytest.mark.parametrize("name", BASELINES)
def test_padding_changes_nothing(name: str) -> None:
    given = case()
    tokens, labels = given.batch
    longer = Batch(F.pad(tokens, (0, 8), value=3), F.pad(labels, (0, 8), value=IGNORED))
    assert distance(gradient(name, given, batch=longer), gradient(name, given)) < EXACT


@pytest.mark.parametrize("name", BASELINES)
def test_remat_changes_no_bit(name: str) -> None:
    assert torch.equal(gradient(name, case(), remat=True), gradient(name, case()))


@pytest.mark.parametrize(
    ("name", "off"),
    [
        ("neftune", {"alpha": 0.0}),
        ("sam", {"alpha": 0.0}),
        ("l1", {"lam": 0.0}),
        ("l2", {"lam": 0.0}),
        ("logit-consistency", {"lam": 0.0}),
        ("logit-consistency", {"alpha": 0.0, "lam": 7.0}),
    ],
)
def test_switched_off_it_is_sft(name: str, off: dict[str, float]) -> None:
    sft = part("sft", case(), "lora")
    still = gradient(name, case(), **off)
    assert torch.equal(still, sft) if name in ("neftune", "sam") else distance(still, sft) < EXACT
    assert distance(gradient(name, case()), sft) > 1e-4


def test_a_method_of_ones_own_is_two_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    def halved(config: Any, base: Any, task: Any, batch: Any, generator: Any, *, beta: float, **how: Any) -> Any:
        gradient, metrics = sft_gradient(config, base, task, batch, **how)
        return [{name: LowRank(beta * A, beta * B) for name, (A, B) in layer.items()} for layer in gradient], metrics

    monkeypatch.setitem(METHODS, "halved", Spec(halved, {"beta": 0.5}))
    assert torch.equal(gradient("halved", case()), 0.5 * part("sft", case(), "lora"))
    assert torch.equal(gradient("halved", case(), beta=2.0), 2.0 * part("sft", case(), "lora"))


def test_the_defaults_are_the_published_ones() -> None:
    """Of NEFTune and GEM by their authors' scripts, of Anchored Learning by its authors' documentation, of the others
    by the paper's Table 6."""
    config = case().config
    assert {name: bind(name, config, scale=SCALE, **needs(name, config))[1] for name in BASELINES} == {
        "neftune": {"alpha": 5.0},
        "gem-linear": {"beta": 0.7},
        "gem-logsigmoid": {"beta": 0.7},
        "sam": {"alpha": 0.01},
        "l1": {"lam": 0.01, "norm": "mean"},
        "l2": {"lam": 0.01, "norm": "mean"},
        "logit-consistency": {"alpha": 0.1, "lam": 1.0},
        "anchored": {"anchor_alpha": 0.5, "space": "logits", "stages": 5},
    }


# --- NEFTune --------------------------------------------------------------------------------------


def noise(seed: int = 0, alpha: float = 5.0, extra: int = 0, width: int = 64) -> Tensor:
    batch = Batch(torch.zeros(3, 40 + extra, dtype=torch.int64), F.pad(NOISY, (0, extra), value=IGNORED))
    return uniform_noise(batch, width, alpha, torch.Generator().manual_seed(seed))


NOISY = torch.full((3, 40), IGNORED)
for row, length in enumerate((40, 25, 10)):
    NOISY[row, length - 5 : length] = 1


def test_noise_is_bounded_by_each_rows_own_length() -> None:
    assert lengths(NOISY).tolist() == [40, 25, 10]
    squares = torch.zeros(3)
    for seed in range(50):
        for row, length in enumerate((40, 25, 10)):
            block = noise(seed)[row]
            assert not block[length:].any()
            assert block.abs().max() <= 5 / math.sqrt(length * 64)
            assert block.norm() <= 5
            squares[row] += block.square().sum() / 50
    # The mean of ‖noise‖² is alpha²/3; its standard error here is at most 0.5 % of it.
    assert squares.tolist() == pytest.approx([25 / 3] * 3, rel=0.02)


def noise_error() -> float:
    """Relative distance from U(-1, 1), drawn in the same order, times alpha/√(L·D), row by row."""
    generator, expected = torch.Generator().manual_seed(0), torch.zeros(3, 40, 64)
    for row, length in enumerate((40, 25, 10)):
        drawn = 2 * torch.rand(length, 64, generator=generator) - 1
        expected[row, :length] = drawn * 5 / math.sqrt(length * 64)
    return distance(noise(0), expected)


def test_noise_is_as_strong_as_the_formula() -> None:
    assert noise_error() < ROUNDED


def test_noise_does_not_depend_on_padding_and_is_drawn_anew() -> None:
    assert torch.equal(noise(extra=8)[:, :40], noise())
    assert not torch.equal(noise(1), noise(0))


def neftune_error() -> float:
    """Each token of these rows occurs once, so noise at a position is noise in the table of an untied model."""
    given = case("llama2")
    tokens = torch.randperm(given.config.vocab_size, generator=torch.Generator().manual_seed(2)).tolist()
    batch = collate([Example(tokens[:9], 4, 1), Example(tokens[9:21], 7, 2)])
    drawn = uniform_noise(batch, given.config.hidden_size, 5.0, torch.Generator().manual_seed(5)).double()
    table = given.base.embed.clone()
    for row, length in enumerate((9, 12)):
        table[batch.tokens[row, :length]] += drawn[row, :length]
    expected, _ = sft_gradient(given.config, given.base._replace(embed=table), given.task, batch, scale=SCALE)
    return distance(gradient("neftune", given, batch=batch), flat(expected))


def test_neftune_is_sft_on_a_model_whose_embeddings_are_noisy() -> None:
    assert neftune_error() < EXACT


# --- GEM ------------------------------------------------------------------------------------------


def logits(seed: int = 0, rows: int = 6) -> Tensor:
    return 3 * torch.randn(rows, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


LABELS = torch.tensor([3, 0, 10, 7, 7, 1])


def gem_and_gradient(z: Tensor, beta: float, weight: str) -> tuple[Tensor, Tensor]:
    z = z.clone().requires_grad_()
    value = gem_loss(z, LABELS, beta=beta, weight=weight)
    return value.detach(), torch.autograd.grad(value, z)[0]


def q_of(z: Tensor, beta: float, weight: str) -> Tensor:
    q = torch.exp(z / beta) / torch.exp(z / beta).sum(-1, keepdim=True)
    gaps = z - z[range(6), LABELS][:, None]
    return q / (1 + torch.exp(-0.01 * gaps)) if weight == "logsigmoid" else q


def gem_error(beta: float, weight: str) -> float:
    """The larger relative distance of value and gradient from the formula, term by term."""
    z, one = logits(), F.one_hot(LABELS, 11)
    value, slope = gem_and_gradient(z, beta, weight)
    q = q_of(z, beta, weight)
    terms = [q[i, j] * (z[i, j] - z[i, LABELS[i]]) for i in range(6) for j in range(11)]
    return max(relative(float(value), float(sum(terms)) / 6), distance(slope, (q - one * q.sum(-1, keepdim=True)) / 6))


@pytest.mark.parametrize("weight", ["linear", "logsigmoid"])
@pytest.mark.parametrize("beta", [0.3, 0.7, 1.0])
def test_gems_value_and_gradient_are_those_of_its_formula(beta: float, weight: str) -> None:
    assert gem_error(beta, weight) < EXACT
    z = logits()
    value, slope = gem_and_gradient(z, beta, weight)
    assert slope.sum(-1).abs().max() < EXACT
    shifted = gem_and_gradient(z + 5.0, beta, weight)
    assert gap(shifted[0], value) < EXACT and gap(shifted[1], slope) < EXACT


def test_linear_gem_at_temperature_one_is_cross_entropy_less_entropy() -> None:
    z = logits()
    value, slope = gem_and_gradient(z, 1.0, "linear")
    p = z.softmax(-1)
    entropy = -(p * p.log()).sum(-1).mean()
    assert float(value) == pytest.approx(float(F.cross_entropy(z, LABELS) - entropy), rel=EXACT)
    leaf = z.clone().requires_grad_()
    assert gap(slope, torch.autograd.grad(F.cross_entropy(leaf, LABELS), leaf)[0]) < EXACT


def test_gems_value_is_not_what_it_descends_and_not_positive_where_the_answer_leads() -> None:
    z, step = logits(), 1e-6
    ahead = z.clone()
    ahead[range(6), LABELS] = z.amax(-1) + 1
    assert all(gem_and_gradient(ahead, 0.7, weight)[0] < 0 for weight in ("linear", "logsigmoid"))
    direction = torch.randn(z.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ends = [gem_and_gradient(z + sign * step * direction, 0.7, "linear")[0] for sign in (1, -1)]
    rise, claimed = (ends[0] - ends[1]) / (2 * step), (gem_and_gradient(z, 0.7, "linear")[1] * direction).sum()
    assert abs(rise - claimed) > 0.05 * abs(claimed)


def test_linear_gem_is_cross_entropy_of_cooler_logits() -> None:
    expected = 0.7 * by_hand(case(), partial(cross_entropy, beta=0.7))
    assert distance(gradient("gem-linear", case()), expected) < EXACT
    half = gradient("gem-logsigmoid", case()).norm() / gradient("gem-linear", case()).norm()
    assert 0.45 < half < 0.55


# --- SAM ------------------------------------------------------------------------------------------


def sam_error() -> float:
    """Relative distance from the gradient at the point that was climbed to by hand."""
    given = case()
    task = oracle.requiring_gradients(given.task)
    g = torch.autograd.grad(cross_entropy(terms(given, task)), oracle.leaves(task))
    length = torch.cat([leaf.flatten() for leaf in g]).norm()
    raised = [leaf.detach() + 0.5 * each / length for leaf, each in zip(oracle.leaves(task), g)]
    there = given._replace(task=oracle.rebuilt(given.task, raised))
    return distance(gradient("sam", given, alpha=0.5), by_hand(there, cross_entropy))


def test_sam_takes_the_gradient_where_the_loss_was_raised() -> None:
    before = flat(case().task).clone()
    assert sam_error() < EXACT
    assert torch.equal(flat(case().task), before)


@pytest.mark.parametrize("start", [1.0, 0.0])
def test_sam_on_a_quadratic(start: float, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(3)
    H, A, B = (torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in ((12, 12), (2, 3), (3, 2)))
    H, task = H @ H.T, [{"q_proj": LowRank(start * A, start * B)}]

    seen = []

    def quadratic(config: Any, base: Any, task: Any, batch: Any) -> Any:
        seen.append(flat(task))
        g = H @ flat(task)
        return [{"q_proj": LowRank(g[:6].view(2, 3), g[6:].view(3, 2))}], {"sft": 0.5 * flat(task) @ g}

    monkeypatch.setattr(baselines, "sft_gradient", quadratic)
    found, metrics = baselines.sam(None, None, task, None, None, alpha=0.1)
    t = flat(task)
    expected = H @ (t + 0.1 * H @ t / (H @ t).norm()) if start else torch.zeros(12, dtype=torch.float64)
    assert gap(flat(found), expected) < EXACT
    assert float(metrics["ascent_norm"]) == pytest.approx(float((H @ t).norm()))
    there, moved = seen
    assert torch.equal(there, t)
    assert float((moved - there).norm()) == pytest.approx(0.1 if start else 0.0)


# --- penalties ------------------------------------------------------------------------------------


def penalty_error(name: str, norm: str) -> float:
    """Relative distance of the whole gradient from a loop over positions and blocks."""
    given, order = case(), {"l1": 1, "l2": 2}[name]

    def loss(answers: Terms) -> Tensor:
        sizes = [(h.abs() ** order).sum() ** (1 / order) for states, _, _ in answers for h in states]
        width, rows = given.config.hidden_size, len(given.rows)
        penalty = sum(sizes) / rows if norm == "sum" else sum(sizes) / len(sizes) / width ** (1 / order)
        return cross_entropy(answers) + 0.3 * penalty

    return distance(gradient(name, given, lam=0.3, norm=norm), by_hand(given, loss))


@pytest.mark.parametrize("norm", ["mean", "sum"])
@pytest.mark.parametrize("name", ["l1", "l2"])
def test_penalties_are_those_of_table_6(name: str, norm: str) -> None:
    assert penalty_error(name, norm) < EXACT


@pytest.mark.parametrize("order", [1, 2])
def test_penalties_are_of_degree_one_and_zero_for_nothing(order: int) -> None:
    states = [torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(seed)).double() for seed in range(3)]
    mask = torch.tensor([[True, False, True, True], [False, True, False, False]])
    for norm in ("mean", "sum"):
        penalty = partial(feature_penalty, mask=mask, order=order, norm=norm)
        assert float(penalty([3.0 * h for h in states])) == pytest.approx(3 * float(penalty(states)), rel=EXACT)
        assert float(penalty([0.0 * h for h in states])) == 0.0


# --- consistency of the logits --------------------------------------------------------------------


def logit_consistency_error() -> float:
    """The larger relative distance of gradient and metric from Eq. 7 by hand."""
    given, lam, alpha = case(), 3.0, 0.1
    task = oracle.requiring_gradients(given.task)
    aux = fresh(given.config, "lora")
    settings = {"scale": SCALE, "alpha": alpha, "lam": lam}
    compare = partial(logit_divergence, given.config, given.base)
    found, metrics = lfu_gradient(given.config, given.base, given.task, aux, given.batch, compare=compare, **settings)
    moving = oracle.requiring_gradients(aux)
    decoder = plain(given.config, given.base)
    loss = oracle.sft_loss(decoder, given.rows, given.task, moving, SCALE, "")
    moved = oracle.ascended(aux, torch.autograd.grad(loss, oracle.leaves(moving)), alpha, "")
    divergences = []
    for row in given.rows:
        clean, perturbed = (
            decoder(row[0], [(task, SCALE)], None)[1],
            decoder(row[0], [(task, SCALE), (moved, SCALE)], None)[1],
        )
        for t in oracle.predicting(row):
            p, q = clean[t].detach().softmax(-1), perturbed[t].softmax(-1)
            divergences.append((p * (p / q).log()).sum())
    divergence = sum(divergences) / len(divergences)
    g = torch.autograd.grad(divergence, oracle.leaves(task))
    expected = by_hand(given, cross_entropy) + lam * torch.cat([leaf.flatten() for leaf in g])
    metric = relative(float(metrics["consistency"]), float(divergence.detach()))
    return max(distance(flat(found), expected), metric)


def test_logit_consistency_is_eq_7() -> None:
    assert logit_consistency_error() < EXACT


def test_logits_that_were_not_moved_are_consistent() -> None:
    given = case()
    method = bind("logit-consistency", given.config, scale=SCALE, alpha=0.0)[0]
    _, metrics = method(given.config, given.base, given.task, given.batch, torch.Generator().manual_seed(5))
    assert float(metrics["consistency"]) == 0.0


# --- averages -------------------------------------------------------------------------------------


def ensemble_error(beta: float) -> float:
    """Relative distance of merged weights from the average of the base model's and the tuned model's."""
    given = case()
    tuned = merge(given.base, (given.task, SCALE))
    expected = [
        beta * base.down_proj + (1 - beta) * layer.down_proj for base, layer in zip(given.base.layers, tuned.layers)
    ]
    averaged = merge(given.base, ensemble((given.task, SCALE), beta))
    return distance([layer.down_proj for layer in averaged.layers], expected)


@pytest.mark.parametrize("beta", [0.0, 0.25, 1.0])
def test_an_ensemble_is_an_average_of_weights(beta: float) -> None:
    assert ensemble_error(beta) < EXACT


def test_an_ensemble_of_the_base_alone_is_the_base() -> None:
    given = case()
    vanilla, averaged = (
        forward(given.config, given.base, given.batch.tokens, adapters)[0]
        for adapters in ([], [ensemble((given.task, SCALE), 1.0)])
    )
    assert torch.equal(averaged, vanilla)


def ema_error() -> float:
    """Relative distance of five steps from zero to a constant from 1 - 0.9⁵ of it."""
    task, average = case().task, tree_map(torch.zeros_like, case().task)
    for _ in range(5):
        average = ema(average, task, 0.9)
    return distance(average, (1 - 0.9**5) * flat(task))


def test_ema_of_a_constant_is_the_constant_and_forgets_at_its_rate() -> None:
    task = case().task
    assert distance(ema(task, task, 0.9), task) < EXACT
    assert torch.equal(flat(ema(tree_map(torch.zeros_like, task), task, 0.0)), flat(task))
    assert ema_error() < EXACT


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("gem-linear", {"beta": 0.0}, "beta is a temperature"),
        ("gem-linear", {"alpha": 0.1}, "gem-linear has no alpha"),
        ("l2", {"norm": "relative"}, "mean or sum"),
        ("l1", {"layers": [1]}, "l1 has no layers"),
        ("neftune", {"alpha": -1.0}, "alpha must be at least 0"),
        ("sft", {"beta": 0.1}, "sft has no beta"),
    ],
)
def test_what_a_method_cannot_use_is_refused(name: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gradient(name, case(), **given)


def test_a_penalty_reads_no_states_but_the_masked_ones() -> None:
    given = case()
    hidden = forward(given.config, given.base, given.batch.tokens)[1]
    mask = answer_mask(given.batch.labels)
    whole = feature_penalty(hidden, mask, order=2, norm="sum")
    elsewhere = [torch.where(mask[..., None], h, 7.0) for h in hidden]
    assert torch.equal(feature_penalty(elsewhere, mask, order=2, norm="sum"), whole)

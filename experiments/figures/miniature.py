"""The paper in miniature: what is learned and kept, the differences from SFT, the attack, λ and α.

Every run is in `docs/miniature.json`; `experiments/miniature/plan.py` says which runs belong together.
"""

from collections.abc import Iterable, Sequence
from functools import cache
from statistics import mean
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.figures.style import METHODS, band, card, label, note, stored, style_of
from experiments.miniature import plan, report, tables
from experiments.miniature.mini import SPLITS, Spec
from experiments.palette import BASELINE, INK, PAPER, SFT
from experiments.seeds import bounds

LFU = {
    "LfU (LoRA)": ("lambda", 5.0, (0, 36), (-16, -30)),
    "LfU (RepS)": ("RepS, lambda", 0.1, (-16, -18), (-80, -56)),
}
"""Row -> the sweep that has the published λ, this λ, and where the labels stand: of the chosen and of this λ."""
NEAR = 2.5
"""Percentage points within which a baseline shares SFT's place in the first figure."""
PLACES = {
    "Anchored": (6, 12),
    "Distillation": (-6, -8),
    "logits": (-6, 2),
    "SDFT": (-6, 3),
    "GEM": (-6, -4),
    "IM": (-4, -10),
}
"""Labels that do not stand to the right of their points."""
EDGE = 22
"""Percentage points at which a difference leaves its panel."""


class Runs(NamedTuple):
    """All that were stored, and the settings that were chosen."""

    look_up: plan.LookUp
    choices: plan.Choices


@cache
def runs() -> Runs:
    found = stored("miniature")
    return Runs(report.look_up_in(found), plan.choices_from(found["choices"]))


def scores(specs: Iterable[Spec], name: str) -> list[float]:
    """In percent, by seed."""
    return [100 * score for score in tables.column(runs().look_up, specs, name)]


class Measured(NamedTuple):
    """A mean over seeds, and half of its 95 % interval."""

    value: float
    reach: float


def measured(values: Sequence[float]) -> Measured:
    value, *ends = bounds(values)
    return Measured(value, ends[-1] - value)


# --- kept against learned -------------------------------------------------------------------------


class Spot(NamedTuple):
    """Where some runs lie."""

    learned: Measured
    kept: Measured

    @property
    def center(self) -> tuple[float, float]:
        return self.learned.value, self.kept.value


def spot(specs: Sequence[Spec]) -> Spot:
    return Spot(measured(scores(specs, plan.TASK)), measured(scores(specs, "kept")))


def kept_against_learned() -> Figure:
    """SFT's curve over its learning rates, and where the other methods lie."""
    figure, panel = card("LfU is a brake: it pays where SFT's steps are too large", 5.2)
    curve = {rate: spot(specs) for rate, specs in zip(plan.SFT_RATES, plan.sft_rates(runs().choices).values())}
    panel.set_xlim(0, 56)
    draw_spots(panel, "SFT", list(curve.values()))
    for rate, at in curve.items():
        first = rate == min(curve)
        text, place = ("SFT at a learning rate of " * first) + f"{rate:g}", (6, 8) if rate < 5e-3 else (-6, -8)
        label(panel, text, at.center, place, color=SFT, fontweight="bold" if first else None)
    draw_gain(panel, curve[max(plan.TWO_RATES)], draw_lfu(panel))
    draw_baselines(panel, curve[runs().choices["SFT"][1]])
    draw_bare_model(panel)
    panel.set_xlabel("learned: two-step problems solved, %")
    panel.set_ylabel("kept: mean of the four other scores, %")
    panel.set_title("miniature model, test scores; 95 % intervals; ten seeds, three where hollow")
    return figure


def draw_spots(panel: Axes, method: str, spots: Sequence[Spot], **how: Any) -> None:
    """A line through them, with their intervals."""
    (x, x_reach), (y, y_reach) = (zip(*each) for each in zip(*spots))
    panel.errorbar(x, y, y_reach, x_reach, **style_of(method) | {"elinewidth": 0.8, "zorder": 3} | how)


def draw_lfu(panel: Axes) -> Spot:
    """LfU at the chosen λ and both learning rates, and at the published λ. Returns LfU (LoRA)'s at the faster rate."""
    choices, fast = runs().choices, {}
    for row, (sweep, published, place, place_hollow) in LFU.items():
        color, lam = METHODS[row]["color"], dict(choices[row][2])["lam"]
        chosen = spot([tables.main_spec(choices, "math", row, seed) for seed in plan.ALL_SEEDS])
        fast[row] = spot(plan.faster(choices)[f"{row} at {max(plan.TWO_RATES):g}"])
        hollow = spot(plan.sweeps(choices)[sweep][published])
        draw_spots(panel, row, [chosen, fast[row]])
        draw_spots(panel, row, [hollow], markerfacecolor=PAPER, linestyle="")
        text = f"{row}, λ {lam:g},\nat {choices[row][1]:g} and {max(plan.TWO_RATES):g}"
        label(panel, text, fast[row].center, place, color=color, fontweight="bold")
        label(panel, f"{row}, published λ {published:g}", hollow.center, place_hollow, leader=True, color=color)
    return fast["LfU (LoRA)"]


def draw_gain(panel: Axes, slow: Spot, ours: Spot) -> None:
    """What LfU keeps at the rate at which SFT forgets most."""
    how = {"arrowstyle": "->", "color": INK, "shrinkA": 8, "shrinkB": 8}
    panel.annotate("", ours.center, slow.center, arrowprops=how)
    gain = ours.kept.value - slow.kept.value
    label(panel, f"{gain:+.1f} kept\nat {max(plan.TWO_RATES):g}", slow.center, (10, 18))


def draw_baselines(panel: Axes, sft: Spot) -> None:
    """All other methods, in grey; those that are where SFT is share a label."""
    rows = [row for row in runs().choices if "LfU" not in row and row != "SFT"]
    near = []
    for row in rows:
        seeds = plan.ALL_SEEDS if row in plan.TRIALS else plan.FEW_SEEDS
        at = spot([tables.chosen_spec(runs().choices, row, seed) for seed in seeds])
        fill = BASELINE if row in plan.TRIALS else PAPER
        panel.plot(*at.center, color=BASELINE, marker="D", markersize=4.5, zorder=2, linestyle="", markerfacecolor=fill)
        if max(abs(a - b) for a, b in zip(at.center, sft.center)) < NEAR:
            near.append(row)
        else:
            label(panel, row, at.center, PLACES.get(row, (6, -3)), color=BASELINE, fontsize=9)
    label(panel, f"as SFT: {', '.join(near)}", sft.center, (-30, -92), leader=True, color=BASELINE, fontsize=9)


def draw_bare_model(panel: Axes) -> None:
    """What there is to keep."""
    specs = [plan.base(measures=plan.figures_5_6(0))]
    (learned,), (kept,) = scores(specs, plan.TASK), scores(specs, "kept")
    panel.axhline(kept, color=BASELINE, linewidth=1, linestyle=":", zorder=0)
    text = f"the bare model keeps {kept:.1f} % and solves {learned:.0f} %"
    label(panel, text, (panel.get_xlim()[1], kept), (-2, -8), color=BASELINE, fontsize=9)


# --- differences from SFT -------------------------------------------------------------------------


def differences() -> Figure:
    """A forest plot: every score of every method less SFT's, for both fine-tuning sets."""
    rows = sorted((row for row in plan.TRIALS if row != "SFT"), key=METHODS.__contains__)  # LfU on top
    finding = "LfU (LoRA) keeps a little more than SFT; LfU (RepS) trades task for keeping"
    figure, panels = card(finding, 5.6, 2, len(SPLITS), sharey=True)
    for across, data in zip(panels, plan.DATAS):
        for panel, score in zip(across, SPLITS):
            panel.axvline(0, color=SFT, linewidth=1.2, zorder=0)
            for place, row in enumerate(rows):
                draw_difference(panel, place, row, less_sft(data, row, score))
            panel.set_title(score)
            panel.set_xlim(-EDGE, EDGE)
            panel.set_xticks((-20, -10, 0, 10, 20), ("−20", "", "0", "", "+20"))
        across[0].set_yticks(range(len(rows)), rows)
        across[0].set_ylabel(f"tuned on {data}", fontweight="bold")
    note(figure, "difference from SFT in percentage points: mean and 95 % interval of ten seeds")
    return figure


def less_sft(data: str, row: str, score: str) -> Measured:
    ours, theirs = (
        scores([tables.main_spec(runs().choices, data, each, seed) for seed in plan.ALL_SEEDS], score)
        for each in (row, "SFT")
    )
    return measured([a - b for a, b in zip(ours, theirs)])


def draw_difference(panel: Axes, place: int, row: str, m: Measured) -> None:
    """One interval; an arrow and the number where it lies outside."""
    if abs(m.value) > EDGE:
        side = EDGE if m.value > 0 else -EDGE
        panel.plot(0.92 * side, place, marker=">" if side > 0 else "<", color=BASELINE)
        label(panel, f"{m.value:+.0f}".replace("-", "−"), (0.92 * side, place), (-6, 0) if side > 0 else (6, 0))
    else:
        panel.errorbar(m.value, place, xerr=m.reach, linestyle="", **style_of(row) | {"markersize": 5})


# --- the attack -----------------------------------------------------------------------------------

AT = {"NEFTune": 9, "Distillation": 8, "GEM": 5, "IM": 8, "LfU (LoRA)": 20, "LfU (RepS)": 20}
"""Steps at which curves have their labels; the others where half of the prompts are not refused, or at the last."""
DASHES: dict[str, Any] = {
    "NEFTune": "--",
    "GEM": "-.",
    "IM": (0, (6, 1, 1, 1, 1, 1)),
    "SDFT": (0, (9, 3)),
    "Anchored": "-",
    "Distillation": (0, (2, 2)),
}
"""By which the baselines' grey curves are told apart."""


def attack() -> Figure:
    """Success by steps of harmful fine-tuning; the seeds' range where there is room for it."""
    figure, panel = card("LfU holds out longer than SFT; SFT with smaller steps holds out longest", 4.8)
    gentle = dict(zip((f"SFT at {rate:g}" for rate in plan.GENTLER_RATES), (":", "--")))
    for row, specs in plan.attacks(runs().choices).items():
        by_seed = [[100 * share for share in runs().look_up(spec)["attack"]["success"]] for spec in specs]
        by_step = list(zip(*by_seed))
        means, steps = list(map(mean, by_step)), range(len(by_step))
        if row in (*METHODS, *gentle):
            style = {"color": SFT, "linestyle": gentle[row]} if row in gentle else style_of(row)
            panel.plot(steps, means, **style | {"markersize": 4})
            band(panel, steps, map(min, by_step), map(max, by_step), style["color"])
        else:
            panel.plot(steps, means, color=BASELINE, linewidth=1.4, linestyle=DASHES[row])
        at = AT.get(row, next((step for step in steps if means[step] > 50), steps[-1]))
        label(
            panel,
            row,
            (at, means[at]),
            (6, 0) if at == steps[-1] or row == "Anchored" else (-6, 4),
            color=panel.lines[-1].get_color(),
        )
    panel.set_xticks(range(0, 21, 5))
    panel.set_xlabel("steps of harmful fine-tuning")
    panel.set_ylabel("harmful prompts not refused, %")
    panel.set_title("miniature model, aligned at a learning rate of 0.003; mean and range of three seeds")
    return figure


# --- λ and α --------------------------------------------------------------------------------------


def sweeps() -> Figure:
    """What is learned and kept, by λ and by α."""
    figure, panels = card("More λ or α keeps more and learns less; no value does both", 4.4, 1, 3, sharey=True)
    for panel, (name, published) in zip(panels, (("lambda", 5.0), ("alpha", 0.1), ("RepS, lambda", 0.1))):
        row, parameter, _ = plan.SWEEPS[name]
        draw_sweep(panel, row, plan.sweeps(runs().choices)[name])
        panel.axvline(published, color=BASELINE, linewidth=1, linestyle=":", zorder=0)
        label(panel, "published", (published, 52), (4, 0), color=BASELINE, fontsize=9)
        panel.set_title(row)
        panel.set_xlabel({"lam": "λ", "alpha": "α"}[parameter])
    panels[0].set_ylabel("learned (solid) and kept (dashed), %")
    panels[0].set_ylim(0, 100)
    note(figure, "miniature model, test scores; mean and range of three seeds")
    return figure


def draw_sweep(panel: Axes, row: str, groups: dict[Any, list[Spec]]) -> None:
    """Both scores of three seeds by the value of a hyper-parameter, over SFT's."""
    sft = [tables.main_spec(runs().choices, "math", "SFT", seed) for seed in plan.FEW_SEEDS]
    for score, line in ((plan.TASK, "-"), ("kept", "--")):
        height = mean(scores(sft, score))
        panel.axhline(height, color=SFT, linewidth=1.2, linestyle=line)
        label(panel, "SFT", (max(groups), height), (-2, 7 if score == plan.TASK else -8), color=SFT)
        by_value = [scores(specs, score) for specs in groups.values()]
        panel.plot(list(groups), list(map(mean, by_value)), **style_of(row) | {"linestyle": line})
        band(panel, list(groups), map(min, by_value), map(max, by_value), style_of(row)["color"])
    panel.set_xscale("log")

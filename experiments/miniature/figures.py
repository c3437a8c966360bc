"""The figures of the paper in miniature: scores by category, the attack, prompts, noise (Figures 2, 3, 5 and 6).

One more shows what each trial learned and kept. Read next: `report.py`.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from experiments.miniature import plan, tables
from experiments.miniature.mini import CATEGORIES
from experiments.seeds import Mean, mean


def draw(look_up: plan.LookUp, choices: plan.Choices, page: Path) -> None:
    """All whose runs were made, as PNG files beside the page."""
    drawings = {
        "scores": score_figure,
        "trials": trial_figure,
        "attack": attack_figure,
        "prompts": prompt_figure,
        "noise": noise_figure,
    }
    for name, drawing in drawings.items():
        try:
            figure = drawing(look_up, choices)
        except (FileNotFoundError, KeyError):  # not run yet, or diverged: the page says which
            continue
        figure.tight_layout()
        figure.savefig(page / f"miniature-{name}.png", dpi=110)
        plt.close(figure)


def score_figure(look_up: plan.LookUp, choices: plan.Choices) -> Any:
    """Figure 2: bars with standard errors, one panel for each fine-tuning set."""
    figure, panels = plt.subplots(len(plan.DATAS), 1, figsize=(9, 7), sharex=True)
    for panel, data in zip(panels, plan.DATAS):
        for place, row in enumerate(plan.TRIALS):
            specs = [tables.main_spec(choices, data, row, seed) for seed in plan.ALL_SEEDS]
            scores = [mean(tables.column(look_up, specs, name)) for name in CATEGORIES]
            bars(panel, place, len(plan.TRIALS), row, scores)
        panel.set_xticks(range(len(CATEGORIES)), CATEGORIES)
        panel.set_ylabel("exact match, %")
        panel.set_title(f"fine-tuned on {data}")
    panels[0].legend(ncols=4, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 1.35))
    return figure


def bars(panel: Any, place: int, count: int, label: str, scores: Sequence[Mean]) -> None:
    """One method's bars."""
    width = 0.8 / count
    places = [i + (place - (count - 1) / 2) * width for i in range(len(scores))]
    panel.bar(places, [100 * m.value for m in scores], width, yerr=[100 * m.error for m in scores], label=label)


def trial_figure(look_up: plan.LookUp, choices: plan.Choices) -> Any:
    """Every trial of every method, on the validation splits: what is learned against what is kept."""
    figure, panel = plt.subplots(figsize=(8, 5))
    for row, trials in plan.TRIALS.items():
        points = [[100 * tables.column_mean(look_up, trial, name) for trial in trials] for name in (plan.TASK, "kept")]
        panel.plot(*points, "o-" if row == "SFT" else "o", label=row, alpha=0.8)
    panel.set_xlabel("two-step, %")
    panel.set_ylabel("mean of the other columns, %")
    panel.legend(fontsize=8)
    return figure


def attack_figure(look_up: plan.LookUp, choices: plan.Choices) -> Any:
    """Figure 3: success of the attack by its steps, mean over seeds."""
    curves = {
        row: means(look_up(spec)["attack"]["success"] for spec in specs) for row, specs in plan.attacks(choices).items()
    }
    return lines(curves, range(21), "steps of harmful SFT", "attack success rate, %", 100)


def prompt_figure(look_up: plan.LookUp, choices: plan.Choices) -> Any:
    """Figure 5: each method's scores under the five prompts."""
    figure, panel = plt.subplots(figsize=(8, 4))
    groups = tables.figure_groups(choices)
    for place, specs in enumerate(groups.values()):
        shares = [100 * share for spec in specs for share in look_up(spec)["prompts"]]
        panel.scatter([place] * len(shares), shares, s=14, alpha=0.6)
        panel.hlines(sum(shares) / len(shares), place - 0.25, place + 0.25)
    panel.set_xticks(range(len(groups)), groups)
    panel.set_ylabel("exact match on two-step, %")
    return figure


def noise_figure(look_up: plan.LookUp, choices: plan.Choices) -> Any:
    """Figure 6: cosine of clean and noisy states by block."""
    groups = tables.figure_groups(choices)
    curves = {row: means(look_up(spec)["noise"] for spec in specs) for row, specs in groups.items()}
    return lines(curves, range(1, len(curves["base"]) + 1), "block", "cosine of clean and noisy states", 1)


def means(lists: Iterable[Sequence[float]]) -> list[Mean]:
    """Means over seeds, entry by entry, of a list that every run measured."""
    return [mean(values) for values in zip(*lists)]


def lines(curves: dict[str, list[Mean]], x: Sequence[int], x_label: str, y_label: str, factor: float) -> Any:
    figure, panel = plt.subplots(figsize=(8, 4))
    for row, points in curves.items():
        panel.plot(x, [factor * m.value for m in points], marker=".", label=row)
    panel.set_xlabel(x_label)
    panel.set_ylabel(y_label)
    panel.legend(fontsize=8)
    return figure

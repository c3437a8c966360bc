"""Two comparisons on the same footing: every method at its own best step, and Anchored Learning beside its neighbours.

The best step is the epoch with the lowest NLL of validation rows, as `lfu train --valid` keeps it in OUT/best. Read
next: `report.py`.
"""

from collections.abc import Sequence
from typing import Any

from experiments.markdown import markdown
from experiments.miniature import plan, tables
from experiments.miniature.mini import Spec
from experiments.seeds import interval, mean
from lfu.validation import best


def stopped_tables(look_up: plan.LookUp, choices: plan.Choices) -> str:
    """Scores at the best step, where it is, and the differences from SFT at its own best step."""
    parts = []
    for data in plan.DATAS:
        groups, title = plan.stopped(choices, data), f"Best step on {data}"
        rows = [
            [row, best_steps(look_up, specs), *tables.averages(look_up, specs), task_nll(look_up, specs)]
            for row, specs in groups.items()
        ]
        parts += [f"### {title}", markdown(["method", "best step", *tables.COLUMNS, "test NLL"], rows)]
        slow = {row: groups.pop(row) for row in plan.STOPPED[data]}
        parts += tables.less_sft(title, tables.difference_table(look_up, slow, slow["SFT"]))
        if fast := groups.get(f"SFT at {max(plan.TWO_RATES):g}"):
            parts += tables.less_sft("Best step at 0.01", tables.difference_table(look_up, groups, fast))
    return "\n\n".join(parts)


def best_steps(look_up: plan.LookUp, specs: Sequence[Spec]) -> str:
    """The mean over the runs, with the least and the greatest."""
    steps = [best(look_up(spec)["training"]["valid"])[0] for spec in specs]
    return f"{sum(steps) / len(steps):.0f} ({min(steps)} to {max(steps)})"


def task_nll(look_up: plan.LookUp, specs: Sequence[Spec]) -> str:
    """Of the task's test answers, in nats per token."""
    return f"{mean([look_up(spec)['scores']['nll'] for spec in specs]).value:.3f}"


PASSES = {
    "SFT": (60, 60),
    "SFT, 20 epochs": (120, 120),
    "LfU (LoRA)": (120, 120),
    "Distillation": (60 + 3 * 60, 60 + 60),
    "Anchored": (60 + 3 * 60, 60 + 60),
    "Anchored, 5 x 5 epochs": (60 + 3 * 150, 60 + 150),
    "Anchored, from LfU (LoRA)": (120 + 3 * 60, 120 + 60),
}
"""Forward and backward passes over a batch, those of the reference's training included."""


def anchored_tables(look_up: plan.LookUp, choices: plan.Choices) -> str:
    """Anchored Learning and what it should beat, with equal steps and with equal passes."""
    groups: dict[str, list[Spec]] = {row: whole(choices, row) for row in ("SFT", "LfU (LoRA)", "Distillation")}
    groups |= {"SFT, 20 epochs": plan.epochs(choices)["SFT"][20], "Anchored": whole(choices, "Anchored")}
    groups |= plan.anchors(choices)
    rows = []
    for row, (forward, backward) in PASSES.items():
        gaps = [tables.gap(look_up, choices, spec)[0] for spec in groups[row]] if row != "SFT" else []
        own: list[Any] = [row, len(groups[row]), f"{forward}, {backward}", *tables.averages(look_up, groups[row])]
        rows.append([*map(str, own), task_nll(look_up, groups[row]), interval(gaps) if gaps else ""])
    head = ["method", "seeds", "forward, backward passes", *tables.COLUMNS, "test NLL"]
    pairs = {row: specs for row, specs in groups.items() if len(specs) == len(plan.ALL_SEEDS)}
    parts = [markdown([*head, "kept beyond SFT of the same task score"], rows)]
    parts += tables.less_sft("Anchored Learning", tables.difference_table(look_up, pairs, groups["SFT"]))
    for row, against in (("Anchored", "Distillation"), ("Anchored, from LfU (LoRA)", "Anchored")):
        parts += [f"### {row}, less {against}", tables.difference_table(look_up, {row: groups[row]}, groups[against])]
    return "\n\n".join(parts)


def whole(choices: plan.Choices, row: str) -> list[Spec]:
    """The runs of the main table on `math`."""
    return [tables.chosen_spec(choices, row, seed) for seed in plan.ALL_SEEDS]

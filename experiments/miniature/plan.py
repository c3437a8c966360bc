"""Which runs the paper's tables and figures need in miniature, and how every method gets its hyper-parameters.

Every method has eight trials, fine-tuned on `math`, scored on the validation splits, with seeds of their own: a method
with a hyper-parameter tries four values of it at two learning rates, the others eight learning rates. The trial with
the best `balance` of what is learned and what is kept wins. As in the paper, what was chosen serves every fine-tuning
set. Test splits are read by the runs with the winning settings, and by those that vary one of them or are aligned at
fixed rates (Tables 4, 5, 12 to 15, other learning rates, causes); these choose nothing. Read next: `tables.py`.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import product
from typing import Any

from experiments.miniature.mini import CATEGORIES, EPOCHS, SPLITS, Hyper, Spec, Trial

TASK = "two-step"
DATAS = ("math", "mixed")
RATES = (1e-3, 2e-3, 3e-3, 5e-3, 7e-3, 1e-2, 1.5e-2, 2e-2)
TWO_RATES = (3e-3, 1e-2)
ALIGNMENT_RATE, GENTLER_RATES = 3e-3, (1e-3, 5e-4)
TRIAL_SEEDS = (100, 101)
ALL_SEEDS = tuple(range(10))
FEW_SEEDS = ALL_SEEDS[:3]

BY_SFT: Trial = ("sft", 3e-3, ())
BY_LFU: Trial = ("lfu-lora", 3e-3, (("alpha", 0.1), ("lam", 0.5)))
"""The reference of Anchored Learning: SFT and LfU (LoRA) as they were chosen."""
STAGES, STAGE_EPOCHS = 5, 5
"""Its published length. Where it is to take as many steps as the others, their epochs are shared out to the stages."""

LookUp = Callable[[Spec], dict[str, Any]]
"""A run -> its measurements."""
Choices = dict[str, Trial]
"""Row of a table -> the trial that was chosen."""


def grid(method: str, name: str, values: Iterable[Any], **fixed: Any) -> list[Trial]:
    """Values of one hyper-parameter, each at two learning rates."""
    return [(method, rate, tuple(sorted({**fixed, name: value}.items()))) for rate, value in product(TWO_RATES, values)]


TRIALS: dict[str, list[Trial]] = {
    "SFT": [("sft", rate, ()) for rate in RATES],
    "NEFTune": grid("neftune", "alpha", (1.0, 5.0, 15.0, 50.0)),
    "GEM": grid("gem-logsigmoid", "beta", (0.5, 0.7)) + grid("gem-linear", "beta", (0.5, 0.7)),
    "IM": [("im", rate, ()) for rate in RATES],
    "SDFT": [("sdft", rate, ()) for rate in RATES],
    "LfU (LoRA)": grid("lfu-lora", "lam", (0.5, 5.0, 50.0, 500.0), alpha=0.1),
    "LfU (RepS)": grid("lfu-reps", "lam", (0.1, 1.0, 10.0, 100.0), alpha=0.1),
    "Anchored": grid("anchored", "anchor_alpha", (0.1, 0.3, 0.5, 0.7), reference=BY_SFT, stages=STAGES),
    "Distillation": [
        ("anchored", rate, (("anchor_alpha", 1.0), ("reference", BY_SFT), ("stages", 1))) for rate in RATES
    ],
}
"""The rows of Tables 1 and 2, and Anchored Learning with its neighbour, distillation from the same adapter."""
MORE_TRIALS: dict[str, list[Trial]] = {
    "SAM": grid("sam", "alpha", (0.001, 0.01, 0.1, 1.0)),
    "L1": grid("l1", "lam", (0.001, 0.01, 0.1, 1.0)),
    "L2": grid("l2", "lam", (0.001, 0.01, 0.1, 1.0)),
    "logits": grid("logit-consistency", "lam", (0.1, 1.0, 10.0, 100.0), alpha=0.1),
    "ensemble": grid("ensemble", "beta", (0.1, 0.3, 0.5, 0.7)),
    "EMA": grid("ema", "beta", (0.1, 0.5, 0.9, 0.98)),
    "released LfU (LoRA)": grid("released-lora", "lam", (0.5, 5.0, 50.0, 500.0), alpha=0.1),
    "released LfU (RepS)": grid("released-reps", "lam", (0.01, 0.1, 1.0, 10.0), alpha=0.1),
    "LfU (LoRA), relative": grid("lfu-lora", "lam", (0.5, 5.0, 50.0, 500.0), alpha=0.1, norm="relative"),
}
"""The rows of Tables 6 and 11, the released algorithms, and the scale-free norm."""


# --- choosing -------------------------------------------------------------------------------------


def trial_specs(trial: Trial) -> list[Spec]:
    """One run for each trial seed, scored on the validation splits."""
    method, rate, hyper = trial
    epochs = stage_epochs(hyper, "math")
    return [Spec(method, rate, hyper, seed=seed, epochs=epochs, split="valid") for seed in TRIAL_SEEDS]


def stage_epochs(hyper: Hyper, data: str) -> int:
    """As many epochs for all, which stages share."""
    return EPOCHS[data] // dict(hyper).get("stages", 1)


def choosing(rows: dict[str, list[Trial]]) -> list[Spec]:
    """All runs that the choices for these rows are made from."""
    return [spec for trials in rows.values() for trial in trials for spec in trial_specs(trial)]


def average(scores: dict[str, float]) -> float:
    """Mean over the four categories."""
    return sum(category(scores, name) for name in CATEGORIES) / len(CATEGORIES)


def balance(scores: dict[str, float]) -> float:
    """Half for the task, half for the mean of the four other columns.

    The average over categories would not do: it is best where nothing is learned, as in this world the task is one of
    five columns, and the others start near 100 %.
    """
    return 0.5 * scores[TASK] + 0.5 * kept(scores)


def kept(scores: dict[str, float]) -> float:
    """Mean over the columns that are not the task."""
    return sum(scores[column] for column in SPLITS if column != TASK) / (len(SPLITS) - 1)


def category(scores: dict[str, float], name: str) -> float:
    """Mean over the columns of one category."""
    return sum(scores[column] for column in CATEGORIES[name]) / len(CATEGORIES[name])


def choose(look_up: LookUp, rows: dict[str, list[Trial]]) -> Choices:
    """The best trial of every row, by the runs of `choosing`."""

    def value(trial: Trial) -> float:
        return sum(balance(look_up(spec)["scores"]) for spec in trial_specs(trial)) / len(TRIAL_SEEDS)

    return {row: max(trials, key=value) for row, trials in rows.items()}


def choices_from(stored: dict[str, list[Any]]) -> Choices:
    """Choices as JSON keeps them: its lists are tuples here."""
    return {row: frozen(trial) for row, trial in stored.items()}


def frozen(value: Any) -> Any:
    """Lists within lists as tuples within tuples."""
    return tuple(map(frozen, value)) if isinstance(value, list) else value


# --- the tables -----------------------------------------------------------------------------------


def base(**changed: Any) -> Spec:
    return Spec("base", 0.0, epochs=0, **changed)


def tested(choices: Choices, data: str, row: str, seed: int, **changed: Any) -> Spec:
    """A run with the chosen settings, scored on the test splits."""
    method, rate, hyper = choices[row]
    return replace(Spec(method, rate, hyper, data=data, seed=seed, epochs=stage_epochs(hyper, data)), **changed)


def main_table(choices: Choices, seeds: Iterable[int]) -> list[Spec]:
    """Tables 1 and 2, Figure 2; and on `math`, for the first seeds, what Figures 5 and 6 show."""
    runs = [tested(choices, data, row, seed) for seed in seeds for data in DATAS for row in TRIALS]
    return [base(measures=figures_5_6(0)), *(with_figures(spec) for spec in runs)]


def with_figures(spec: Spec) -> Spec:
    return replace(spec, measures=figures_5_6(spec.seed)) if spec.data == "math" else spec


def figures_5_6(seed: int) -> tuple[str, ...]:
    """What is measured on a run on `math`."""
    return ("scores", "prompts", "noise") if seed in FEW_SEEDS else ("scores",)


def alternatives(choices: Choices) -> list[Spec]:
    """Tables 6 and 11, and what else was chosen on `math`."""
    return [tested(choices, "math", row, seed) for seed in FEW_SEEDS for row in MORE_TRIALS]


def varied(choices: Choices, row: str, name: str, values: Iterable[Any], **changed: Any) -> dict[Any, list[Spec]]:
    """One hyper-parameter of a chosen setting at several values: value -> the runs."""
    specs: dict[Any, list[Spec]] = {}
    for value in values:
        for seed in FEW_SEEDS:
            spec = tested(choices, "math", row, seed, **changed)
            hyper = with_hyper(spec.hyper, **{name: value})
            specs.setdefault(value, []).append(replace(spec, hyper=hyper))
    return specs


SWEEPS: dict[str, tuple[str, str, tuple[Any, ...]]] = {
    "lambda": ("LfU (LoRA)", "lam", (0.1, 1.0, 5.0, 10.0, 50.0, 500.0)),
    "alpha": ("LfU (LoRA)", "alpha", (0.001, 0.01, 0.05, 0.1, 0.5)),
    "layers": ("LfU (LoRA)", "layers", ((1,), (2, 3), (4,))),
    "RepS, lambda": ("LfU (RepS)", "lam", (0.1, 1.0, 10.0, 30.0, 100.0)),
    "norm relative, lambda": ("LfU (LoRA), relative", "lam", (0.5, 5.0, 50.0, 500.0)),
    "SAM": ("SAM", "alpha", (0.001, 0.01, 0.1)),
    "L1": ("L1", "lam", (0.01, 0.05, 0.1)),
    "L2": ("L2", "lam", (0.01, 0.05, 0.1)),
    "logits": ("logits", "lam", (0.1, 1.0, 10.0)),
    "ensemble": ("ensemble", "beta", (0.1, 0.5, 0.9)),
    "EMA": ("EMA", "beta", (0.1, 0.5, 0.9)),
}
"""Name -> row, hyper-parameter, values. Tables 5, 13, 14 and 15 have the paper's (blocks: early, middle, late), and λ
one more; the two sweeps after "layers" are ours."""
SFT_RATES = (1e-3, 2e-3, 3e-3, 5e-3, 1e-2)
"""How much SFT keeps by how much it has learned: the curve that another method should lie above."""
EPOCH_VALUES = (2, 5, 10, 20, 30)
CAUSES: dict[str, dict[str, Any]] = {
    "as chosen": {},
    "micro-batch 16": {"micro_batch_size": 16},
    "micro-batch 1": {"micro_batch_size": 1},
    "bfloat16": {"dtype": "bfloat16"},
}
"""What could be behind a result that is not the paper's, besides α, λ and the norm."""


def sweeps(choices: Choices) -> dict[str, dict[Any, list[Spec]]]:
    return {name: varied(choices, *sweep) for name, sweep in SWEEPS.items()}


def sft_curve(choices: Choices, seed: int) -> list[Spec]:
    """SFT at several learning rates."""
    return [tested(choices, "math", "SFT", seed, learning_rate=rate) for rate in SFT_RATES]


def sft_rates(choices: Choices) -> dict[str, list[Spec]]:
    """The same runs, rate by rate."""
    curves = zip(*(sft_curve(choices, seed) for seed in ALL_SEEDS))
    return {f"SFT at {rate:g}": list(specs) for rate, specs in zip(SFT_RATES, curves)}


def faster(choices: Choices) -> dict[str, list[Spec]]:
    """The other learning rate of the trials, where more is learned and more forgotten; also of Anchored's reference."""
    rate = max(TWO_RATES)
    anchored: dict[str, Any] = {
        "learning_rate": rate,
        "hyper": with_hyper(choices["Anchored"][2], reference=("sft", rate, ())),
    }
    changes: dict[str, tuple[str, dict[str, Any]]] = {
        f"LfU (LoRA) at {rate:g}": ("LfU (LoRA)", {"learning_rate": rate}),
        f"LfU (RepS) at {rate:g}": ("LfU (RepS)", {"learning_rate": rate}),
        f"Anchored at {rate:g}": ("Anchored", anchored),
        f"Anchored at {rate:g}, {STAGES} x {STAGE_EPOCHS} epochs": ("Anchored", anchored | {"epochs": STAGE_EPOCHS}),
    }
    return {
        title: [tested(choices, "math", row, seed, **changed) for seed in ALL_SEEDS]
        for title, (row, changed) in changes.items()
    }


def with_hyper(hyper: Hyper, **changes: Any) -> Hyper:
    """Hyper-parameters with some of them changed, or added."""
    return tuple(sorted((dict(hyper) | changes).items()))


def epochs(choices: Choices) -> dict[str, dict[int, list[Spec]]]:
    """Table 12: runs of different length, each with a schedule of its own."""
    return {
        row: {n: [tested(choices, "math", row, seed, epochs=n) for seed in FEW_SEEDS] for n in EPOCH_VALUES}
        for row in ("SFT", "LfU (LoRA)")
    }


def attacks(choices: Choices) -> dict[str, list[Spec]]:
    """Table 4 and Figure 3: aligned on `safe`, all at one learning rate, then attacked."""

    def aligned(row: str, rate: float) -> list[Spec]:
        how = {"learning_rate": rate, "measures": ("attack",)}
        return [tested(choices, "safe", row, seed, **how) for seed in FEW_SEEDS]

    gently = {f"SFT at {rate:g}": aligned("SFT", rate) for rate in GENTLER_RATES}
    return {row: aligned(row, ALIGNMENT_RATE) for row in TRIALS} | gently


def anchors(choices: Choices) -> dict[str, list[Spec]]:
    """Anchored Learning in its published length, and with LfU's adapter in place of SFT's."""
    by_lfu = with_hyper(choices["Anchored"][2], reference=BY_LFU)
    changes: dict[str, dict[str, Any]] = {
        f"Anchored, {STAGES} x {STAGE_EPOCHS} epochs": {"epochs": STAGE_EPOCHS},
        "Anchored, from LfU (LoRA)": {"hyper": by_lfu},
    }
    return {
        row: [tested(choices, "math", "Anchored", seed, **changed) for seed in ALL_SEEDS]
        for row, changed in changes.items()
    }


STOPPED: dict[str, tuple[str, ...]] = {"math": tuple(TRIALS), "mixed": ("SFT", "LfU (LoRA)", "LfU (RepS)", "Anchored")}
"""What is run again, to be stopped at its best epoch."""


def stopped(choices: Choices, data: str) -> dict[str, list[Spec]]:
    """The main table with every run at its best epoch by validation rows; on `math` at the faster rate too."""
    groups: dict[str, list[Spec]] = {
        row: [tested(choices, data, row, seed, stopped=True) for seed in ALL_SEEDS] for row in STOPPED[data]
    }
    fast = max(TWO_RATES)
    for row in ("SFT", "LfU (LoRA)", "LfU (RepS)") if data == "math" else ():
        specs = [replace(spec, learning_rate=fast) for spec in groups[row]]
        groups[f"{row} at {fast:g}"] = specs
    return groups


def causes(choices: Choices) -> dict[str, dict[str, list[Spec]]]:
    return {
        row: {
            cause: [tested(choices, "math", row, seed, **changed) for seed in FEW_SEEDS]
            for cause, changed in CAUSES.items()
        }
        for row in ("SFT", "LfU (LoRA)", "LfU (RepS)")
    }


def whole(choices: Choices) -> list[Spec]:
    """Everything that reads the test splits, the main table first."""
    groups = [*sweeps(choices).values(), *epochs(choices).values(), *causes(choices).values(), attacks(choices)]
    groups += [
        faster(choices),
        anchors(choices),
        *(stopped(choices, data) for data in DATAS),
        {"base": [base(measures=("squares",))]},
    ]
    rest = [spec for group in groups for specs in group.values() for spec in specs]
    curves = [spec for seed in ALL_SEEDS for spec in sft_curve(choices, seed)]
    return list(dict.fromkeys([*main_table(choices, ALL_SEEDS), *alternatives(choices), *curves, *rest]))

"""Every table of the paper in miniature with its errors, beside the paper's numbers.

A mean is over seeds, ± its standard error. Differences from SFT are paired by seed, with a 95 % interval (`seeds.py`).
Read next: `stopped.py`.
"""

import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np

from experiments.markdown import markdown
from experiments.miniature import paper, plan
from experiments.miniature.mini import CATEGORIES, SPLITS, Spec, Trial
from experiments.seeds import difference, interval, mean
from lfu.evaluation.generative import PROMPT_VARIANTS
from lfu.profiling.bench import spread

COLUMNS = [*SPLITS, "kept", "average", "balance"]
GRADIENT = ["gradient norm", "clipped steps"]
Found = dict[str, Sequence[Sequence[float]]]
"""Row -> column -> by seed."""


# --- what the runs say ----------------------------------------------------------------------------


def column(look_up: plan.LookUp, specs: Iterable[Spec], name: str) -> list[float]:
    """One score of several runs: a column of the table, a category, the average of the categories, or the balance.

    KeyError if one of them diverged: the zeros that stand for its scores are for the choice of settings alone.
    """
    runs = [look_up(spec) for spec in specs]
    if diverged(runs):
        raise KeyError("score")
    return scores_of(runs, name)


def diverged(runs: Iterable[dict[str, Any]]) -> bool:
    """Whether any of these runs did."""
    return any("diverged" in run for run in runs)


def scores_of(runs: Iterable[dict[str, Any]], name: str) -> list[float]:
    """`column` of these runs, with 0 for every score of one that diverged."""
    measure = {"average": plan.average, "balance": plan.balance, "kept": plan.kept}
    tables = [run["scores"] for run in runs]
    if name in measure:
        return [measure[name](scores) for scores in tables]
    return [scores[name] if name in SPLITS else plan.category(scores, name) for scores in tables]


def averages(look_up: plan.LookUp, specs: Sequence[Spec], names: Iterable[str] = COLUMNS) -> list[str]:
    """The mean over these runs of each of these scores, as cells."""
    return [str(mean(column(look_up, specs, name))) for name in names]


def ranks(scores: dict[str, Sequence[float]]) -> dict[str, float]:
    """As in Tables 1 and 2: the mean over the categories of a method's rank; equals share the better one."""
    columns = list(zip(*scores.values()))
    return {
        row: sum(1 + sum(other > value for other in column) for value, column in zip(values, columns)) / len(columns)
        for row, values in scores.items()
    }


# --- Tables 1 and 2 -------------------------------------------------------------------------------


def main_tables(look_up: plan.LookUp, choices: plan.Choices, seeds: Sequence[int]) -> str:
    """Scores on both fine-tuning sets, and the differences from SFT."""
    parts = []
    for data, published, published_ranks in (
        ("math", paper.TABLE_1, paper.RANKS_1),
        ("mixed", paper.TABLE_2, paper.RANKS_2),
    ):
        groups = {row: [main_spec(choices, data, row, seed) for seed in seeds] for row in plan.TRIALS}
        title, count = f"Fine-tuned on {data}", f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''}:"
        parts += [f"### {title}", count, score_table(look_up, groups, published, published_ranks)]
        parts += less_sft(title, difference_table(look_up, groups, groups["SFT"]))
    return "\n\n".join(parts)


def less_sft(title: str, table: str) -> list[str]:
    """The table of differences that goes with another of this title."""
    return [f"### {title}, less SFT", table]


def main_spec(choices: plan.Choices, data: str, row: str, seed: int) -> Spec:
    return plan.with_figures(plan.tested(choices, data, row, seed))


def chosen_spec(choices: plan.Choices, row: str, seed: int) -> Spec:
    """The tested run on `math`, of the main table or of the alternatives."""
    spec = plan.tested(choices, "math", row, seed)
    return plan.with_figures(spec) if row in plan.TRIALS else spec


def score_table(
    look_up: plan.LookUp,
    groups: dict[str, list[Spec]],
    published: dict[str, paper.Row],
    published_ranks: dict[str, float],
) -> str:
    """Every column with its error, the rank, and the paper's four categories and rank."""
    by_category = {
        row: [round(100 * mean(column(look_up, specs, name)).value, 1) for name in CATEGORIES]
        for row, specs in groups.items()
    }
    own_ranks = ranks({row: scores for row, scores in by_category.items() if row in published_ranks})

    def cells(row: str, specs: list[Spec]) -> list[str]:
        own = averages(look_up, specs)
        theirs = [f"{value:.1f}" for value in published.get(row, ())]
        rank = f"{own_ranks[row]:.2f}" if row in own_ranks else ""
        return [row, *own, rank, " / ".join(theirs), f"{published_ranks.get(row, '')}"]

    head = ["method", *COLUMNS, "rank", "paper: math / knowledge / reasoning / helpfulness", "paper: rank"]
    base = plan.base(measures=plan.figures_5_6(0))
    return markdown(head, [cells("base", [base]), *(cells(row, specs) for row, specs in groups.items())])


def difference_table(
    look_up: plan.LookUp, groups: dict[Any, list[Spec]], against: list[Spec], head: str = "method"
) -> str:
    """Every column, less that of the runs `against`, which are of the same seeds."""
    rows = [[f"{row}", *differences(look_up, specs, against)] for row, specs in groups.items() if specs != against]
    return markdown([head, *COLUMNS], rows)


def differences(look_up: plan.LookUp, ours: Sequence[Spec], theirs: Sequence[Spec]) -> list[str]:
    """Of every column, as cells."""
    if diverged(map(look_up, [*ours, *theirs])):
        return ["diverged"] * len(COLUMNS)
    return [difference(column(look_up, ours, name), column(look_up, theirs, name)) for name in COLUMNS]


def few(choices: plan.Choices, row: str) -> list[Spec]:
    """The tested runs of a row with the few seeds that most tables have."""
    return [chosen_spec(choices, row, seed) for seed in plan.FEW_SEEDS]


# --- Table 3 --------------------------------------------------------------------------------------


def table_3(times: dict[str, list[float]]) -> str:
    """Time of a step over that of SFT."""
    if not times:
        raise FileNotFoundError("times.json")
    rows = [
        [
            row,
            spread(seconds, times["SFT"]),
            f"{paper.TIMES[row] / paper.TIMES['SFT']:.2f}" if row in paper.TIMES else "",
        ]
        for row, seconds in times.items()
    ]
    table = markdown(["method", "time of a gradient, SFT = 1", "paper"], rows)
    return f"{table}\n\nMedian of 50 rounds (least to greatest)."


# --- the other tables -----------------------------------------------------------------------------


def group_table(look_up: plan.LookUp, groups: dict[Any, list[Spec]], published: dict[Any, paper.Row], head: str) -> str:
    """One row for each group of runs, beside the paper's where it has one."""

    def cells(name: Any, specs: list[Spec]) -> list[str]:
        runs = [look_up(spec) for spec in specs]
        if diverged(runs):
            own = ["diverged"] * len([*COLUMNS, *GRADIENT])
        else:
            own = [*averages(look_up, specs), *gradient_cells(runs)]
        return [f"{name}", f"{len(specs)}", *own, " / ".join(f"{value:.1f}" for value in published.get(name, ()))]

    rows = [cells(name, specs) for name, specs in groups.items()]
    return markdown([head, "seeds", *COLUMNS, *GRADIENT, "paper"], rows)


def gradient_cells(runs: Sequence[dict[str, Any]]) -> list[str]:
    """Of these runs: the norm of the gradient, mean over the steps, and how many of the steps were clipped."""
    norm, clipped = (mean([run["training"][key] for run in runs]).value for key in ("gradient_norm", "clipped"))
    return [f"{norm:.2f}", f"{100 * clipped:.0f} %"]


def tables_6_and_11(look_up: plan.LookUp, choices: plan.Choices) -> str:
    """The alternatives beside SFT and LfU, on the same seeds."""
    rows = {"SFT": plan.TRIALS, "LfU (LoRA)": plan.TRIALS, "LfU (RepS)": plan.TRIALS} | plan.MORE_TRIALS
    groups = {row: few(choices, row) for row in rows}
    published = paper.ALTERNATIVES | {name: paper.TABLE_1[name] for name in ("SFT", "LfU (LoRA)", "LfU (RepS)")}
    differences = difference_table(look_up, groups, groups["SFT"])
    return "\n\n".join([group_table(look_up, groups, published, "method"), *less_sft("Alternatives", differences)])


def sweep_tables(look_up: plan.LookUp, choices: plan.Choices, names: Iterable[str]) -> str:
    """Each of these hyper-parameters, and the differences from SFT."""
    sft, parts = few(choices, "SFT"), []
    for name in names:
        row, parameter, _ = plan.SWEEPS[name]
        groups = plan.sweeps(choices)[name]
        published: dict[Any, paper.Row] = paper.SWEEPS.get(name, {})
        if name == "layers":
            groups = dict(zip(("early", "middle", "late"), groups.values()))
            published = paper.LAYERS
        title = f"{row}: {parameter}"
        parts += [f"### {title}", group_table(look_up, groups, published, parameter)]
        parts += less_sft(title, difference_table(look_up, groups, sft, parameter))
    return "\n\n".join(parts)


def table_12(look_up: plan.LookUp, choices: plan.Choices) -> str:
    """Exact match on the task, the other columns, and the likelihood, by length of the run."""
    rows, runs = [], plan.epochs(choices)
    for row, groups in runs.items():
        for n, specs in groups.items():
            nll = mean([look_up(spec)["scores"]["nll"] for spec in specs])
            own = averages(look_up, specs)
            rows.append([row, str(n), *own, f"{nll.value:.3f} ± {nll.error:.3f}"])
    table = markdown(["method", "epochs", *COLUMNS, "NLL of the task's test answers"], rows)
    theirs = [
        f"{row} " + ", ".join(f"{score} after {n:g}" for n, score in scores.items())
        for row, scores in paper.EPOCHS.items()
    ]
    longer = [[str(n), *differences(look_up, specs, runs["SFT"][n])] for n, specs in runs["LfU (LoRA)"].items()]
    parts = [table, f"The paper, GSM8K, by epochs: {'; '.join(theirs)}."]
    return "\n\n".join([*parts, *less_sft("LfU (LoRA), by epochs", markdown(["epochs", *COLUMNS], longer))])


def table_4(look_up: plan.LookUp, choices: plan.Choices) -> str:
    """Attack success rates before the attack and after 5, 10, 15 and 20 steps; what the answers then are; and how the
    alignment before it ended."""
    after = (0, 5, 10, 15, 20)
    rows: list[list[str]] = []
    rates: Found = {}
    for row, specs in plan.attacks(choices).items():
        runs = [look_up(spec) for spec in specs]
        rates[row] = [[run["attack"]["success"][step] for run in runs] for step in after]
        complied = str(mean([run["attack"]["complied"][-1] for run in runs]))
        ends = [mean([run["training"][name] for run in runs]).value for name in ("sft", "last_gradient_norm", "moved")]
        theirs = [" / ".join(f"{rate:.1f}" for rate in pair) for pair in paper.ATTACKS.get(row, [()] * 3)]
        rows.append([row, *map(str, map(mean, rates[row])), complied, *(f"{end:.2g}" for end in ends), *theirs])
    steps = [f"{step} steps" for step in after]
    ours = ["complied, 20 steps", "aligned: loss", "gradient", "moved"]
    table = markdown(["method", *steps, *ours, "paper, 0 / 5 steps: HEx-PHI", "PureBad", "AdvBench"], rows)
    return "\n\n".join([table, *less_sft("Success of the attack", paired(steps, rates))])


def figure_5(look_up: plan.LookUp, choices: plan.Choices) -> str:
    """Exact match on the task under each wording; mean and population deviation over the five, averaged over seeds."""
    found: Found = {}
    for row, specs in figure_groups(choices).items():
        shares = [look_up(spec)["prompts"] for spec in specs]
        found[row] = [*zip(*shares), list(map(statistics.mean, shares)), list(map(statistics.pstdev, shares))]
    heads = [*(f"“{wording.partition('{')[0].strip()}”" for wording in PROMPT_VARIANTS), "mean", "deviation"]
    return with_differences("Five prompts", heads, found, lambda values: str(mean(values)))


def figure_6(look_up: plan.LookUp, choices: plan.Choices) -> str:
    """Cosine of clean and noisy states, block by block."""
    groups = figure_groups(choices)
    found: Found = {row: [*zip(*(look_up(spec)["noise"] for spec in specs))] for row, specs in groups.items()}
    heads = [f"block {i + 1}" for i in range(len(found["base"]))]
    return with_differences("Cosine times 100", heads, found, cosine, digits=2)


def cosine(values: Sequence[float]) -> str:
    m = mean(values)
    return f"{m.value:.4f}" + (f" ± {m.error:.4f}" if m.n > 1 else "")


def with_differences(
    title: str, heads: list[str], found: Found, cell: Callable[[Sequence[float]], str], digits: int = 1
) -> str:
    """What was found; then, paired by seed, what it differs from SFT."""
    table = markdown(["method", *heads], [[row, *map(cell, columns)] for row, columns in found.items()])
    return "\n\n".join([table, *less_sft(title, paired(heads, found, digits))])


def paired(heads: list[str], found: Found, digits: int = 1) -> str:
    """What was found, less SFT's of the same seeds; the base model has none."""
    less = partial(difference, digits=digits)
    rows = [[row, *map(less, each, found["SFT"])] for row, each in found.items() if row not in ("base", "SFT")]
    return markdown(["method", *heads], rows)


def figure_groups(choices: plan.Choices) -> dict[str, list[Spec]]:
    """The runs of Figures 5 and 6."""
    base = {"base": [plan.base(measures=plan.figures_5_6(0))]}
    return base | {row: few(choices, row) for row in plan.TRIALS}


def frontier_tables(look_up: plan.LookUp, choices: plan.Choices) -> str:
    """What each method keeps beyond SFT of the same task score: SFT's curve over its learning rates, seed by seed.

    And the differences from SFT at the learning rate at which it forgets.
    """
    learned = (plan.TASK, "kept")
    curve = plan.sft_rates(choices)
    rows = [[row, str(len(specs)), *averages(look_up, specs, learned), "", ""] for row, specs in curve.items()]
    for row, specs in beside_the_curve(choices).items():
        gaps, within = zip(*(gap(look_up, choices, spec) for spec in specs))
        rows.append([row, str(len(specs)), *averages(look_up, specs, learned), interval(gaps), f"{sum(within)}"])
    head = ["method", "seeds", "task", "kept", "kept beyond SFT of the same task score", "seeds within SFT's scores"]
    fast = f"SFT at {max(plan.TWO_RATES):g}"
    table = difference_table(look_up, plan.faster(choices), curve[fast])
    return "\n\n".join([markdown(head, rows), *less_sft(f"At {max(plan.TWO_RATES):g}", table)])


def beside_the_curve(choices: plan.Choices) -> dict[str, list[Spec]]:
    """All that was chosen, LfU and Anchored Learning at the faster rate, and LfU's sweeps of λ."""
    seeds = {row: plan.ALL_SEEDS if row in plan.TRIALS else plan.FEW_SEEDS for row in choices if row != "SFT"}
    groups = {row: [chosen_spec(choices, row, seed) for seed in each] for row, each in seeds.items()}
    groups |= plan.faster(choices)
    for name in ("lambda", "RepS, lambda"):
        row = plan.SWEEPS[name][0]
        groups |= {f"{row}, λ {value}": specs for value, specs in plan.sweeps(choices)[name].items()}
    return groups


def gap(look_up: plan.LookUp, choices: plan.Choices, spec: Spec) -> tuple[float, bool]:
    """What a run keeps, less what SFT keeps at its task score, by straight lines between SFT's learning rates.

    And whether SFT reaches this task score at any of them; where it does not, its nearest end stands for it.
    """
    curve = plan.sft_curve(choices, spec.seed)
    learned, left = zip(*sorted(zip(column(look_up, curve, plan.TASK), column(look_up, curve, "kept"))))
    ((task,), (kept,)) = (column(look_up, [spec], name) for name in (plan.TASK, "kept"))
    return kept - float(np.interp(task, learned, left)), learned[0] <= task <= learned[-1]


def causes_table(look_up: plan.LookUp, choices: plan.Choices) -> str:
    """What changes with the micro-batch and the precision; and how much of the gradient is clipped."""
    rows, changes = [], []
    for row, groups in plan.causes(choices).items():
        changes += [f"### {row}, less as chosen", difference_table(look_up, groups, groups["as chosen"])]
        for cause, specs in groups.items():
            rows.append([row, cause, *averages(look_up, specs), *gradient_cells([look_up(spec) for spec in specs])])
    table = markdown(["method", "setting", *COLUMNS, *GRADIENT], rows)
    return "\n\n".join([table, *changes])


def trials_table(look_up: plan.LookUp, trials: dict[str, list[Trial]]) -> str:
    """Every trial on the validation splits: the task, what is kept, and their balance; the best is bold."""
    rows = []
    for row, each in trials.items():
        values = {
            trial: [column_mean(look_up, trial, name) for name in (plan.TASK, "kept", "balance")] for trial in each
        }
        best = max(values, key=lambda trial: values[trial][-1])
        for trial, scores in values.items():
            cells = [f"{100 * score:.1f}" for score in scores]
            rows.append([row, *settings(trial), *(f"**{cell}**" if trial == best else cell for cell in cells)])
    return markdown(["row", "learning rate", "method and hyper-parameters", "task", "kept", "balance"], rows)


def column_mean(look_up: plan.LookUp, trial: Trial, name: str) -> float:
    """Of a trial's runs."""
    return mean(scores_of(map(look_up, plan.trial_specs(trial)), name)).value


def settings(trial: Trial) -> list[str]:
    """Learning rate, method and hyper-parameters, as cells."""
    method, rate, hyper = trial
    shown = {name: "{} at {:g}".format(*value) if name == "reference" else value for name, value in hyper}
    return [f"{rate:g}", ", ".join([method, *(f"{name} {value}" for name, value in shown.items())])]


def squares_table(look_up: plan.LookUp) -> str:
    """What an absolute norm of a block's change is proportional to."""
    squares = look_up(plan.base(measures=("squares",)))["squares"]
    heads = [f"block {block}" for block in range(1, len(squares) + 1)]
    cells = [f"{square:.0f}" for square in [*squares, mean(squares).value]]
    return f"### Size of the states\n\n{markdown(['bare model', *heads, 'all'], [['mean square', *cells]])}"


def rewritten_line(look_up: plan.LookUp, choices: plan.Choices) -> str:
    """How much of the data SDFT changes."""
    groups = {data: [main_spec(choices, data, "SDFT", seed) for seed in plan.ALL_SEEDS] for data in plan.DATAS}
    groups["safe"] = plan.attacks(choices)["SDFT"]
    parts = []
    for data, specs in groups.items():
        shares = [100 * look_up(spec)["rewritten"] for spec in specs]
        parts.append(f"{min(shares):.0f} to {max(shares):.0f} % of `{data}`")
    return f"SDFT trains on the model's own words in {', '.join(parts)}, by seed; the other rows are as they were."


def choices_table(choices: plan.Choices) -> str:
    rows = [[row, *settings(trial)] for row, trial in choices.items()]
    return markdown(["row", "learning rate", "method and hyper-parameters"], rows)

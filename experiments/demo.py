"""What fine-tuning makes a small model learn, and what it makes it forget: SFT against LfU on `weights/mini`.

    make demo
    python -m experiments.demo --methods sft lfu-lora lfu-reps released-lora released-reps

Fine-tunes the miniature model on 96 two-step word problems with each method, through the same functions as the `lfu`
command, and scores it on the task and on all four categories of its world. Prints one table, how the methods differ
from the first of them, and a problem with its answers; draws what is kept against what is learned. Template, learning
rate, ten epochs and one micro-batch a step are this model's, as is λ 0.5; α and all else are the published ones.
"""

import argparse
import math
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from io import StringIO
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch

from experiments import palette
from experiments.markdown import markdown
from experiments.miniature.mini import MINI, SPLITS
from lfu.cli import EvalOptions, TrainOptions, evaluate, train
from lfu.cli.plot import load_pyplot
from lfu.data.rows import read_rows
from lfu.errors import InputError
from lfu.evaluation.estimates import Estimate, accuracy
from lfu.evaluation.generative import is_right
from lfu.methods import METHODS

OUT = Path("runs") / "demo"
PICTURE = OUT / "kept-against-learned.png"
TASK = "two-step"
EPOCHS = 10
COLOURS = {"base": palette.INK, "sft": palette.SFT, "lfu-lora": palette.LFU_LORA, "lfu-reps": palette.LFU_REPS}
Scores = dict[str, Estimate]
"""Of one model, by the columns of `SPLITS`."""


class Trial(NamedTuple):
    """A method, and its λ where it has one."""

    method: str
    lam: float | None = None

    @property
    def name(self) -> str:
        return self.method if self.lam is None else f"{self.method}, λ {self.lam:g}"

    @property
    def folder(self) -> Path:
        """`runs/demo/lfu-lora-0.5`, say."""
        return OUT / (self.method if self.lam is None else f"{self.method}-{self.lam:g}")


BASE = Trial("base")
DEFAULT = [Trial("sft"), Trial("lfu-lora", 0.5), Trial("lfu-lora", 5.0)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--methods", nargs="+", type=read_trial, metavar="METHOD[:LAMBDA]", default=DEFAULT,
        help="with the published λ, or with this one; the others are compared with the first",
    )  # fmt: skip
    trials = [BASE, *parser.parse_args().methods]
    shutil.rmtree(OUT, ignore_errors=True)
    print(f"Half a minute on two idle cores: {'; '.join(trial.name for trial in trials)}", flush=True)
    rows = {}
    # Operations this small are slower when they are shared out to several threads.
    with ProcessPoolExecutor(2, get_context("spawn"), partial(torch.set_num_threads, 1)) as pool:
        for trial, (scores, seconds) in zip(trials, pool.map(run, trials)):
            print(f"{trial.name}: {seconds:.0f} s", flush=True)
            rows[trial.name] = scores
    print(f"\n{table(rows)}\n\n{findings(rows)}\n\n{picture(rows)}\n\n{problem(trials)}")


def read_trial(text: str) -> Trial:
    """A method with its published λ, or with the one after the colon."""
    method, _, lam = text.partition(":")
    if method not in METHODS:
        raise argparse.ArgumentTypeError(f"{method!r} is none of {', '.join(METHODS)}")
    published = METHODS[method].published.get("lam")
    if lam and published is None:
        raise argparse.ArgumentTypeError(f"{method} has no λ")
    return Trial(method, float(lam) if lam else published)


# --- a model --------------------------------------------------------------------------------------


def run(trial: Trial) -> tuple[Scores, float]:
    """Exact match on the held-out rows of every column, and the seconds that training and scoring took."""
    start = time.perf_counter()
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        adapter = None if trial == BASE else fine_tune(trial)
        scores = {column: score(trial, adapter, folder) for column, folder in SPLITS.items()}
    return scores, time.perf_counter() - start


def fine_tune(trial: Trial) -> Path:
    """The adapter's folder. One micro-batch per step: at this size the number of calls is what costs time."""
    options = TrainOptions(
        model=MINI,
        data=MINI / "math" / "train.jsonl",
        out=trial.folder,
        method=trial.method,
        lam=trial.lam,
        template="question",
        epochs=EPOCHS,
        learning_rate=1e-2,
        micro_batch_size=16,
    )
    return train(options)


def score(trial: Trial, adapter: Path | None, folder: str) -> Estimate:
    """On one test split: the number after #### where the reference has one, else the text, as in all our tables."""
    out = trial.folder / f"{folder}.jsonl"
    options = EvalOptions(
        model=MINI,
        adapter=adapter,
        data=MINI / folder / "test.jsonl",
        out=out,
        score="gsm8k" if folder == "math" else "exact",
        template="question",
        nll=False,
        max_new_tokens=64,
        batch_size=200,
    )
    evaluate(options)
    return accuracy([is_right(row.fields["prediction"], row.answer) for row in read_rows(out)])


# --- what is said of them -------------------------------------------------------------------------


def table(rows: dict[str, Scores]) -> str:
    """Percent exact match ± standard error; *kept* is the mean of all columns but the task's."""
    columns = [*SPLITS, "kept"]
    cells = [[name, *map(percent, [*scores.values(), kept(scores)])] for name, scores in rows.items()]
    return markdown(["method", *columns], cells)


def percent(value: Estimate) -> str:
    return f"{100 * value.mean:.1f} ± {100 * value.error:.1f}"


def kept(scores: Scores) -> Estimate:
    """The mean over the columns that are not the task."""
    rest = [value for column, value in scores.items() if column != TASK]
    error = math.hypot(*(value.error for value in rest)) / len(rest)
    return Estimate(sum(value.mean for value in rest) / len(rest), error, sum(value.n for value in rest))


def findings(rows: dict[str, Scores]) -> str:
    """How each method differs from the first: a line each, in percentage points."""
    (_, (first, theirs), *others) = rows.items()
    lines = [
        f"{name}: learns {compare(ours[TASK], theirs[TASK])}, keeps {compare(kept(ours), kept(theirs))}"
        for name, ours in others
    ]
    return "\n".join([f"Against {first}, in points (one seed; “as much” is within two standard errors):", *lines])


def compare(ours: Estimate, theirs: Estimate) -> str:
    difference, error = ours.mean - theirs.mean, math.hypot(ours.error, theirs.error)
    word = "as much" if abs(difference) <= 2 * error else "more" if difference > 0 else "less"
    return f"{word} ({100 * difference:+.1f} ± {100 * error:.1f})"


def picture(rows: dict[str, Scores]) -> str:
    """Draw what is kept against what is learned; where, or what to install first."""
    try:
        pyplot = load_pyplot()
    except InputError as error:
        return f"No picture. {error}"
    figure, axis = pyplot.subplots(figsize=(7, 4.6), facecolor=palette.PAPER)
    for name, scores in rows.items():
        draw_point(axis, name, scores[TASK], kept(scores))
    axis.set(xlabel="learned: two-step problems solved, %", ylabel="kept: mean of the four other columns, %")
    axis.set_title(findings(rows), loc="left", fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)
    axis.margins(x=0.2, y=0.1)
    figure.tight_layout()
    figure.savefig(PICTURE, dpi=150)
    pyplot.close(figure)
    return f"Picture: {PICTURE}"


def draw_point(axis: Any, name: str, learned: Estimate, kept: Estimate) -> None:
    """A point with its standard errors, and its name beside it."""
    x, y, dx, dy = (100 * value for value in (learned.mean, kept.mean, learned.error, kept.error))
    colour = COLOURS.get(name.split(",")[0], palette.BASELINE)
    axis.errorbar(x, y, xerr=dx, yerr=dy, fmt="o", color=colour, ms=7)
    above = {"xytext": (0, 5), "textcoords": "offset points", "ha": "center"}
    axis.annotate(name, (x, y + dy), color=colour, weight="bold", **above)


def problem(trials: Sequence[Trial]) -> str:
    """The first test problem that the base gets wrong and every tuned model right, with all their answers."""
    for number, rows in enumerate(zip(*(read_rows(trial.folder / "math.jsonl") for trial in trials)), 1):
        base, *tuned = (row.fields["strict"] for row in rows)
        if all(tuned) and not base:
            said = {trial.name: row.fields["prediction"] for trial, row in zip(trials, rows)}
            lines = [f"  {name:18}{' '.join(text.split())}" for name, text in said.items()]
            first = f"Test problem {number}, the first that all but the base solve:"
            return "\n".join([first, f"  {rows[0].question}", *lines])
    return "No test problem is solved by all but the base."


if __name__ == "__main__":
    main()

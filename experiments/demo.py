"""What fine-tuning makes a small model learn, and what it makes it forget: SFT against LfU on `weights/mini`.

    make demo
    python -m experiments.demo --methods sft lfu-lora lfu-reps released-lora released-reps

Fine-tunes the miniature model on 96 two-step word problems with each method, through the same functions as the `lfu`
command, scores it on the task and on all four categories of its world, and prints one table. Its template, learning
rate, ten epochs and one micro-batch a step are this model's; α, λ and all else are the published ones.
"""

import argparse
import shutil
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import torch

from experiments.markdown import markdown
from experiments.miniature.mini import MINI, SPLITS
from lfu.cli import EvalOptions, TrainOptions, evaluate, train
from lfu.evaluation.estimates import Estimate
from lfu.methods import METHODS

OUT = Path("runs") / "demo"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["sft", "lfu-lora"])
    chosen = parser.parse_args().methods
    # Operations this small are slower when they are shared out to several threads.
    torch.set_num_threads(1)
    shutil.rmtree(OUT, ignore_errors=True)
    rows = {"base": scores(None)}
    for method in chosen:
        start = time.perf_counter()
        adapter = fine_tune(method)
        print(f"{method}: fine-tuned in {time.perf_counter() - start:.0f} s", flush=True)
        rows[method] = scores(adapter)
    print(table(rows))
    print("\nAdapters: " + ", ".join(str(OUT / method / "adapter") for method in chosen))


def fine_tune(method: str) -> Path:
    """The adapter's folder. One micro-batch per step: at this size the number of calls is what costs time."""
    options = TrainOptions(
        model=str(MINI),
        data=str(MINI / "math" / "train.jsonl"),
        out=str(OUT / method),
        method=method,
        template="question",
        epochs=10,
        learning_rate=1e-2,
        micro_batch_size=16,
    )
    with redirect_stdout(sys.stderr):
        return train(options)


def scores(adapter: Path | None) -> dict[str, Estimate]:
    """Exact match on the held-out rows of every category."""
    return {title: score(adapter, folder) for title, folder in SPLITS.items()}


def score(adapter: Path | None, folder: str) -> Estimate:
    """On one test split: the two-step problems by the rules of GSM8K, whose answers they have the form of."""
    how, name = ("gsm8k", "strict") if folder == "math" else ("exact", "exact")
    options = EvalOptions(
        model=str(MINI),
        adapter=str(adapter) if adapter else None,
        data=str(MINI / folder / "test.jsonl"),
        score=how,
        template="question",
        nll=False,
        max_new_tokens=64,
        batch_size=200,
    )
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        return evaluate(options)[name]


def table(rows: dict[str, dict[str, Estimate]]) -> str:
    """Percent exact match ± standard error."""
    cells = [
        [method, *(f"{100 * each.mean:.1f} ± {100 * each.error:.1f}" for each in results.values())]
        for method, results in rows.items()
    ]
    return markdown(["method", *next(iter(rows.values()))], cells)


if __name__ == "__main__":
    main()

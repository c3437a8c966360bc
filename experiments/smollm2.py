"""GSM8K with SmolLM2-135M-Instruct on a CPU: every run, every score, and the tables of `docs/results.md`.

    python -m experiments.smollm2 run --model SMOLLM2 --gsm8k FOLDER --wikitext FILE --out runs/smollm2
    python -m experiments.smollm2 table --out runs/smollm2

Two regimes: `full`, 480 rows for three epochs at the published settings, and `small`, 32 rows for twenty epochs at
ten times the learning rate, where SFT overfits. `run` continues where it stopped: training resumes from its last
checkpoint (or says that the run there had other settings), and each score is written as soon as it is known. Runs come
in the order of what they tell; `--only small-sft-42` does one; two of them can share a machine.

Scores: answer NLL and exact match on GSM8K's test set; NLL of WikiText-2's validation text; drift, the mean
KL(base ‖ tuned) per token on the base model's own greedy answers to 200 prompts that are not mathematics; answer NLL
under the five prompts of the paper's appendix C.4 (which has exact match: too rare with this model); and answer NLL on
training rows that no run trains on, to choose α and λ by, SFT's learning rate in the small regime, and when to stop it.
Along the way every checkpoint has test NLL on fewer rows; those of an SFT run that is stopped in time have the NLL of
the rows held back and the drift too.

Read next: `smollm2_runs.py`.
"""

import argparse
import json
import statistics
from pathlib import Path

from experiments.markdown import markdown
from experiments.seeds import difference
from experiments.smollm2_runs import REGIMES, RUNS, SEEDS, SETTINGS, Paths, Scores, mean_of, run_all
from lfu.io.files import read_json

COLUMNS = {  # of the table: head, factor, digits
    "nll": ("test NLL", 1, 3),
    "strict": ("strict %", 100, 1),
    "flexible": ("flexible %", 100, 1),
    "wikitext": ("WikiText-2 NLL", 1, 3),
    "drift": ("drift", 1, 4),
    "prompts": ("five prompts, ± over them", 1, 3),
    "held": ("held back", 1, 3),
}
ALONG = {"test NLL after step": "nll", "held back": "held", "drift": "drift"}
"""Of the list of runs: title and name of what was measured along the way; test NLL is that of the first CURVE_ROWS."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "table"])
    for name in ("model", "gsm8k", "wikitext"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=["base", *RUNS])
    parsed = parser.parse_args()
    if parsed.what == "table":
        print(table(parsed.out))
    elif None in (parsed.model, parsed.gsm8k, parsed.wikitext):
        parser.error("run needs --model, --gsm8k and --wikitext")
    else:
        run_all(Paths(parsed.model, parsed.gsm8k, parsed.wikitext, parsed.out), parsed.only)


# --- tables ----------------------------------------------------------------------------------------


def table(out: Path) -> str:
    """Per regime each setting, over its seeds, and what it differs from SFT; the way of each run; the states' sizes."""
    tables = [each for regime in REGIMES for each in (regime_table(out, regime), difference_table(out, regime))]
    return "\n\n".join(filter(None, [*tables, curves(out), size_lines(out)]))


def regime_table(out: Path, regime: str) -> str:
    """The base model and each setting."""
    runs = {"base": [measured(out / "base")]}
    runs |= {name: [measured(out / f"{regime}-{name}-{seed}") for seed in SEEDS] for name in SETTINGS}
    rows = [row_of(name, [run for run in found if run]) for name, found in runs.items() if any(found)]
    return markdown([regime, *(head for head, _, _ in COLUMNS.values()), "test NLL by seed"], rows)


def difference_table(out: Path, regime: str) -> str:
    """Each setting with several seeds, less SFT of the same seed, with 95 % intervals over the seeds; empty if none."""
    rows = []
    for name in SETTINGS:
        runs = [[measured(out / f"{regime}-{each}-{seed}") for each in (name, "sft")] for seed in SEEDS]
        pairs = [pair for pair in runs if all(pair)]
        if name != "sft" and len(pairs) > 1:
            rows.append([name, *(paired(pairs, column, *how) for column, (_, *how) in COLUMNS.items())])
    heads = [head.partition(",")[0] for head, _, _ in COLUMNS.values()]
    return markdown([f"{regime}, less SFT", *heads], rows) if rows else ""


def paired(pairs: list[list[Scores]], name: str, factor: float, digits: int) -> str:
    """The mean difference in one column, over the seeds for which both were measured."""
    values = [[run[name]["mean"] for run in pair] for pair in pairs if all(name in run for run in pair)]
    if not values:
        return ""
    ours, sft = zip(*values, strict=True)
    return difference(ours, sft, digits, factor)


def measured(folder: Path) -> Scores:
    """What is known of a run, by column; nothing before it is scored."""
    scores, held, prompts = (folder / f"{name}.json" for name in ("scores", "held", "prompts"))
    results = read_json(scores) if scores.is_file() else {}
    if results and held.is_file():
        results["held"] = read_json(held)["nll"]
    if results and prompts.is_file():
        means = [each["mean"] for each in read_json(prompts).values()]
        results["prompts"] = {"mean": statistics.mean(means), "error": statistics.pstdev(means)}
    return results


def row_of(label: str, runs: list[Scores]) -> list[str]:
    """The mean over the seeds of each column, and the test NLL of each seed."""
    cells = [cell([run[name] for run in runs if name in run], *how) for name, (_, *how) in COLUMNS.items()]
    return [label, *cells, ", ".join(f"{run['nll']['mean']:.3f}" for run in runs)]


def cell(values: list[dict[str, float]], factor: float, digits: int) -> str:
    """Means over the seeds of values and of their standard errors: the items are the same for every seed."""
    if not values:
        return ""
    means = (factor * statistics.mean(value[part] for value in values) for part in ("mean", "error"))
    return " ± ".join(f"{mean:.{digits}f}" for mean in means)


def curves(out: Path) -> str:
    """Of each run: the median norm of its gradients, and what was measured along the way."""
    lines = []
    for name in RUNS:
        ways = [f"{title} {way}" for title, kind in ALONG.items() if (way := along(out / name, kind))]
        if ways:
            log = map(json.loads, (out / name / "log.jsonl").read_text().splitlines())
            norm = statistics.median(step["gradient_norm"] for step in log)
            lines.append(f"- {name}, gradient {norm:.2g}, {'; '.join(ways)}")
    return "\n".join(lines)


def along(run: Path, kind: str) -> str:
    """One score after each step at which it was measured."""
    values = {int(path.stem.split("-")[-1]): mean_of(read_json(path)) for path in run.glob(f"{kind}-step-*.json")}
    return ", ".join(f"{step}: {value:.3f}" for step, value in sorted(values.items()))


def size_lines(out: Path) -> str:
    """The mean square of the base model's states by block, if it is known."""
    path = out / "base" / "squares.json"
    found = read_json(path) if path.is_file() else {}
    return "\n".join(
        f"- mean square, {name}: {statistics.mean(squares):.4g}; by block {', '.join(f'{s:.3g}' for s in squares)}"
        for name, squares in found.items()
    )


if __name__ == "__main__":
    main()

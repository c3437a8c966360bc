"""GSM8K with SmolLM2-135M-Instruct, on a CPU or a GPU: every run, every score, and the page docs/tables/smollm2.md.

    python -m experiments.smollm2 run --model SMOLLM2 --gsm8k FOLDER --wikitext FILE --out runs/smollm2
    python -m experiments.smollm2 gather --out runs/smollm2 --json docs/smollm2.json

Two regimes: `full`, 480 rows for three epochs at the published settings, and `small`, 32 rows for twenty epochs at
ten times the learning rate, where SFT overfits. `run` continues where it stopped: training resumes from its last
checkpoint (or says that the run there had other settings), and each score is written as soon as it is known. Runs come
in the order of what they tell; `--only small-sft-42` does one; two of them can share a machine.

Scores: answer NLL and exact match on GSM8K's test set; NLL of WikiText-2's validation text; drift, the mean
KL(base ‖ tuned) per token on the base model's own greedy answers to 200 prompts that are not mathematics; answer NLL
under the five prompts of the paper's appendix C.4 (which has exact match: too rare with this model); and answer NLL on
training rows that no run trains on, to choose α and λ by, SFT's learning rate in the small regime, and when to stop it.
Along the way every checkpoint has test NLL on fewer rows, and in four runs of SFT drift and the rows held back too;
runs that are stopped at their best step look at some of the rows held back instead (`lfu train --valid`).

Read next: `smollm2_runs.py`.
"""

import argparse
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from experiments.markdown import markdown
from experiments.seeds import bounds, written
from experiments.smollm2_runs import REGIMES, RUNS, SEEDS, SETTINGS, Paths, Scores, mean_of, run_all
from lfu.io.files import read_json, read_optional_json, write_json
from lfu.runs import read_history, read_log

COLUMNS = {  # of the tables: head, digits
    "nll": ("test NLL", 3),
    "strict": ("strict %", 1),
    "flexible": ("flexible %", 1),
    "wikitext": ("WikiText-2 NLL", 3),
    "drift": ("drift", 4),
    "prompts": ("five prompts", 3),
    "held": ("held back", 3),
}
PERCENT = ("strict", "flexible")
ALONG = {"nll": "test NLL", "held": "held back", "drift": "drift", "valid": "validation"}
"""What is measured along the way; test NLL is that of the first CURVE_ROWS, validation of the first VALID_ROWS."""
LABELS = {
    "base": "base model",
    "sft": "SFT",
    "stopped": "SFT, its best checkpoint of every 8 steps",
    "sft_stopped": "SFT, best step",
    "sft5e4_stopped": "SFT at 5e-4, best step",
    "sft4e4_stopped": "SFT at 4e-4, best step",
    "sft3e4_stopped": "SFT at 3e-4, best step",
    "sft3e4": "SFT at 3e-4",
    "sft1e4": "SFT at 1e-4",
    "lora": "LfU (LoRA) λ 5",
    "lora0.5": "LfU (LoRA) λ 0.5",
    "lora50": "LfU (LoRA) λ 50",
    "lora500": "LfU (LoRA) α 0.001 λ 500",
    "relative50": "LfU (LoRA) scale-free λ 50",
    "relative500": "LfU (LoRA) scale-free λ 500",
    "reps": "LfU (RepS) λ 0.1",
    "reps1": "LfU (RepS) λ 1",
    "reps10": "LfU (RepS) λ 10",
    "reps100": "LfU (RepS) λ 100",
    "lora_stopped": "LfU (LoRA) λ 5, best step",
    "lora0.5_stopped": "LfU (LoRA) λ 0.5, best step",
    "lora5e4_stopped": "LfU (LoRA) λ 0.5 at 5e-4, best step",
    "reps10_stopped": "LfU (RepS) λ 10, best step",
    "anchored": "Anchored, best step",
    "anchored_stopped": "Anchored to SFT's best adapter, best step",
    "distilled": "distillation from SFT, best step",
    "sft_twice": "SFT, twice the steps, best step",
    "anchored_long": "Anchored, five times the steps, best step",
    "neftune": "NEFTune",
    "gem": "GEM",
    "im": "IM",
    "rlora": "released LfU (LoRA)",
    "rreps": "released LfU (RepS)",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "gather"])
    for name in ("model", "gsm8k", "wikitext"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", help="cpu, cuda, ... (default: cuda where there is one)")
    parser.add_argument("--only", nargs="+", choices=["base", *RUNS])
    parser.add_argument("--json", type=Path, help="of gather: the file to put the numbers into")
    parsed = parser.parse_args()
    if parsed.what == "gather":
        if parsed.json is None or not parsed.out.is_dir():
            parser.error("gather needs --json, and --out with runs")
        write_json(parsed.json, merged(read_optional_json(parsed.json), gathered(parsed.out)))
    elif None in (parsed.model, parsed.gsm8k, parsed.wikitext):
        parser.error("run needs --model, --gsm8k and --wikitext")
    else:
        run_all(Paths(parsed.model, parsed.gsm8k, parsed.wikitext, parsed.out, parsed.device), parsed.only)


# --- from run folders to data ----------------------------------------------------------------------


def gathered(out: Path) -> dict[str, Any]:
    """Per regime the scores of each setting; the curves of each run; the sizes of the base model's states."""
    curves = {name: curve for name in RUNS if (curve := curve_of(out / name))}
    sizes = read_optional_json(out / "base" / "squares.json")
    squares = {name: {"mean": statistics.mean(each), "by_block": each} for name, each in sizes.items()}
    return {regime: settings_of(out, regime) for regime in REGIMES} | {"curves": curves, "mean_squares": squares}


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Both; where both know a setting or a run, the new one."""
    return old | {part: old.get(part, {}) | known for part, known in new.items()}


def settings_of(out: Path, regime: str) -> dict[str, Any]:
    """The base model, each setting that has a run, and its difference from SFT, at its best step where this one is."""
    base = measured(out / "base")
    settings: dict[str, Any] = {"base": {name: base[name] for name in COLUMNS if name in base}} if base else {}
    runs = {}
    for name in SETTINGS:
        each = {seed: measured(out / f"{regime}-{name}-{seed}") for seed in SEEDS}
        if known := {seed: scores for seed, scores in each.items() if scores}:
            runs[name], settings[name] = known, over_seeds(known)
    for name in runs:
        sft = "sft_stopped" if SETTINGS[name].get("valid") else "sft"
        if name != sft and (less := less_sft(runs[name], runs.get(sft, {}))):
            settings[name]["minus_sft"] = less
    return settings


def over_seeds(runs: dict[int, Scores]) -> dict[str, Any]:
    """By column: the mean of the values, and of their standard errors, as the items are the same for every seed."""
    found: dict[str, Any] = {}
    for name in COLUMNS:
        if values := {str(seed): run[name] for seed, run in runs.items() if name in run}:
            means = {part: statistics.mean(each[part] for each in values.values()) for part in ("mean", "error")}
            found[name] = means | {"by_seed": {seed: each["mean"] for seed, each in values.items()}}
    return found


def less_sft(ours: dict[int, Scores], sft: dict[int, Scores]) -> dict[str, Any]:
    """By column: the mean difference, and its 95 % interval over the seeds that both have, if they are two at least."""
    pairs = [(ours[seed], sft[seed]) for seed in ours if seed in sft]
    found = {}
    for name in COLUMNS if len(pairs) > 1 else ():
        if values := [our[name]["mean"] - their[name]["mean"] for our, their in pairs if name in our and name in their]:
            found[name] = dict(zip(("mean", "low", "high"), bounds(values)))
    return found


def measured(folder: Path) -> Scores:
    """What is known of a run, by column; nothing before it is scored."""
    scores, held, prompts = (folder / f"{name}.json" for name in ("scores", "held", "prompts"))
    results = read_json(scores) if scores.is_file() else {}
    for name in results.keys() & PERCENT:
        results[name] = {part: 100 * results[name][part] for part in ("mean", "error")}
    if results and held.is_file():
        results["held"] = read_json(held)["nll"]
    if results and prompts.is_file():
        means = [each["mean"] for each in read_json(prompts).values()]
        results["prompts"] = {"mean": statistics.mean(means), "error": statistics.pstdev(means)}
    return results


def curve_of(run: Path) -> dict[str, Any]:
    """What was measured along the way, by step, and the median norm of the gradients."""
    log = read_log(run / "log.jsonl")
    found = {kind: values for kind in ALONG if (values := along(run, kind))}
    if seen := read_history(run / "log.jsonl"):
        found["valid"] = {str(step): value for step, value in seen}
    norms = [line["gradient_norm"] for line in log if line["step"] > 0]
    return {"gradient": statistics.median(norms)} | found if found else {}


def along(run: Path, kind: str) -> dict[str, float]:
    """One score after each step at which it was measured."""
    values = {int(path.stem.split("-")[-1]): mean_of(read_json(path)) for path in run.glob(f"{kind}-step-*.json")}
    return {str(step): values[step] for step in sorted(values)}


# --- from data to a page ---------------------------------------------------------------------------


def page(data: dict[str, Any]) -> str:
    """Per regime each setting, what it differs from SFT, and each run along the way; the sizes of the states."""
    parts = []
    for regime in REGIMES:
        title = f"## The {regime} regime"
        parts += [title, regime_table(data[regime]), f"{title}, less SFT", difference_table(data[regime])]
        parts += [f"{title}, along the way", curve_table(data["curves"], regime)]
    sizes = [[name, f"{each['mean']:.4g}", blocks(each["by_block"])] for name, each in data["mean_squares"].items()]
    return (
        "\n\n".join([*parts, "## Size of the states", markdown(["positions", "mean square", "by block"], sizes)]) + "\n"
    )


def labelled(settings: Iterable[str]) -> dict[str, str]:
    """These settings and their labels, in the order of the labels."""
    return {name: label for name, label in LABELS.items() if name in settings}


def regime_table(settings: dict[str, Any]) -> str:
    """A row for each setting: its columns, and the test NLL of each seed."""
    rows = []
    for name, label in labelled(settings).items():
        known = settings[name]
        cells = [cell(known[column], digits) if column in known else "" for column, (_, digits) in COLUMNS.items()]
        rows.append([label, *cells, ", ".join(f"{value:.3f}" for value in known["nll"].get("by_seed", {}).values())])
    return markdown(["setting", *(head for head, _ in COLUMNS.values()), "test NLL by seed"], rows)


def cell(value: dict[str, float], digits: int) -> str:
    return " ± ".join(f"{value[part]:.{digits}f}" for part in ("mean", "error"))


def difference_table(settings: dict[str, Any]) -> str:
    """A row for each setting with several seeds."""
    rows = []
    for name, label in labelled(settings).items():
        if less := settings[name].get("minus_sft"):
            cells = [
                written([*less[column].values()], n) if column in less else "" for column, (_, n) in COLUMNS.items()
            ]
            rows.append([label, *cells])
    return markdown(["setting", *(head for head, _ in COLUMNS.values())], rows)


def curve_table(curves: dict[str, Any], regime: str) -> str:
    """A row for each run and what was measured on its way, a column for each step."""
    runs = {name: curve for name, curve in curves.items() if name.startswith(f"{regime}-")}
    steps = sorted({step for curve in runs.values() for step in shown_steps(curve)}, key=int)
    rows = []
    for name, label in LABELS.items():
        for run in (f"{regime}-{name}-{seed}" for seed in SEEDS):
            ways = [kind for kind in ALONG if kind in runs.get(run, {})]
            rows += [curve_row(f"{label}, seed {run[-2:]}", runs[run], kind, steps) for kind in ways]
    return markdown(["run", "gradient", "measured", *(f"step {step}" for step in steps)], rows)


def shown_steps(curve: dict[str, Any]) -> set[str]:
    """Where something was scored, and where validation began and ended: it is looked at too often for a table."""
    valid = list(curve.get("valid", {}))
    return {*valid[:1], *valid[-1:], *(step for way in ALONG if way != "valid" for step in curve.get(way, {}))}


def curve_row(label: str, curve: dict[str, Any], kind: str, steps: list[str]) -> list[str]:
    """One measurement of a run."""
    values = [f"{curve[kind][step]:.3f}" if step in curve[kind] else "" for step in steps]
    return [label, f"{curve['gradient']:.2g}", ALONG[kind], *values]


def blocks(squares: list[float] | dict[str, float]) -> str:
    """The mean square of the states of each block, or of those that are known."""
    known = squares.items() if isinstance(squares, dict) else enumerate(squares, 1)
    return ", ".join(f"{name}: {square:.3g}" for name, square in known)


if __name__ == "__main__":
    main()

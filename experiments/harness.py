"""GSM8K as lm-evaluation-harness scores it and as `lfu eval` does, item by item, on a model of any size.

    python -m experiments.harness --model FOLDER --gsm8k test.jsonl --rows 50

The harness' own task, zero-shot, over rows of a file, in float32; the folder is read as it is by both, so one written
by `lfu merge` shows that such folders need nothing more. Prints both scores, and every answer or verdict that differs
with the margin by which the first different token was chosen: what rounding can explain hangs by less than MARGIN.
The tests make the same comparison on small models, and of every other score (`tests/test_harness.py`).
"""

import argparse
import json
import math
import tempfile
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from lfu import cli
from lfu.cli import EvalOptions
from lfu.data.rows import Row
from lfu.data.tokens import ModelTokenizer, load_tokenizer
from lfu.evaluation import generative as evaluate
from lfu.evaluation.estimates import Estimate
from lfu.generate import generate
from lfu.model import forward, load

MARGIN = 1e-4
"""Nats, or logits."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--gsm8k", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=50)
    parsed = parser.parse_args()
    rows = read_lines(parsed.gsm8k)[: parsed.rows]
    with tempfile.TemporaryDirectory() as work, redirect_stdout(StringIO()):
        theirs, mine = gsm8k(parsed.model, rows, Path(work))
        found = answer_differences(parsed.model, mine.samples, theirs.samples)
    print(f"{parsed.model}, the first {len(rows)} rows of {parsed.gsm8k}, zero-shot, float32")
    for filter, name in FILTERS.items():
        print(f"{name}: harness {theirs.scores[f'exact_match,{filter}'].mean:.4f}, lfu {mine.scores[name].mean:.4f}")
    print(f"{len(found)} differences, {sum(each.size > MARGIN for each in found)} of them by more than {MARGIN:g}")
    for each in found:
        print(f"row {each.row}: another {each.what}, by a margin of {each.size:.2g}")


FILTERS = {"strict-match": "strict", "flexible-extract": "flexible"}
"""The harness' names of the two scores, and ours."""


class Outcome(NamedTuple):
    samples: list[dict[str, Any]]  # of each row, in order; of each filter in turn
    scores: dict[str, Estimate]


def gsm8k(folder: Path, rows: list[Any], work: Path) -> tuple[Outcome, Outcome]:
    """Theirs and ours."""
    theirs = harness(folder, packaged("gsm8k/gsm8k.yaml"), rows, work)
    return theirs, ours(folder, "gsm8k", rows, work, prompt="harness", nll=False)


def packaged(path: str) -> dict[str, Any]:
    """A task that comes with the harness."""
    import lm_eval

    return {"include": str(Path(lm_eval.__file__).parent / "tasks" / path)}


def harness(folder: Path, task: dict[str, Any], rows: list[Any], work: Path, longest: int | None = None) -> Outcome:
    """Run one task over rows of ours, in float32."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    data = write_rows(work / "rows.jsonl", rows)
    source = {"data_files": {"test": str(data)}, "cache_dir": str(work / "cache")}
    splits = {"training_split": None, "validation_split": None, "fewshot_split": None, "test_split": "test"}
    named = task | {"task": "ours", "dataset_path": "json", "dataset_name": None, "dataset_kwargs": source, **splits}
    (work / "tasks").mkdir()
    (work / "tasks" / "ours.yaml").write_text(json.dumps(named | {"num_fewshot": 0}))
    loaded = TaskManager(include_path=str(work / "tasks"), include_defaults=False).load(["ours"])
    model = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=8, max_length=longest)
    # Errors of means are computed; those of perplexities would be drawn at random.
    means = task.get("output_type") == "multiple_choice"
    results = evaluate(model, loaded, bootstrap_iters=int(means))
    samples = sorted(results["samples"]["ours"], key=lambda sample: (sample["filter"], sample["doc_id"]))
    scores = {
        key.removesuffix(",none"): Estimate(value, results["results"]["ours"][key.replace(",", "_stderr,")], len(rows))
        for key, value in results["results"]["ours"].items()
        if "," in key and "_stderr," not in key
    }
    return Outcome(samples, scores)


def ours(folder: Path, score: str, rows: list[Any], work: Path, **options: Any) -> Outcome:
    """The same through `lfu eval`."""
    out = work / f"out-{len(list(work.iterdir()))}.jsonl"
    data = write_rows(work / "ours.jsonl", rows)
    options |= {"device": "cpu", "dtype": "float32", "score": score}
    scores = cli.evaluate(EvalOptions(model=str(folder), data=str(data), out=str(out), **options))
    records = read_lines(out)
    return Outcome(sorted(records, key=lambda record: record["row"]), scores)


def read_lines(path: Path) -> list[Any]:
    """A JSONL file, whose lines end with a newline and with nothing else that Unicode calls the end of a line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# --- what differs ---------------------------------------------------------------------------------


class Difference(NamedTuple):
    """Between the two for one row."""

    row: int
    what: str
    size: float
    """Of a number: relative to it, if it is larger than 1. Of an answer or a verdict: the margin by which ours was
    made, infinite where it is not known."""


def answer_differences(folder: Path, mine: list[dict[str, Any]], foreign: list[dict[str, Any]]) -> list[Difference]:
    """Every answer, and of equal answers every verdict, that is not the same."""
    found = []
    by_filter = [[sample for sample in foreign if sample["filter"] == filter] for filter in FILTERS]
    for record, *samples in zip(mine, *by_filter, strict=True):
        text = samples[0]["resps"][0][0]
        if record["prediction"] != text:
            found.append(Difference(record["row"], "answer", parted(folder, record["question"], text)))
            continue
        verdicts = {name: sample["exact_match"] for name, sample in zip(FILTERS.values(), samples)}
        other = [name for name, verdict in verdicts.items() if record[name] != verdict]
        found += [Difference(record["row"], f"verdict {name}", math.inf) for name in other]
    return found


def parted(folder: Path, question: str, text: str) -> float:
    """By how much the first token of our answer that is not in `text` was preferred to the second best."""
    config, base = load(folder)
    tokenizer = load_tokenizer(folder, config.vocab_size)
    prompt = evaluate.harness_prompt(tokenizer, Row(1, question, "", {}), [])
    ((_, answer),) = generate(config, base, tokenizer, [prompt], stop=evaluate.HARNESS_STOPS)
    tokens = [*answer.tokens, tokenizer.eos]
    common = next(
        n for n in range(len(tokens)) if n == len(answer.tokens) or not starts(tokenizer, tokens[: n + 1], text)
    )
    logits, _ = forward(config, base, torch.tensor([[*prompt, *tokens[:common]]]))
    return lead(logits[0, -1].numpy())


def starts(tokenizer: ModelTokenizer, tokens: list[int], text: str) -> bool:
    """Whether the tokens are the beginning of this text, up to a character that is not complete yet."""
    return text.startswith(tokenizer.backend.decode(tokens).rstrip("\ufffd"))


def lead(values: np.ndarray) -> float:
    """Of the largest over the second."""
    second, best = np.sort(values)[-2:]
    return float(best - second)


if __name__ == "__main__":
    main()

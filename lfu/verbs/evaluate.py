"""`lfu eval`: scores of generated answers, of reference answers, and by likelihood. Read next: `generate.py`."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lfu import InputError, checkpoint
from lfu import evaluate as evaluating
from lfu import generate as generating
from lfu import likelihood as likelihoods
from lfu.data import TEMPLATES, Example, Format, Row, encode_row, prompt_ids, read_rows
from lfu.evaluate import Estimate
from lfu.layouts import LAYOUTS, layout_named
from lfu.verbs.shared import Speaker, SpeakerOptions, option, require_counts, speaker


@dataclass(frozen=True, kw_only=True)
class EvalOptions(SpeakerOptions):
    data: str = option("JSONL file of questions and reference answers, of choices, or of texts")
    out: str | None = option("JSONL file for the predictions, written as they come; must not exist", None)
    score: str = option(
        "of generated answers, gsm8k: strict and flexible; exact: equal text; f1: words in common; refusal: how many "
        "are none. By likelihood, choices: acc and acc_norm; mc2: share of the true ones; last-word; perplexity",
        "gsm8k",
        choices=[*evaluating.SCORES, *likelihoods.SCORES],
    )
    prompt: str = option(
        "own: the adapter's template; harness: lm-evaluation-harness', which is gsm8k's for generated answers and the "
        "bare question column for choices and mc2",
        "own",
        choices=["own", "harness"],
    )
    shots: int = option("worked examples in the harness prompt", 0)
    shots_data: str | None = option("JSONL file to draw the worked examples from", None)
    seed: int = option("seed of the worked examples", 42)
    generate: bool = option("generate answers and score them", True)
    nll: bool | None = option(
        "measure the likelihood of the reference answers, in the template (default: with gsm8k and exact)", None
    )
    max_new_tokens: int = option("longest answer, in tokens", 256)
    max_length: int | None = option(
        "how many tokens are seen at once, in scores by likelihood (default: as many as the model was made for)", None
    )
    batch_size: int = option("rows at a time", 32)
    limit: int | None = option("use only the first rows of the file", None)
    layout: str = option("what the rows of the data look like: see lfu/layouts.py", "columns", choices=list(LAYOUTS))
    question: str = option("name of the question column", "question")
    answer: str = option("name of the answer column: a text, of f1 also texts, of choices the index from 0", "answer")


def evaluate(options: EvalOptions) -> dict[str, Estimate]:
    """Score a model or an adapter; prints and returns each score with its standard error and n."""
    require_consistent(options)
    results = by_likelihood(options) if options.score in likelihoods.SCORES else by_answers(options)
    print(f"{options.data}, model {options.model}, adapter {options.adapter or 'none'}")
    for name, (value, how) in results.items():
        print(f"  {described(name, value, how)}")
    return {name: value for name, (value, _) in results.items()}


def answer_alone(example: Example) -> Example:
    """The same tokens without loss on the instruction: what is measured is the answer, whatever was trained on."""
    return example._replace(instruction=range(0))


def require_consistent(options: EvalOptions) -> None:
    """InputError for options that cannot be used, or would be without effect."""
    require_counts(options, "batch_size", "max_new_tokens", "max_length", "limit")
    require_counts(options, "shots", least=0)
    require_effect(options)
    if not options.generate and options.nll is False:
        raise InputError("--no-generate and --no-nll together leave nothing to do.")
    if options.out is not None and not options.generate:
        raise InputError("--out is for predictions; with --no-generate there are none.")
    if options.out is not None and Path(options.out).exists():
        raise InputError(f"{options.out} exists already; predictions are never overwritten. Choose another --out.")
    if options.prompt != "harness" and (options.shots or options.shots_data):
        raise InputError("Worked examples belong to the harness prompt: add --prompt harness.")
    if options.prompt == "harness" and options.template and options.score in likelihoods.SCORES:
        raise InputError("The harness prompt is the question as it stands: leave out --template or --prompt harness.")
    if options.shots_data and not options.shots:
        raise InputError("--shots-data is without effect as long as --shots is 0: say how many.")
    if options.prompt == "harness" and not options.generate and options.score not in likelihoods.SCORES:
        raise InputError("--prompt harness is for generated answers; with --no-generate there are none.")
    if options.shots and options.shots_data is None:
        raise InputError(
            "Worked examples need a file to be drawn from: give --shots-data, such as GSM8K's train.jsonl."
        )


def require_effect(options: EvalOptions) -> None:
    """InputError for an option that the score does not look at."""
    score, likely = options.score, likelihoods.SCORES.get(options.score)
    idle = [] if score in evaluating.WITH_REFERENCES else ["nll", "generate", "layout"]
    idle += ["shots", "shots_data", "seed", "max_new_tokens"] if likely else ["max_length"]
    idle += ["question", "template", "prompt"] if likely and not likely.asks else []
    idle += ["answer"] if score in ("refusal", "mc2", "last-word", "perplexity") else []
    given = [each.name for each in fields(options) if getattr(options, each.name) != each.default]
    if without := [name for name in given if name in idle]:
        raise InputError(f"The score {score} has no use for {' or '.join(without)}.")


Described = dict[str, tuple[Estimate, str]]
"""Scores, and how each was asked for."""


def by_answers(options: EvalOptions) -> Described:
    """Generate answers and score them; and the likelihood of the reference answers."""
    layout = layout_named(options.layout, options.question, options.answer)
    columns = {"question": options.question, "answer": options.answer}
    rows = evaluating.read_questions(options.data, options.score, layout, **columns)[: options.limit]
    if options.generate and options.score == "gsm8k":
        evaluating.require_numbers(options.data, rows)
    pool = read_rows(options.shots_data, layout) if options.shots_data else []
    if options.shots and options.shots >= len(pool):
        raise InputError(f"{options.shots_data} has {len(pool)} rows, too few for {options.shots} worked examples.")
    who = speaker(options)
    own, results = in_words(who.format), {}
    if options.nll is not False and options.score in evaluating.WITH_REFERENCES:
        examples = [answer_alone(encode_row(who.codec, who.format, row)) for row in rows]
        nll = evaluating.answer_nll(who.config, who.base, examples, who.adapters, batch_size=options.batch_size)
        results["nll"] = nll, own
    if options.generate:
        hits = predict(options, who, rows, pool)
        asked = f"harness prompt, {options.shots}-shot" if options.prompt == "harness" else own
        how = f"{asked}, greedy, at most {options.max_new_tokens} new tokens"
        results |= {name: (evaluating.accuracy([hit[name] for hit in hits]), how) for name in hits[0]}
    return results


def predict(options: EvalOptions, who: Speaker, rows: list[Row], pool: list[Row]) -> list[dict[str, float]]:
    """Generate and score every row; each prediction is written as soon as its batch is done."""
    if options.prompt == "harness":
        shots = [evaluating.draw_shots(pool, options.shots, options.seed, row) for row in rows]
        prompts = [
            evaluating.harness_prompt(who.codec, row, drawn, bos=who.format.bos) for row, drawn in zip(rows, shots)
        ]
        stop = evaluating.HARNESS_STOPS
    else:
        prompts = [prompt_ids(who.codec, who.format, row.question) for row in rows]
        stop = TEMPLATES[who.format.template].stops
    answers = generating.generate(
        who.config, who.base, who.codec, prompts, who.adapters,
        max_new_tokens=options.max_new_tokens, stop=stop, batch_size=options.batch_size,
    )  # fmt: skip
    score, hits = evaluating.SCORES[options.score], [{} for _ in rows]
    with predictions(options) as write:
        for index, completion in tqdm(answers, total=len(rows), unit="row"):
            row = rows[index]
            gold = row.answer if options.score in evaluating.WITH_REFERENCES else row.fields.get(options.answer)
            hits[index] = score(completion.text, gold)
            found = {"prediction": completion.text, "finished": completion.finished}
            write(row, found | hits[index])
    return hits


def by_likelihood(options: EvalOptions) -> Described:
    """The score by likelihood; each record is written as soon as its batch is done."""
    score = likelihoods.SCORES[options.score]
    columns = {"question": options.question, "answer": options.answer}
    items = likelihoods.read_items(options.data, options.score, **columns)[: options.limit]
    folder = checkpoint.local_folder(options.model)
    who = speaker(options)
    length = options.max_length or likelihoods.longest_context(folder)
    own = score.asks and options.prompt == "own"
    asking = likelihoods.Asking(who.codec, who.format, own, likelihoods.prefix_id(folder, who.codec), length)
    examples, cut = likelihoods.encode(options.data, options.score, asking, items)
    if cut:
        print(f"{cut} contexts are too long for {length} tokens at once and lose their beginning.")
    found = likelihoods.likelihoods(who.config, who.base, examples, who.adapters, batch_size=options.batch_size)
    records: list[dict[str, Any]] = [{} for _ in items]
    with predictions(options) as write:
        for index, each in tqdm(found, total=len(items), unit="row"):
            records[index] = score.record(items[index], each)
            write(items[index].row, records[index])
    asked = in_words(who.format) if own else f"as plain text, {'with' if who.format.bos else 'without'} BOS"
    how = f"{asked}, at most {length} tokens at once"
    return {name: (value, how) for name, value in score.estimates(records).items()}


@contextmanager
def predictions(options: EvalOptions) -> Iterator[Callable[[Row, dict[str, Any]], None]]:
    """A function that adds a row and what was found for it to --out, at once; without --out it does nothing."""
    if options.out:
        Path(options.out).absolute().parent.mkdir(parents=True, exist_ok=True)
    with open(options.out, "x", encoding="utf-8") if options.out else nullcontext() as file:

        def write(row: Row, found: dict[str, Any]) -> None:
            if file:
                file.write(json.dumps(row.fields | {"row": row.number} | found, ensure_ascii=False) + "\n")
                file.flush()

        yield write


def in_words(form: Format) -> str:
    return f"template {form.template}, {'with' if form.bos else 'without'} BOS"


def described(name: str, value: Estimate, how: str) -> str:
    """A score with its standard error, its n, and how it was asked for; in percent where it is a share."""
    mean, error, n = value
    if name == "nll":
        return f"nll: {mean:.4f} ± {error:.4f} nats per answer token (n = {n} tokens; {how})"
    if name.endswith(("perplexity", "bits_per_byte")):
        return f"{name}: {mean:.4f} ± {error:.4f} (n = {n}; {how})"
    return f"{name}: {100 * mean:.2f} % ± {100 * error:.2f} (n = {n}; {how})"

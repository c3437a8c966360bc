"""`lfu eval`: scores of generated answers, of reference answers, and by likelihood. Read next: `generate.py`."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lfu import generate as generating
from lfu.cli.options import (
    InferenceOptions,
    PromptSetup,
    RowsOptions,
    check_writable,
    encode_question,
    load_model,
    load_prompt_setup,
    option,
    require_counts,
)
from lfu.data.batches import Example
from lfu.data.rows import Row, read_rows
from lfu.data.tokens import TEMPLATES, encode_row
from lfu.errors import InputError, option_name
from lfu.evaluation import generative as evaluating
from lfu.evaluation import loglikelihood as likelihoods
from lfu.evaluation.estimates import Estimate, accuracy
from lfu.evaluation.nll import answer_nll


@dataclass(frozen=True, kw_only=True)
class EvalOptions(RowsOptions, InferenceOptions):
    data: str = option("JSONL file of questions and reference answers, of choices, or of texts")
    answer: str = option("name of the answer column: a text, of f1 also texts, of choices the index from 0", "answer")
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


def evaluate(options: EvalOptions) -> dict[str, Estimate]:
    """Score a model or an adapter; prints each score as soon as it is known, with its standard error and n."""
    require_consistent(options)
    results: dict[str, Estimate] = {}
    for name, value, how in by_likelihood(options) if options.score in likelihoods.SCORES else by_answers(options):
        if not results:
            print(f"{options.data}, model {options.model}, adapter {options.adapter or 'none'}")
        print(f"  {format_score(name, value, how)}", flush=True)
        results[name] = value
    return results


def answer_alone(example: Example) -> Example:
    """The same tokens without loss on the instruction: what is measured is the answer, whatever was trained on."""
    return example._replace(instruction=range(0))


def require_consistent(options: EvalOptions) -> None:
    """InputError for options that cannot be used, or would be without effect."""
    require_counts(options, "batch_size", "max_new_tokens", "max_length", "limit")
    require_counts(options, "shots", "seed", least=0)
    require_effect(options)
    harness, out = options.prompt == "harness", options.out
    written = options.score in evaluating.WITH_REFERENCES  # the template is looked at, for the likelihood of answers
    refusals = {
        "--no-generate and --no-nll together leave nothing to do.": not options.generate and options.nll is False,
        "--out is for predictions; with --no-generate there are none.": out is not None and not options.generate,
        f"{out} exists already; predictions are never overwritten. Choose another --out.": (
            out is not None and Path(out).exists()
        ),
        "Worked examples belong to the harness prompt: add --prompt harness.": (
            not harness and (options.shots or options.shots_data)
        ),
        "The harness prompt is the question as it stands: leave out --template or --prompt harness.": (
            harness and options.template and (options.nll is False or not written)
        ),
        "--shots-data and --seed are without effect as long as --shots is 0: say how many.": (
            not options.shots and (options.shots_data or options.seed != EvalOptions.seed)
        ),
        "--prompt harness is for generated answers; with --no-generate there are none.": (
            harness and not options.generate and options.score in evaluating.SCORES
        ),
        "Worked examples need a file to be drawn from: give --shots-data, such as GSM8K's train.jsonl.": (
            options.shots and options.shots_data is None
        ),
    }
    for sentence, applies in refusals.items():
        if applies:
            raise InputError(sentence)
    if out is not None:
        check_writable(out)


def require_effect(options: EvalOptions) -> None:
    """InputError for an option that the score does not look at."""
    score, likely = options.score, likelihoods.SCORES.get(options.score)
    unused = [] if score in evaluating.WITH_REFERENCES else ["nll", "generate", "layout"]
    unused += ["shots", "shots_data", "seed", "max_new_tokens"] if likely else ["max_length"]
    unused += ["question", "template", "prompt"] if likely and not likely.asks else []
    unused += ["answer"] if score in ("refusal", "mc2", "last-word", "perplexity") else []
    given = [each.name for each in fields(options) if getattr(options, each.name) != each.default]
    if without := [option_name(name) for name in given if name in unused]:
        raise InputError(f"The score {score} has no use for {' or '.join(without)}.")


Described = tuple[str, Estimate, str]
"""A score's name, the score, and how it was asked for."""


def by_answers(options: EvalOptions) -> Iterator[Described]:
    """The likelihood of the reference answers; then generated answers, scored."""
    columns = {"question": options.question, "answer": options.answer}
    rows = evaluating.read_questions(options.data, options.score, options.reader(), **columns)[: options.limit]
    if options.generate and options.score == "gsm8k":
        evaluating.require_numbers(options.data, rows)
    setup = load_prompt_setup(options)
    measured = rows if options.nll is not False and options.score in evaluating.WITH_REFERENCES else []
    examples = [answer_alone(encode_row(setup.tokenizer, setup.format, row)) for row in measured]
    prompts, stop = build_prompts(options, setup, rows) if options.generate else ([], ())
    loaded = load_model(options, setup)
    if examples:
        nll = answer_nll(loaded.config, loaded.base, examples, loaded.adapters, batch_size=options.batch_size)
        yield "nll", nll, describe_prompt(setup)
    if options.generate:
        answers = generating.generate(
            loaded.config, loaded.base, setup.tokenizer, prompts, loaded.adapters,
            max_new_tokens=options.max_new_tokens, stop=stop, batch_size=options.batch_size,
        )  # fmt: skip
        hits = score_answers(options, rows, answers)
        how = f"harness prompt, {options.shots}-shot" if options.prompt == "harness" else describe_prompt(setup)
        how += f", greedy, at most {options.max_new_tokens} new tokens"
        yield from ((name, accuracy([hit[name] for hit in hits]), how) for name in hits[0])


def build_prompts(options: EvalOptions, setup: PromptSetup, rows: list[Row]) -> tuple[list[list[int]], Sequence[str]]:
    """The prompts, and the strings that end an answer."""
    tokenizer, form = setup.tokenizer, setup.format
    if options.prompt == "own":
        prompts = [encode_question(setup, row.question, f"{options.data}, line {row.number}") for row in rows]
        return prompts, TEMPLATES[form.template].stops
    pool = read_rows(options.shots_data, options.reader()) if options.shots_data else []
    shots = [evaluating.draw_shots(pool, options.shots, options.seed, row) for row in rows]
    prompts = [evaluating.harness_prompt(tokenizer, row, drawn, bos=form.bos) for row, drawn in zip(rows, shots)]
    return prompts, evaluating.HARNESS_STOPS


def score_answers(
    options: EvalOptions, rows: list[Row], answers: Iterator[tuple[int, generating.Completion]]
) -> list[Mapping[str, float]]:
    """The scores of every row; each prediction is written as soon as its batch is done."""
    score = evaluating.SCORES[options.score]
    hits: list[Mapping[str, float]] = [{} for _ in rows]
    with predictions(options) as write:
        for index, completion in tqdm(answers, total=len(rows), unit="row"):
            row = rows[index]
            gold = row.answer if options.score in evaluating.WITH_REFERENCES else row.fields.get(options.answer)
            hits[index] = score(completion.text, gold)
            found = {"prediction": completion.text, "finished": completion.finished}
            write(row, found | hits[index])
    return hits


def by_likelihood(options: EvalOptions) -> Iterator[Described]:
    """The score by likelihood; each record is written as soon as its batch is done."""
    score = likelihoods.SCORES[options.score]
    columns = {"question": options.question, "answer": options.answer}
    items = likelihoods.read_items(options.data, options.score, **columns)[: options.limit]
    setup = load_prompt_setup(options)
    folder, _, tokenizer, form = setup
    length = options.max_length or likelihoods.longest_context(folder)
    use_template = score.asks and options.prompt == "own"
    encoding = likelihoods.EncodingOptions(
        tokenizer, form, use_template, likelihoods.prefix_id(folder, tokenizer), length
    )
    examples, cut = likelihoods.encode(options.data, options.score, encoding, items)
    if cut:
        print(f"{cut} contexts are too long for {length} tokens at once and lose their beginning.")
    loaded = load_model(options, setup)
    found = likelihoods.likelihoods(
        loaded.config, loaded.base, examples, loaded.adapters, batch_size=options.batch_size
    )
    records: list[dict[str, Any]] = [{} for _ in items]
    with predictions(options) as write:
        for index, each in tqdm(found, total=len(items), unit="row"):
            records[index] = score.record(items[index], each)
            write(items[index].row, records[index])
    how = f"{describe_prompt(setup, use_template)}, at most {length} tokens at once"
    yield from ((name, value, how) for name, value in score.estimates(records).items())


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


def describe_prompt(setup: PromptSetup, in_template: bool = True) -> str:
    """How a prompt begins."""
    shape = f"template {setup.format.template}" if in_template else "as plain text"
    return f"{shape}, {'with' if setup.format.bos and setup.tokenizer.bos else 'without'} BOS"


def format_score(name: str, value: Estimate, how: str) -> str:
    """A score with its standard error, its n, and how it was asked for; in percent where it is a share."""
    mean, error, n = value
    if name == "nll":
        return f"nll: {mean:.4f} ± {error:.4f} nats per answer token (n = {n} tokens; {how})"
    if name.endswith(("perplexity", "bits_per_byte")):
        return f"{name}: {mean:.4f} ± {error:.4f} (n = {n}; {how})"
    return f"{name}: {100 * mean:.2f} % ± {100 * error:.2f} (n = {n}; {how})"

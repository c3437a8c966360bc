"""`lfu eval`: scores of generated answers, of reference answers, and by likelihood. Read next: `generate.py`."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lfu import generate as generating
from lfu.checkpoints import describe_changes
from lfu.cli.options import (
    InferenceOptions,
    PromptSetup,
    RowsOptions,
    StrPath,
    check_writable,
    describe_positions,
    encode_question,
    load_model,
    load_prompt_setup,
    note_template,
    option,
    require_counts,
)
from lfu.data.batches import Example
from lfu.data.chat import CHAT
from lfu.data.rows import Row, complete_lines, json_line, json_object, read_rows, require_column, with_line_number
from lfu.data.tokens import describe_tokens, encode_row, stop_strings
from lfu.errors import InputError, option_name
from lfu.evaluation import generative as evaluating
from lfu.evaluation import loglikelihood as likelihoods
from lfu.evaluation.estimates import Estimate, accuracy
from lfu.evaluation.nll import Likelihood, answer_nll
from lfu.io.files import named, read_json, sha256, write_json, write_text
from lfu.io.huggingface import fingerprint


@dataclass(frozen=True, kw_only=True)
class EvalOptions(RowsOptions, InferenceOptions):
    data: StrPath = option("JSONL file of questions and reference answers, of choices, or of texts")
    answer: str = option("name of the answer column: a text, of f1 also texts, of choices the index from 0", "answer")
    out: StrPath | None = option(
        "JSONL file for the predictions, written as they come; the same command continues one that was cut off", None
    )
    score: str = option(
        "of generated answers, gsm8k: strict and flexible; exact: equal text; f1: words in common; refusal: how many "
        "are none. By likelihood, choices: acc and acc_norm; mc2: share of the true ones; last-word; perplexity",
        "gsm8k",
        choices=[*evaluating.SCORES, *likelihoods.SCORES],
    )
    prompt: str = option(
        "own: the template; harness: lm-evaluation-harness', which is gsm8k's for generated answers and the "
        "bare question column for choices and mc2",
        "own",
        choices=["own", "harness"],
    )
    shots: int = option("worked examples in the harness prompt", 0)
    shots_data: StrPath | None = option("JSONL file to draw the worked examples from", None)
    seed: int = option("seed of the worked examples", 42)
    drop: bool = option("leave out rows that cannot be asked or compared, instead of stopping", False)
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
            out is not None and Path(out).exists() and not unfinished(out).is_file()
        ),
        "Worked examples belong to the harness prompt: add --prompt harness.": (
            not harness and (options.shots or options.shots_data)
        ),
        "The harness prompt is the question as it stands: leave out --template or --prompt harness.": (
            harness and (options.template or options.system is not None) and (options.nll is False or not written)
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
    if out is not None and not Path(out).exists():
        check_writable(out)


def require_effect(options: EvalOptions) -> None:
    """InputError for an option that the score does not look at."""
    score, likely = options.score, likelihoods.SCORES.get(options.score)
    unused = [] if score in evaluating.WITH_REFERENCES else ["nll", "generate", "layout"]
    unused += ["shots", "shots_data", "seed", "max_new_tokens", "drop"] if likely else ["max_length"]
    unused += ["question", "template", "system", "prompt"] if likely and not likely.asks else []
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
    names = [*evaluating.SCORES[options.score]("", "")]
    require_free_columns(options, rows, ["prediction", "finished", *names])
    setup = load_prompt_setup(options)
    if measures_likelihood(options) or options.prompt == "own":
        note_template(options.model, setup.folder, setup.said, setup.format.template)
    rows = usable_rows(options, setup, rows)
    done = read_unfinished(options, setup)
    asked = [row for row in rows if row.number not in done]
    measured = rows if measures_likelihood(options) else []
    examples = [answer_alone(encode_row(setup.tokenizer, setup.format, row)) for row in measured]
    prompts, stop = build_prompts(options, setup, asked) if options.generate else ([], ())
    loaded = load_model(options, setup)
    if examples:
        nll = answer_nll(loaded.config, loaded.base, examples, loaded.adapters, batch_size=options.batch_size)
        yield "nll", nll, describe_prompt(setup)
    if options.generate:
        answers = generating.generate(
            loaded.config, loaded.base, setup.tokenizer, prompts, loaded.adapters,
            max_new_tokens=options.max_new_tokens, stop=stop, batch_size=options.batch_size,
        )  # fmt: skip
        done |= score_answers(options, setup, asked, answers)
        how = f"harness prompt, {options.shots}-shot" if options.prompt == "harness" else describe_prompt(setup)
        how += f", greedy, at most {options.max_new_tokens} new tokens"
        yield from ((name, accuracy([done[row.number][name] for row in rows]), how) for name in names)


def measures_likelihood(options: EvalOptions) -> bool:
    """Whether the likelihood of the reference answers is wanted."""
    return options.nll is not False and options.score in evaluating.WITH_REFERENCES


def usable_rows(options: EvalOptions, setup: PromptSetup, rows: list[Row]) -> list[Row]:
    """The rows that can be asked and compared; with --drop without the others, and it is said which these are."""
    usable = []
    for row in rows:
        try:
            with_line_number(options.data, row, require_usable, options, setup, row)
            usable.append(row)
        except InputError as error:
            if not options.drop:
                raise InputError(f"{error} Rows like this one can be left out with --drop.") from error
            print(f"left out: {error}")
    if not usable:
        raise InputError(f"{options.data}: no usable rows.")
    return usable


def require_usable(options: EvalOptions, setup: PromptSetup, row: Row) -> None:
    """InputError for a row that cannot be asked, or whose reference answer cannot be compared or measured."""
    if options.generate and options.score == "gsm8k":
        evaluating.require_number(row)
    if options.generate and options.prompt == "own":
        encode_question(setup, row.question, options.max_new_tokens, row.history)
    if options.prompt == "harness" and row.history:
        raise InputError("the harness prompt has no place for the turns before the question.")
    if measures_likelihood(options):
        length = len(encode_row(setup.tokenizer, setup.format, row).tokens)
        if setup.positions is not None and length > setup.positions:
            raise InputError(f"{length} tokens are more than {describe_positions(setup)}.")


def build_prompts(options: EvalOptions, setup: PromptSetup, rows: list[Row]) -> tuple[list[list[int]], Sequence[str]]:
    """The prompts, and the strings that end an answer."""
    tokenizer, form = setup.tokenizer, setup.format
    if options.prompt == "own":
        prompts = [encode_question(setup, row.question, options.max_new_tokens, row.history) for row in rows]
        return prompts, stop_strings(form)
    if ignored := evaluating.ignored_settings(setup.folder):
        print(
            f"lm-evaluation-harness would obey generation_config.json's {', '.join(ignored)}; lfu does not.",
            file=sys.stderr,
        )
    pool = read_rows(options.shots_data, options.reader()) if options.shots_data else []
    shots = [evaluating.draw_shots(pool, options.shots, options.seed, row) for row in rows]
    prompts = [evaluating.harness_prompt(tokenizer, row, drawn, bos=form.bos) for row, drawn in zip(rows, shots)]
    return last_tokens(prompts, (setup.positions or 2048) - options.max_new_tokens), evaluating.HARNESS_STOPS


def last_tokens(prompts: list[list[int]], room: int) -> list[list[int]]:
    """The end of each prompt that fits beside the new tokens, as in `HFLM.generate_until`; says how many are cut."""
    if room < 1:
        raise InputError("The model has no room for a prompt beside so many new tokens: give a lower --max-new-tokens.")
    if cut := sum(len(prompt) > room for prompt in prompts):
        print(f"{cut} prompts are longer than {room} tokens and lose their beginning.")
    return [prompt[-room:] for prompt in prompts]


def score_answers(
    options: EvalOptions, setup: PromptSetup, rows: list[Row], answers: Iterator[tuple[int, generating.Completion]]
) -> dict[int, dict[str, float]]:
    """The scores of every row, by its number; each prediction is written as soon as its batch is done."""
    score = evaluating.SCORES[options.score]
    hits: dict[int, dict[str, float]] = {}
    with predictions(options, setup) as write:
        for index, completion in tqdm(answers, total=len(rows), unit="row"):
            row = rows[index]
            gold = row.answer if options.score in evaluating.WITH_REFERENCES else row.fields.get(options.answer)
            hits[row.number] = {**score(completion.text, gold)}
            found = {"prediction": completion.text, "finished": completion.finished}
            write(row, found | hits[row.number])
    return hits


def by_likelihood(options: EvalOptions) -> Iterator[Described]:
    """The score by likelihood; each record is written as soon as its batch is done."""
    score = likelihoods.SCORES[options.score]
    columns = {"question": options.question, "answer": options.answer}
    items = likelihoods.read_items(options.data, options.score, **columns)[: options.limit]
    names = [*score.record(items[0], [Likelihood(0.0, True)] * len(items[0].continuations))]
    require_free_columns(options, [item.row for item in items], names)
    setup = load_prompt_setup(options)
    length = options.max_length or setup.positions or 2048  # `resolve_max_length` in `lm_eval/models/utils.py`
    use_template = score.asks and options.prompt == "own"
    if use_template:
        note_template(options.model, setup.folder, setup.said, setup.format.template)
    prefix = likelihoods.prefix_id(setup.folder, setup.tokenizer)
    encoding = likelihoods.EncodingOptions(setup.tokenizer, setup.format, use_template, prefix, length)
    examples, cut = likelihoods.encode(options.data, options.score, encoding, items)
    if cut:
        print(f"{cut} contexts are too long for {length} tokens at once and lose their beginning.")
    records = read_unfinished(options, setup)
    left = [index for index, item in enumerate(items) if item.row.number not in records]
    loaded = load_model(options, setup)
    found = likelihoods.likelihoods(
        loaded.config, loaded.base, [examples[index] for index in left], loaded.adapters, batch_size=options.batch_size
    )
    with predictions(options, setup) as write:
        for place, each in tqdm(found, total=len(left), unit="row"):
            item = items[left[place]]
            records[item.row.number] = score.record(item, each)
            write(item.row, records[item.row.number])
    how = f"{describe_prompt(setup, use_template)}, at most {length} tokens at once"
    estimates = score.estimates([records[item.row.number] for item in items])
    yield from ((name, value, how) for name, value in estimates.items())


# --- predictions on disk ---------------------------------------------------------------------------


def unfinished(out: StrPath) -> Path:
    """Beside --out until all its rows are there: what the evaluation is, so that the same one can continue it."""
    return Path(f"{out}.unfinished")


def require_free_columns(options: EvalOptions, rows: list[Row], names: list[str]) -> None:
    """InputError where --out would overwrite a column of the data."""
    taken = [(row, name) for row in rows for name in ["row", *names] if name in row.fields]
    if options.out and taken:
        row, name = taken[0]
        raise InputError(
            f"{options.data}, line {row.number}: --out has a column {name!r} of its own; rename that of the data."
        )


def identity(options: EvalOptions, setup: PromptSetup) -> dict[str, Any]:
    """All that decides what --out holds."""
    files = ("model", "adapter", "data", "shots_data", "out", "device", "batch_size")
    chosen = {name: value for name, value in asdict(options).items() if name not in files}
    adapter = sorted(Path(options.adapter).glob("adapter_*")) if options.adapter is not None else []
    return chosen | {
        "model_fingerprint": fingerprint(setup.folder),
        "adapter_files": [sha256(path) for path in adapter],
        "data_sha256": sha256(Path(options.data)),
        "shots_sha256": sha256(Path(options.shots_data)) if options.shots_data else None,
        "format": setup.format._asdict(),
        "tokens": describe_tokens(setup.tokenizer),
    }


def read_unfinished(options: EvalOptions, setup: PromptSetup) -> dict[int, Any]:
    """What an evaluation that was cut off left in --out, by the number of the row; half a line at its end is removed.

    InputError if that was another evaluation.
    """
    if not options.out or not unfinished(options.out).is_file():
        return {}
    out, before, now = Path(options.out), read_json(unfinished(options.out)), identity(options, setup)
    if changed := describe_changes(before, now):
        raise InputError(f"{out} holds part of another evaluation: {changed}. Give the same options, or another --out.")
    lines = complete_lines(out)
    write_text(out, "".join(f"{line}\n" for line in lines))
    print(f"{out}: continued after {len(lines)} rows.")
    found = [json_object(line) for line in lines]
    return {require_column(fields, "row", int): fields for fields in found}


@contextmanager
def predictions(options: EvalOptions, setup: PromptSetup) -> Iterator[Callable[[Row, dict[str, Any]], None]]:
    """A function that adds a row and what was found for it to --out, at once; without --out it does nothing."""
    if not options.out:
        yield lambda row, found: None
        return
    write_json(unfinished(options.out), identity(options, setup))
    try:
        with open(options.out, "a", encoding="utf-8") as file:

            def write(row: Row, found: dict[str, Any]) -> None:
                with named(Path(file.name)):
                    file.write(json_line(row.fields | {"row": row.number} | found))
                    file.flush()

            yield write
    except BaseException:
        with suppress(OSError):
            if not Path(options.out).stat().st_size:  # nothing was found that could be continued
                Path(options.out).unlink()
                unfinished(options.out).unlink()
        raise
    unfinished(options.out).unlink()


def describe_prompt(setup: PromptSetup, in_template: bool = True) -> str:
    """How a prompt begins."""
    shape = f"template {setup.format.template}" if in_template else "as plain text"
    if in_template and setup.format.template == CHAT:
        return shape  # which has its own BOS
    return f"{shape}, {'with' if setup.format.bos and setup.tokenizer.bos else 'without'} BOS"


def format_score(name: str, value: Estimate, how: str) -> str:
    """A score with its standard error, its n, and how it was asked for; in percent where it is a share."""
    mean, error, n = value
    if name == "nll":
        return f"nll: {mean:.4f} ± {error:.4f} nats per answer token (n = {n} tokens; {how})"
    if name.endswith(("perplexity", "bits_per_byte")):
        return f"{name}: {mean:.4f} ± {error:.4f} (n = {n}; {how})"
    return f"{name}: {100 * mean:.2f} % ± {100 * error:.2f} (n = {n}; {how})"

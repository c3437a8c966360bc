"""`lfu distill`: a data set with its answers in the model's own words. Read next: `bench.py`."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lfu.baselines.sdft import RECIPES, Answer, distill_prompt, rewrite_answers
from lfu.checkpoints import describe_changes
from lfu.cli.options import (
    InferenceOptions,
    ModelOptions,
    PromptSetup,
    RowsOptions,
    StrPath,
    check_writable,
    choose_device,
    choose_dtype,
    load_model,
    load_prompt_setup,
    note_template,
    option,
    require_counts,
)
from lfu.data.chat import CHAT
from lfu.data.rows import Row, complete_lines, get_layout, json_line, read_row, read_rows, with_line_number
from lfu.errors import InputError
from lfu.io.files import read_json, write_json, write_text
from lfu.io.huggingface import fingerprint


@dataclass(frozen=True, kw_only=True)
class DistillOptions(RowsOptions, ModelOptions):
    model: StrPath = option("model folder or hub id; the model that will be fine-tuned")
    out: StrPath = option("JSONL file for the same rows with their new answers, written as they come; must not exist")
    recipe: str = option(
        "SDFT's prompt for rewriting; all but general take an answer only with the last integer of the reference",
        "gsm8k",
        choices=list(RECIPES),
    )
    template: str | None = option(
        "plain: the prompt as published; chat: in a turn of the model's own template (default: chat where the model's "
        "lfu_config.json says so, else plain)",
        None,
        choices=["plain", CHAT],
    )
    temperature: float = option("what the logits are divided by", 0.95)
    top_p: float = option("draw from the likeliest tokens that hold this probability", 0.7)
    top_k: int = option("draw from this many of the likeliest tokens", 50)
    max_new_tokens: int = option("longest answer, in tokens", 512)
    seed: int = option("seed of what is drawn", 42)
    batch_size: int = option("rows at a time", 32)
    resume: bool = option("continue after the rows that OUT already holds", False)


def distill(options: DistillOptions) -> Path:
    """Write the data with each answer in the model's own words where these pass the check; prints how many did.

    OUT.json, beside it, holds the options, so that no file is continued with others.

    Rows, their order and their other columns stay. Data in another layout than `columns` comes out in the two columns
    question and answer. InputError for what cannot be used, before anything is written.
    """
    check_sampling(options)
    out, record = Path(options.out), Path(f"{options.out}.json")
    rows = read_rows(options.data, options.reader())[: options.limit]
    before = read_previous_answers(out, record, options, rows)
    inference, setup = choose_prompts(options, rows)
    settings = run_settings(options, setup)
    if options.resume:
        require_same(record, settings)
    loaded = load_model(inference, setup)
    names = ("seed", "temperature", "top_k", "top_p", "max_new_tokens", "batch_size")
    how = {name: getattr(options, name) for name in names}
    write_json(record, settings)
    batches = rewrite_answers(
        loaded.config, loaded.base, setup.tokenizer, rows[len(before) :], RECIPES[options.recipe], **how
    )
    fresh = write_answers(options, rows, len(before), batches)
    answers = [*before, *(answer.text for answer in fresh)]
    new = sum(answer != row.answer for answer, row in zip(answers, rows))
    print(f"{out}: {len(rows)} rows, {new} with a new answer ({100 * new / len(rows):.1f} %), the others as they were.")
    for fault, count in Counter(answer.fault for answer in fresh).most_common():
        print(f"  of {len(fresh)} texts {count} {f'not taken: {fault}' if fault else 'taken'}")
    return out


def check_sampling(options: DistillOptions) -> None:
    """InputError for numbers that nothing can be drawn with, and for conversations, which the recipes do not ask in."""
    if options.template == CHAT and RECIPES[options.recipe].is_chat:
        raise InputError(f"The recipe {options.recipe} has a chat format written into it: leave out --template.")
    if options.layout == "messages":
        raise InputError("lfu distill rewrites the answer to one question; the layout messages has conversations.")
    require_counts(options, "top_k", "max_new_tokens", "batch_size", "limit")
    require_counts(options, "seed", least=0)
    if not (0 < options.temperature < math.inf and 0 < options.top_p <= 1):
        raise InputError("temperature must be more than 0 and finite, top-p more than 0 and at most 1.")


def choose_prompts(options: DistillOptions, rows: list[Row]) -> tuple[InferenceOptions, PromptSetup]:
    """How the model is asked. InputError for a row that it cannot be asked for."""
    recipe = RECIPES[options.recipe]
    template = "plain" if recipe.is_chat else options.template
    inference = InferenceOptions(model=options.model, dtype=options.dtype, device=options.device, template=template)
    setup = load_prompt_setup(inference)
    for row in rows:
        with_line_number(options.data, row, distill_prompt, setup.tokenizer, recipe, row)
    if not recipe.is_chat:
        note_template(options.model, setup.folder, None, CHAT if setup.tokenizer.chat else "plain")
    return inference, setup


def run_settings(options: DistillOptions, setup: PromptSetup) -> dict[str, Any]:
    """The options, and what the model, the dtype and the template turned out to be."""
    dtype, chat = choose_dtype(options.dtype, setup.folder, choose_device(options.device)), setup.tokenizer.chat
    found = {"model_fingerprint": fingerprint(setup.folder), "dtype": str(dtype).removeprefix("torch.")}
    asked = {"template": CHAT, "chat_template": chat.sha256} if chat is not None else PLAIN
    return asdict(options) | found | asked


PLAIN = {"template": "plain", "chat_template": None}
"""Also what held before these were recorded."""
DECIDING = ("model_fingerprint", "recipe", "temperature", "top_p", "top_k", "max_new_tokens", "seed", "dtype", *PLAIN)


def is_record(path: Path) -> bool:
    """Whether a file holds the options of such a run."""
    try:
        return set(DECIDING) <= set(PLAIN | read_json(path))
    except InputError:
        return False


def require_same(record: Path, settings: dict[str, Any]) -> None:
    """InputError where something that decides an answer differs from what is recorded."""
    before = PLAIN | read_json(record)
    if changed := describe_changes(before, {name: settings[name] for name in DECIDING}):
        raise InputError(f"{record}: {changed}. Give the same options, or another --out.")


def write_answers(
    options: DistillOptions, rows: list[Row], first: int, batches: Iterator[list[Answer]]
) -> list[Answer]:
    """Add the rows from number `first` on to OUT, batch by batch; returns their answers."""
    written: list[Answer] = []
    Path(options.out).absolute().parent.mkdir(parents=True, exist_ok=True)
    mode = "a" if options.resume else "x"
    with open(options.out, mode, encoding="utf-8") as file, tqdm(total=len(rows), initial=first, unit="row") as bar:
        for batch in batches:
            for row, answer in zip(rows[first + len(written) :], batch):
                file.write(json_line(with_answer(options, row, answer.text)))
            file.flush()
            bar.update(len(batch))
            written += batch
    return written


def with_answer(options: DistillOptions, row: Row, answer: str) -> dict[str, Any]:
    """The row with this answer, as it is written."""
    kept = row.fields if options.layout == "columns" else {"question": row.question}
    return kept | {options.answer: answer}


def read_previous_answers(out: Path, record: Path, options: DistillOptions, rows: list[Row]) -> list[str]:
    """The answers that OUT already holds, to be continued; half a line at its end is cut off.

    InputError if OUT or its record exists and is not to be continued, or OUT holds other rows.
    """
    begun = is_record(record)
    if not options.resume:
        if out.exists():
            raise InputError(f"{out} exists already; answers are never overwritten. Choose another --out, or --resume.")
        if record.exists() and not begun:
            raise InputError(f"{record} exists already: the options go there. Choose another --out, or remove it.")
        check_writable(out)
        return []
    if begun and not out.exists():  # stopped before its first answer
        return []
    if not out.is_file():
        raise InputError(f"{out} does not exist: there is nothing to continue. Leave out --resume.")
    lines = complete_lines(out)
    layout = get_layout("columns", options.question, options.answer)
    found = [read_row(out, number, line, layout) for number, line in enumerate(lines, 1)]
    if [row.fields for row in found] != [with_answer(options, row, old.answer) for row, old in zip(rows, found)]:
        raise InputError(f"{out} holds other rows than {options.data}. Give the same options, or another --out.")
    write_text(out, "".join(f"{line}\n" for line in lines))
    return [row.answer for row in found]

"""The last part of `gpu.py`: SmolLM2-135M fine-tuned on all of GSM8K, with SFT and with LfU (LoRA) at two λ.

A model this small keeps no GPU busy: its steps wait for the host. So the runs, and the base model's scores, go on side
by side, each in a process of its own. A step is one micro-batch of 16 rows unless told otherwise, because the four of
the published setting take four times as long; LfU ascends once per micro-batch, so the table says which it was. What is
not done in time is left out, and the table says that too.
"""

import subprocess
import time
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import torch

from experiments.gpu_tables import Run, Table, command, save, tell
from experiments.miniature.mini import MINI
from lfu import cli, lora, model
from lfu.data.batches import Example
from lfu.data.rows import read_rows
from lfu.data.tokens import TEMPLATES, Format, encode_row, load_tokenizer, prompt_ids, token_ids
from lfu.evaluation.estimates import Estimate, accuracy
from lfu.evaluation.generative import gsm8k_scores
from lfu.evaluation.nll import answer_nll
from lfu.generate import generate
from lfu.io.files import read_json, write_json

METHODS: dict[str, dict[str, Any]] = {
    "base": {},
    "sft": {"method": "sft"},
    "lfu-lora-5": {"method": "lfu-lora", "alpha": 0.1, "lam": 5.0},
    "lfu-lora-0.5": {"method": "lfu-lora", "alpha": 0.1, "lam": 0.5},
}
COLUMNS = {
    "nll": "test NLL",
    "strict": "strict",
    "flexible": "flexible",
    "wikitext": "WikiText-2 NLL",
    "minutes": "minutes of training",
}
SPARE = 10
"""Seconds kept for the table."""


class Sources(NamedTuple):
    """What is fine-tuned, on what, and what it is scored on."""

    model: Path
    train: Path
    test: Path
    text: str
    template: str
    rows: int | None  # of the test rows
    window: int  # tokens
    windows: int


def sources(run: Run) -> Sources | None:
    """The real ones; the miniature's for a rehearsal without them."""
    if run.model and run.gsm8k and run.wikitext:
        text = run.wikitext.read_text(encoding="utf-8")
        return Sources(run.model, run.gsm8k / "train.jsonl", run.gsm8k / "test.jsonl", text, "alpaca", None, 512, 64)
    if not run.small:
        return None
    rows = read_rows(MINI / "knowledge" / "test.jsonl")
    text = "\n".join(f"{row.question} {row.answer}" for row in rows)
    return Sources(MINI, MINI / "math" / "train.jsonl", MINI / "math" / "test.jsonl", text, "question", 20, 64, 4)


def real(run: Run) -> None:
    """Start every run, wait for as long as there is time, and put what came of them into one table."""
    if sources(run) is None:
        tell(run.out, "real: left out. It needs --model, --gsm8k and --wikitext.")
        return
    running = [subprocess.Popen(command(f"real-{name}", **run._asdict())) for name in METHODS]
    for process in running:
        try:
            process.wait(max(0.0, run.until - SPARE - time.time()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    rows = [[name, *cells(run.out / f"real-{name}.json")] for name in METHODS]
    note = f"One epoch, learning rate 1e-4, micro-batches of {run.micro_batch_size} rows; all at once on one device."
    title = "SmolLM2-135M on GSM8K" if run.gsm8k else "The miniature, for a rehearsal"
    save(run, "real", title, Table(["run", *COLUMNS.values()], rows, note))


def cells(path: Path) -> list[str]:
    """The scores in a run's file, which is removed: they stand in the table now."""
    scores = read_json(path) if path.is_file() else {}
    path.unlink(missing_ok=True)
    if not scores:
        return ["not done in time", *["-"] * (len(COLUMNS) - 1)]
    return [scores.get(name, "not in time") for name in COLUMNS]


def one(run: Run, name: str) -> None:
    """Fine-tune and score; each score is written as soon as it is known."""
    began, world = time.perf_counter(), sources(run)
    assert world is not None  # `real` starts nothing otherwise
    path, adapters = run.out / f"real-{name}.json", []
    config, base = model.load(world.model, dtype=torch.bfloat16, device=run.device)
    if METHODS[name]:
        adapters = [lora.load(fine_tune(run, world, name), config, device=run.device)]
    scores = {"minutes": f"{(time.perf_counter() - began) / 60:.1f}"}
    tokenizer, form = load_tokenizer(world.model, config.vocab_size), Format(world.template)
    rows = read_rows(world.test)[: world.rows]
    examples = [encode_row(tokenizer, form, row) for row in rows]

    def note(**estimates: Estimate) -> None:
        scores.update({key: f"{estimate.mean:.4f} ± {estimate.error:.4f}" for key, estimate in estimates.items()})
        write_json(path, scores)

    note(nll=answer_nll(config, base, examples, adapters, batch_size=32))
    tokens = token_ids(tokenizer, world.text[: 8 * world.window * world.windows])
    starts = range(0, min(len(tokens), world.window * world.windows), world.window)
    note(wikitext=answer_nll(config, base, [Example(tokens[i : i + world.window], 1, i) for i in starts], adapters))
    prompts = [prompt_ids(tokenizer, form, row.question) for row in rows]
    stop, new_tokens = TEMPLATES[world.template].stops, 32 if run.small else 256
    found = generate(config, base, tokenizer, prompts, adapters, stop=stop, batch_size=700, max_new_tokens=new_tokens)
    hits = [gsm8k_scores(completion.text, rows[index].answer) for index, completion in found]
    note(**{score: accuracy([hit[score] for hit in hits]) for score in ("strict", "flexible")})


def fine_tune(run: Run, world: Sources, name: str) -> Path:
    """The adapter's folder; the run's is a neighbour of DIR, whose files are few enough to be carried away."""
    options = cli.TrainOptions(
        model=str(world.model), data=str(world.train), out=str(run.out.with_name(f"{run.out.name}-runs") / name),
        device=str(run.device), dtype="bfloat16", template=world.template, epochs=1,
        micro_batch_size=run.micro_batch_size, limit=32 if run.small else None, **METHODS[name],
    )  # fmt: skip
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        return cli.train(options)

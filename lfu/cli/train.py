"""`lfu train`: one run, from options to an adapter folder, with everything that keeps it.

Everything is checked before work starts (options, data, tokenizer, then weights), and nothing computed is lost: a run's
folder holds its resolved settings, a log line per step, and checkpoints from which `--resume` continues exactly. Read
next: `evaluate.py`.
"""

import math
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from lfu import __version__, lora, methods, model
from lfu.checkpoints import BEST
from lfu.cli.options import (
    ModelOptions,
    RowsOptions,
    StrPath,
    adapter_format,
    ask_as,
    block_numbers,
    check_writable,
    choose_device,
    choose_dtype,
    format_flags,
    note_template,
    option,
    read_format,
    require_counts,
    require_same_tokens,
)
from lfu.data.batches import Example
from lfu.data.chat import CHAT
from lfu.data.rows import read_rows
from lfu.data.tokens import (
    LOSS_ON,
    TEMPLATE_NAMES,
    Format,
    ModelTokenizer,
    describe_tokens,
    encode_rows,
    load_tokenizer,
    longest_context,
)
from lfu.distributed import process_group, rank_and_world_size
from lfu.errors import InputError
from lfu.io.config import Config, read_config
from lfu.io.files import first_few, sha256
from lfu.io.huggingface import fingerprint, resolve_model
from lfu.loss import NORMS
from lfu.profiling.memory import expected_peak
from lfu.runs import check_folder, train_run
from lfu.schedule import Settings, total_steps, validate_settings
from lfu.validation import Validation, hold_back


def published(name: str) -> str:
    """The default of a hyper-parameter, and the methods that have it."""
    found = {method: spec.published[name] for method, spec in methods.METHODS.items() if name in spec.published}
    takers = {value: ", ".join(each for each in found if found[each] == value) for value in found.values()}
    return "; ".join(f"{value:g} for {names}" for value, names in takers.items())


SCHEDULE = Settings()
"""The published schedule."""


@dataclass(frozen=True, kw_only=True)
class TrainOptions(RowsOptions, ModelOptions):
    out: StrPath = option("folder of the run; must not hold another one")
    method: str = option("how to train: see lfu methods", "lfu-lora", choices=list(methods.METHODS))
    alpha: float | None = option(
        f"length of the step that raises the loss, or scale of neftune's noise (default: {published('alpha')})", None
    )
    lam: float | None = option(f"weight λ of what is added to the SFT loss (default: {published('lam')})", None)
    beta: float | None = option(f"temperature of GEM (default: {published('beta')})", None)
    layers: list[int] | None = option(
        "blocks whose hidden states LfU compares, such as 1-11 (default: all)",
        None,
        type=block_numbers,
        metavar="BLOCKS",
    )
    norm: str | None = option(
        "how LfU, l1 and l2 measure hidden states: mean over the features (default); sum over them, as the paper "
        "prints it; for LfU also relative to their size",
        None,
        choices=list(NORMS),
    )
    reference: StrPath | None = option("for anchored: the adapter folder of an SFT run", None)
    anchor_alpha: float | None = option(
        f"the reference's share of the anchor (default: {published('anchor_alpha')})", None
    )
    space: str | None = option(
        "what the anchor mixes: logits (default) or probabilities", None, choices=["logits", "probabilities"]
    )
    stages: int | None = option(
        f"times that --epochs are trained, each with a new anchor (default: {published('stages')})", None
    )
    rank: int = option("rank r of the LoRA", 8)
    lora_alpha: float = option("α of the LoRA, which adds (α / r) B A x to W x", 16.0)
    valid: StrPath | None = option(
        "JSONL file of validation rows; OUT/best is the adapter with the lowest NLL on them", None
    )
    hold_back: int | None = option("instead of --valid: set this many rows of the data aside, chosen by the seed", None)
    eval_every: int | None = option("steps between validations (default: an epoch)", None)
    patience: int | None = option("stop after this many validations without a new best", None)
    adapter: StrPath | None = option("adapter folder to go on from, with a new optimizer (default: a fresh LoRA)", None)
    ema: float | None = option("also keep OUT/ema, the exponential moving average of the adapter with this decay", None)
    epochs: int = option("passes over the data", SCHEDULE.epochs)
    batch_size: int = option("rows per optimizer step", SCHEDULE.batch_size)
    micro_batch_size: int = option(
        "rows per forward and backward pass; LfU raises the loss once in each, so that its result depends on it",
        SCHEDULE.micro_batch_size,
    )
    learning_rate: float = option("peak learning rate", SCHEDULE.learning_rate)
    warmup: float = option(
        "share of the steps, rounded up, in which the learning rate rises from 0 to its peak", SCHEDULE.warmup
    )
    weight_decay: float = option("weight decay of AdamW", SCHEDULE.weight_decay)
    max_grad_norm: float = option("clip the gradient of a step to this norm", SCHEDULE.max_grad_norm)
    seed: int = option("seed of the first adapter, of the order of the rows, and of all that is drawn", SCHEDULE.seed)
    template: str | None = option(
        "how a question becomes a prompt; chat: the model's own (default: as its lfu_config.json says, else alpaca)",
        None,
        choices=list(TEMPLATE_NAMES),
    )
    system: str | None = option(
        "system turn before each row, with the template chat (default: as the model says)", None
    )
    bos: bool | None = option(
        "BOS before the prompt (default: as the model says, else where the tokenizer puts one)", None
    )
    loss_on: str = option(
        "which tokens carry loss; instruction+answer is Instruction Modelling", "answer", choices=list(LOSS_ON)
    )
    max_length: int = option("longest row, in tokens; nothing is cut: see --drop", 2048)
    drop: bool = option("leave out rows that cannot be used, instead of stopping", False)
    remat: bool = option("recompute each block in the backward pass: less memory, more time", False)
    compile: bool = option(
        "use torch.compile, which takes minutes at the start, and again at the first batch of one row", False
    )
    save_every: int | None = option("steps between checkpoints (default: an epoch)", None)
    keep: int = option("how many of the last checkpoints to keep", 1)
    resume: bool = option("continue the run in OUT from its last checkpoint", False)


def train(options: TrainOptions) -> Path:
    """Fine-tune an adapter; returns its folder, OUT/adapter. InputError for anything that cannot be used.

    Under `torchrun` all processes compute, and the first one alone prints and writes.
    """
    with process_group(choose_device(options.device)) as device:
        return fine_tune(options, device)


def fine_tune(options: TrainOptions, device: torch.device) -> Path:
    """One run on one device, alone or as one of several processes."""
    plan, out, (number, processes) = plan_run(options, device), Path(options.out), rank_and_world_size()
    if processes > 1 and plan.method.is_stateful:
        raise InputError(f"The method {options.method} goes through the micro-batches in turn: train in one process.")
    if number == 0:
        check_folder(out, plan.record, options.resume, defaults(TrainOptions) | {"tokens": plan.record["tokens"]})
        check_writable(out)
    config, base = model.load(plan.folder, dtype=plan.dtype, device=device)
    task = tree_map(partial(Tensor.to, device=device, dtype=model.stream_dtype(base), copy=True), plan.start)
    print_forecast(plan, base, task)
    adapter = train_run(
        out, config, base, (task, options.lora_alpha / options.rank), plan.examples, plan.method, plan.schedule,
        record=plan.record, validation=plan.validation, save_every=options.save_every, keep=options.keep,
        decay=options.ema, resume=options.resume,
    )  # fmt: skip
    best = out / BEST if plan.validation is not None else adapter
    print(f"Next: lfu eval --model {options.model} --adapter {best} --data TEST.jsonl")
    return adapter


class Plan(NamedTuple):
    """A run whose options, data and method have been checked, before the model's weights are read."""

    folder: Path
    config: Config
    schedule: Settings
    examples: list[Example]
    validation: Validation | None
    method: methods.BoundMethod
    start: lora.Lora
    dtype: torch.dtype
    record: dict[str, Any]  # of what decides the result


def plan_run(options: TrainOptions, device: torch.device) -> Plan:
    """What the options come to. InputError for anything in them or in the data that cannot be used."""
    require_counts(options, "rank", "limit", "save_every", "keep", "hold_back", "eval_every", "patience")
    if options.ema is not None and not 0 <= options.ema < 1:
        raise InputError(f"ema must be at least 0 and less than 1, not {options.ema}.")
    if not 0 < options.lora_alpha < math.inf:
        raise InputError(f"lora-alpha must be more than 0 and finite, not {options.lora_alpha}.")
    folder = resolve_model(options.model)
    config = read_config(folder / "config.json")
    schedule = Settings(**{name: getattr(options, name) for name in Settings._fields})
    validate_settings(schedule)
    form = choose_format(options, folder)
    tokenizer = load_tokenizer(folder, config.vocab_size, options.bos if form.bos else False, form.template)
    tokens = describe_tokens(tokenizer)
    examples, validation = split_examples(options, form, folder, tokenizer)
    dtype = choose_dtype(options.dtype, folder, device)
    reference = read_reference(options, form, folder, config, tokens, device, torch.promote_types(dtype, torch.float32))
    method, chosen = methods.bind(
        options.method, config, scale=options.lora_alpha / options.rank, examples=examples, settings=schedule,
        alpha=options.alpha, lam=options.lam, beta=options.beta, layers=options.layers, norm=options.norm,
        anchor_alpha=options.anchor_alpha, space=options.space, stages=options.stages,
        reference=reference, remat=options.remat, compile=options.compile,
    )  # fmt: skip
    start = initial_adapter(options, form, folder, config, tokens)
    if options.compile and dtype == torch.float16:  # the compiler loses the backward pass of `half.ScaledLinear`
        raise InputError("--compile does not work in float16: leave it out, or give --dtype bfloat16 or float32.")
    chosen |= {"dtype": str(dtype).removeprefix("torch."), "tokens": tokens}
    record = record_run(options, folder, form._asdict() | chosen)
    return Plan(folder, config, schedule, examples, validation, method, start, dtype, record)


def choose_format(options: TrainOptions, folder: Path) -> Format:
    """How the rows become prompts: as given, else as in the run that is resumed, else as the model says.

    Says so where the model was made for another template. InputError for what a chat does not do.
    """
    said = read_format(folder / "lfu_config.json")
    begun = read_format(Path(options.out) / "settings.json") if options.resume else None
    stored = begun or said or Format()
    form = ask_as(stored, options.template, options.bos, options.system)._replace(loss_on=options.loss_on)
    if form.template == CHAT and form.loss_on != "answer":
        raise InputError("In the template chat loss is on the answers: leave out --loss-on.")
    note_template(options.model, folder, said, form.template)
    return form


def initial_adapter(
    options: TrainOptions, form: Format, folder: Path, config: Config, tokens: dict[str, Any]
) -> lora.Lora:
    """A fresh LoRA, or the given adapter, which must be one of this model, prompt format, rank and scale."""
    if options.adapter is None:
        return lora.init(config, options.rank, generator=torch.Generator().manual_seed(options.seed))
    require_same_prompts(form, Path(options.adapter), folder, tokens)
    start, scale = lora.load(Path(options.adapter), config)
    rank = len(next(iter(start[0].values())).A)
    if rank != options.rank or not math.isclose(scale, options.lora_alpha / options.rank, rel_tol=1e-6):
        raise InputError(
            f"{options.adapter} has rank {rank} and scale {scale:g}: "
            f"give --rank {rank} --lora-alpha {scale * rank:.8g}."
        )
    return start


def read_reference(
    options: TrainOptions, form: Format, folder: Path, config: Config, tokens: dict[str, Any], device: torch.device,
    stream: torch.dtype,
) -> lora.Adapter | None:  # fmt: skip
    """The adapter that Anchored Learning moves towards: of this model and prompt format, of any rank and scale."""
    if options.reference is None:
        return None
    require_same_prompts(form, Path(options.reference), folder, tokens)
    return lora.load(Path(options.reference), config, device=device, dtype=stream)


def require_same_prompts(form: Format, adapter: Path, folder: Path, tokens: dict[str, Any]) -> None:
    """InputError unless an adapter was trained on this model, and with these prompts."""
    stored = adapter_format(adapter, folder)
    if stored is not None and stored._replace(loss_on=form.loss_on) != form:
        raise InputError(f"{adapter} was trained with other prompts: give {format_flags(stored)}.")
    require_same_tokens(adapter, tokens)


def split_examples(
    options: TrainOptions, form: Format, folder: Path, tokenizer: ModelTokenizer
) -> tuple[list[Example], Validation | None]:
    """The rows to train on, and those for validation, if there are any."""
    if options.valid is not None and options.hold_back is not None:
        raise InputError("valid and hold-back exclude each other: give the file, or a number of rows.")
    if options.valid is None and options.hold_back is None:
        if options.eval_every is not None or options.patience is not None:
            raise InputError("eval-every and patience need rows for validation: give --valid or --hold-back.")
        return read_examples(options, form, options.data, folder, tokenizer), None
    examples = read_examples(options, form, options.data, folder, tokenizer)
    if options.valid is not None:
        held = read_examples(options, form, options.valid, folder, tokenizer)
    else:
        examples, held = hold_back(examples, options.hold_back or 0, options.seed)
        lines = first_few([str(example.line_number) for example in held], 10)
        print(f"{options.data}: {len(held)} rows held back for validation, of lines {lines}.")
    return examples, Validation(held, options.eval_every, options.patience)


def read_examples(
    options: TrainOptions, form: Format, data: StrPath, folder: Path, tokenizer: ModelTokenizer
) -> list[Example]:
    """The tokenised rows of a file; prints how many there are and which were left out."""
    rows = read_rows(data, options.reader())[: options.limit if data == options.data else None]
    examples, dropped = encode_rows(
        data, rows, tokenizer, form, max_length=options.max_length, positions=longest_context(folder),
        drop=options.drop,
    )  # fmt: skip
    supervised = sum(example.num_loss_tokens for example in examples)
    print(f"{data}: {len(examples)} rows, {supervised} tokens with loss, {len(dropped)} rows left out.")
    for reason in dropped[:10]:
        print(f"  left out: {reason}")
    return examples


def record_run(options: TrainOptions, folder: Path, chosen: dict[str, Any]) -> dict[str, Any]:
    """Everything that decides the run's result, for settings.json and, with the adapter, lfu_config.json."""
    identity: dict[str, str | None] = {
        "model_fingerprint": fingerprint(folder),
        "data_sha256": sha256(Path(options.data)),
        "valid_sha256": sha256(Path(options.valid)) if options.valid is not None else None,
    }
    for name in ("adapter", "reference"):
        adapter = getattr(options, name)
        weights = Path(adapter) / "adapter_model.safetensors" if adapter is not None else None
        identity[f"{name}_sha256"] = sha256(weights) if weights else None
    base = {"model": str(folder.absolute()) if Path(options.model).is_dir() else options.model}
    return asdict(options) | chosen | base | identity | {"lfu": __version__, "torch": torch.__version__}


def defaults(kind: type) -> dict[str, Any]:
    """What an options object holds that nobody filled in: also what held before an option was there to be given."""
    return {each.name: each.default for each in fields(kind) if each.default is not MISSING}


def print_forecast(plan: Plan, base: model.Params, task: lora.Lora) -> None:
    """Print what the run will take, and whether it can learn anything."""
    if total_steps(len(plan.examples), plan.schedule) == 1 and plan.schedule.warmup > 0:
        print("The only step of this run is its warm-up, with learning rate 0: nothing is learned. See --warmup.")
    print_memory(base, task, plan.method)
    rows = min(plan.schedule.micro_batch_size, plan.schedule.batch_size)
    print_peak(partial(plan.method.probe, plan.config, base, task), plan.examples, rows)
    if plan.record["compile"]:
        print("That is the peak without torch.compile.")


def print_memory(base: model.Params, task: lora.Lora, method: methods.BoundMethod) -> None:
    """What stays in memory through the whole run."""
    layers = [tensor for layer in base.layers for tensor in layer if tensor is not None]
    weights = {tensor.data_ptr(): tensor for tensor in [base.embed, base.norm, base.lm_head, *layers]}
    sizes = [sum(tensor.nbytes for tensor in tensors) / 2**20 for tensors in (weights.values(), tree_leaves(task))]
    frozen = [leaf.nbytes for leaf in tree_leaves(method.run.get("reference", ())) if isinstance(leaf, Tensor)]
    others = f", reference and snapshot {sum(frozen) / 2**20 + sizes[1]:.1f} MiB" if frozen else ""
    print(
        f"Memory: weights {sizes[0]:.1f} MiB ({base.embed.dtype}), adapter {sizes[1]:.1f} MiB, its gradient "
        f"{sizes[1]:.1f} MiB, optimizer {2 * sizes[1]:.1f} MiB{others}."
    )


def print_peak(step: Callable[[Example], object], examples: list[Example], rows: int) -> None:
    """What the largest micro-batch there may be takes on top: the longest rows, all padded to the longest of them."""
    longest = sorted(examples, key=lambda example: len(example.tokens))[-rows:]
    tokens = len(longest) * len(longest[-1].tokens)
    expected = expected_peak(step, tokens, sum(example.num_loss_tokens for example in longest) / tokens) / 2**20
    print(
        f"A micro-batch of {len(longest)} x {len(longest[-1].tokens)} tokens is expected to take {expected:.0f} MiB "
        "more at its peak."
    )

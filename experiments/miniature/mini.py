"""One run of the paper in miniature: a fine-tuning of `weights/mini`, and everything that is measured on it.

A `Spec` says all that decides a run, and its result is one JSON file named after it, so a plan of many runs continues
where it stopped. Methods are those of `lfu.methods`, and those that are not gradients: `im`
(labels), `sdft` (data), `ema` and `ensemble` (averages). A method with a reference trains that first, on the same data
and with the same seed. Read next: `plan.py`.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from lfu import lora, methods, model, train
from lfu.baselines.anchored import train_in_stages
from lfu.baselines.averages import ema, ensemble
from lfu.baselines.sdft import Recipe, rewrite_answers
from lfu.data.batches import Example, collate
from lfu.data.rows import Row, read_rows
from lfu.data.tokens import Format, ModelTokenizer, encode_row, encode_rows, load_tokenizer, prompt_ids
from lfu.evaluation.generative import PROMPT_VARIANTS, harness_prompt, is_right, refusal_scores
from lfu.evaluation.nll import answer_nll
from lfu.generate import generate
from lfu.io.files import write_json
from lfu.lora import Adapter, Lora
from lfu.loss import answer_mask
from lfu.model import Config, Params
from lfu.profiling.bench import RANK, SCALE, interleaved
from lfu.schedule import Settings, steps_per_epoch
from lfu.train import StepMetrics
from lfu.validation import History, best, watch

MINI = Path(__file__).parents[2] / "weights" / "mini"
SPLITS = {
    "two-step": "math",
    "other math": "neighbours",
    "knowledge": "knowledge",
    "reasoning": "reasoning",
    "helpfulness": "helpfulness",
}
"""Column of a table -> folder of `weights/mini`."""
CATEGORIES = {
    "math": ("two-step", "other math"),
    "knowledge": ("knowledge",),
    "reasoning": ("reasoning",),
    "helpfulness": ("helpfulness",),
}
"""The paper's four categories; a category's score is the mean over its columns, as the paper's is over its tasks."""
EPOCHS = {"math": 10, "mixed": 6, "safe": 10}
"""60 steps on each fine-tuning set."""
REWRITE = Recipe(("Question: {question} {reference}\nAnswer:",), same_number=True)
"""SDFT in the one format that this model knows. Where neither answer has a number, they count as equal."""
NOISE = 5.0
"""NEFTune's alpha: Figure 6 adds Gaussian noise "with the same strength", read here as deviation alpha/√(L·D)."""
ATTACK_ROWS, ATTACK_EPOCHS, ATTACK_RATE = 80, 4, 9e-3
"""20 steps, at three times the learning rate of the alignment, as 3e-4 is of 1e-4. The paper's five steps, with their
schedule, change no answer of this model."""


Hyper = tuple[tuple[str, Any], ...]
"""Keyword arguments of `methods.bind`, the beta of an average, or the `Trial` by which a reference is trained."""
Trial = tuple[str, float, Hyper]
"""Method, learning rate, hyper-parameters."""


@dataclass(frozen=True)
class Spec:
    """What decides a run."""

    method: str
    learning_rate: float
    hyper: Hyper = ()
    data: str = "math"
    seed: int = 0
    epochs: int = 10  # of each stage
    micro_batch_size: int = 4
    dtype: str = "float32"
    split: str = "test"
    measures: tuple[str, ...] = ("scores",)
    stopped: bool = False  # at the epoch that is best on the validation rows of its own data

    @property
    def path(self) -> str:
        """The name of its file: readable in front, and different for different runs."""
        decisive = {name: value for name, value in asdict(self).items() if name != "stopped" or value}
        digest = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:12]
        return f"{self.data}-{self.method}-{self.seed}-{digest}.json"


class World(NamedTuple):
    """The model, loaded once for each dtype."""

    config: Config
    base: Params
    tokenizer: ModelTokenizer


@cache
def world(dtype: str) -> World:
    config, base = model.load(MINI, dtype=getattr(torch, dtype))
    return World(config, base, load_tokenizer(MINI, config.vocab_size))


@cache
def rows_of(folder: str, split: str) -> list[Row]:
    return read_rows(MINI / folder / f"{split}.jsonl")


# --- a run ----------------------------------------------------------------------------------------


def result(out: Path, spec: Spec) -> dict[str, Any]:
    """The run's measurements, from its file if there is one."""
    path = out / "runs" / spec.path
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"spec": asdict(spec)} | run(spec))
    return found(out, spec)


def found(out: Path, spec: Spec) -> dict[str, Any]:
    """The measurements of a run that was made. FileNotFoundError if it was not."""
    return json.loads((out / "runs" / spec.path).read_text())


def run(spec: Spec) -> dict[str, Any]:
    """Fine-tune and measure."""
    here = world(spec.dtype)
    if spec.method == "base":
        return measurements(here, [], spec, Format("question"))
    form = Format("question", loss_on="instruction+answer" if spec.method == "im" else "answer")
    rows, told = training_rows(here, spec)
    examples, _ = encode_rows(MINI / spec.data / "train.jsonl", rows, here.tokenizer, form)
    try:
        task, training = fine_tuned(here, spec, examples)
    except FloatingPointError as error:  # settings under which training diverges are a result too
        return told | {"diverged": str(error), "scores": dict.fromkeys(SPLITS, 0.0) | {"nll": math.inf}}
    adapter = ensemble((task, SCALE), dict(spec.hyper)["beta"]) if spec.method == "ensemble" else (task, SCALE)
    return told | {"training": training | {"moved": distance(task)}} | measurements(here, [adapter], spec, form)


def training_rows(here: World, spec: Spec) -> tuple[list[Row], dict[str, Any]]:
    """The rows to train on, rewritten by the base model for SDFT, and the share of them that was."""
    rows = rows_of(spec.data, "train")
    if spec.method != "sdft":
        return rows, {}
    batches = rewrite_answers(here.config, here.base, here.tokenizer, rows, REWRITE, seed=spec.seed, max_new_tokens=64)
    answers = [answer for batch in batches for answer in batch]
    taken = sum(answer.fault is None for answer in answers) / len(rows)
    return [row._replace(answer=answer.text) for row, answer in zip(rows, answers)], {"rewritten": taken}


def fine_tuned(here: World, spec: Spec, examples: Sequence[Example]) -> tuple[Lora, dict[str, Any]]:
    """The trained LoRA, or the average of its steps, or its best epoch; and what is to be said of the run."""
    task = lora.init(here.config, RANK, generator=torch.Generator().manual_seed(spec.seed))
    kept, log = copied(task), []
    history: History = []
    loop = steps(here, task, examples, spec)
    if spec.stopped:
        every = steps_per_epoch(len(examples), Settings())
        loop = watch(loop, partial(valid_nll, here, task, spec), history, every, None, 0, every * EPOCHS[spec.data])
    for metrics in loop:
        if metrics.step > 0:
            log.append(metrics)
        if spec.method == "ema":
            kept = ema(kept, task, dict(spec.hyper)["beta"])
        if spec.stopped and best(history)[0] == metrics.step:
            kept = copied(task)
    told = summary(log) | ({"valid": history} if spec.stopped else {})
    return kept if spec.stopped or spec.method == "ema" else task, told


def valid_nll(here: World, task: Lora, spec: Spec) -> float:
    """Of the validation rows of its own data."""
    examples = [encode_row(here.tokenizer, Format("question"), row) for row in rows_of(spec.data, "valid")]
    return answer_nll(here.config, here.base, examples, [(task, SCALE)], batch_size=64).mean


def steps(here: World, task: Lora, examples: Sequence[Example], spec: Spec) -> Iterator[StepMetrics]:
    """The loop of `lfu.train`; `task` is updated in place."""
    settings = Settings(
        epochs=spec.epochs,
        micro_batch_size=spec.micro_batch_size,
        learning_rate=spec.learning_rate,
        seed=spec.seed,
    )
    name = "sft" if spec.method in ("im", "sdft", "ema", "ensemble") else spec.method
    hyper = {} if spec.method in ("ema", "ensemble") else dict(spec.hyper)
    if trial := hyper.pop("reference", None):
        hyper["reference"] = reference(spec.data, trial, spec.seed, spec.dtype), SCALE
    method, _ = methods.bind(name, here.config, scale=SCALE, examples=examples, settings=settings, **hyper)
    optimizer = train.adamw(task, settings)
    return train_in_stages(here.config, here.base, task, optimizer, examples, method, settings)


@lru_cache(maxsize=4)
def reference(data: str, trial: Trial, seed: int, dtype: str) -> Lora:
    """The LoRA that this trial makes of a fine-tuning set, in its usual number of epochs."""
    here, spec = world(dtype), Spec(*trial, data=data, seed=seed, epochs=EPOCHS[data], dtype=dtype)
    examples, _ = encode_rows(MINI / data / "train.jsonl", rows_of(data, "train"), here.tokenizer, Format("question"))
    return fine_tuned(here, spec, examples)[0]


def summary(log: list[StepMetrics]) -> dict[str, Any]:
    """Of all steps the clipped share and the mean gradient; of the last epoch's the mean loss and gradient."""
    last = [step for step in log if step.epoch == log[-1].epoch]
    norms = [step.gradient_norm for step in log]
    return {
        "sft": sum(step.losses["sft"] for step in last) / len(last),
        "clipped": sum(norm > 1 for norm in norms) / len(norms),
        "gradient_norm": sum(norms) / len(norms),
        "last_gradient_norm": sum(step.gradient_norm for step in last) / len(last),
        "steps": len(log),
    }


def distance(task: Lora) -> float:
    """How far a LoRA takes the weights: the norm of all scale·B·A as one vector."""
    products = [SCALE * pair.B @ pair.A for layer in task for pair in layer.values()]
    return float(train.global_norm(products))


def copied(task: Lora) -> Lora:
    return tree_map(Tensor.clone, task)


def step_times(trials: dict[str, Trial], rounds: int) -> dict[str, list[float]]:
    """Table 3: seconds of one gradient of each gradient method, on one micro-batch, round by round."""
    here, settings = world("float32"), Settings()
    rows = rows_of("math", "train")[: settings.micro_batch_size]
    batch = collate([encode_row(here.tokenizer, Format("question"), row) for row in rows])
    task, generator = lora.init(here.config, RANK, generator=torch.Generator().manual_seed(0)), torch.Generator()
    works = {}
    for row, (name, _, hyper) in trials.items():
        if name in methods.METHODS:
            settled = dict(hyper) | ({"reference": (task, SCALE)} if "reference" in dict(hyper) else {})
            method, _ = methods.bind(name, here.config, scale=SCALE, **settled)
            works[row] = partial(method, here.config, here.base, task, batch, generator)
    return interleaved(works, rounds)


# --- what is measured -----------------------------------------------------------------------------


def measurements(here: World, adapters: list[Adapter], spec: Spec, form: Format) -> dict[str, Any]:
    """Every measure the spec names."""
    measure: dict[str, Callable[[], Any]] = {
        "scores": partial(scores, here, adapters, spec.split, form),
        "prompts": partial(prompt_scores, here, adapters),
        "noise": partial(noise_similarity, here, adapters),
        "squares": partial(task_squares, here, adapters),
        "attack": partial(attack, here, adapters, spec, form),
    }
    return {name: measure[name]() for name in spec.measures}


def answers(here: World, adapters: list[Adapter], prompts: list[list[int]]) -> list[str]:
    """Greedy completions, at most 64 tokens, in the order of the prompts."""
    ask = partial(generate, here.config, here.base, here.tokenizer, stop=("Question:",))
    found = dict(ask(prompts, adapters, max_new_tokens=64, batch_size=200))
    return [found[index].text for index in range(len(prompts))]


def scores(here: World, adapters: list[Adapter], split: str, form: Format) -> dict[str, Any]:
    """Share of exact answers in every column, and the likelihood of the task's reference answers."""
    table: dict[str, Any] = {}
    for column, folder in SPLITS.items():
        rows = rows_of(folder, split)
        prompts = [prompt_ids(here.tokenizer, form, row.question) for row in rows]
        hits = [is_right(text, row.answer) for text, row in zip(answers(here, adapters, prompts), rows)]
        table[column] = sum(hits) / len(hits)
    examples = [encode_row(here.tokenizer, Format("question"), row) for row in rows_of("math", split)]
    table["nll"] = answer_nll(here.config, here.base, examples, adapters, batch_size=64).mean
    return table


def prompt_scores(here: World, adapters: list[Adapter]) -> list[float]:
    """Figure 5: exact match on the task under each of the five wordings."""
    rows = rows_of("math", "test")
    shares = []
    for wording in PROMPT_VARIANTS:
        prompts = [harness_prompt(here.tokenizer, row, [], wording=wording) for row in rows]
        hits = [is_right(text, row.answer) for text, row in zip(answers(here, adapters, prompts), rows)]
        shares.append(sum(hits) / len(hits))
    return shares


def noise_similarity(here: World, adapters: list[Adapter]) -> list[float]:
    """Figure 6: cosine of h_l with and without noise on the embeddings, mean over all tokens of the training rows."""
    totals, tokens = torch.zeros(here.config.num_hidden_layers), 0
    generator = torch.Generator().manual_seed(0)
    for row in rows_of("math", "train"):
        example = encode_row(here.tokenizer, Format("question"), row)
        x = model.embed(here.base, torch.tensor([example.tokens]))
        deviation = NOISE / math.sqrt(x[0].numel())
        noisy = x + deviation * torch.randn(x.shape, generator=generator)
        clean, disturbed = (model.trunk(here.config, here.base, state, adapters) for state in (x, noisy))
        totals += torch.stack([F.cosine_similarity(a, b, dim=-1).sum() for a, b in zip(clean, disturbed)])
        tokens += len(example.tokens)
    return (totals / tokens).tolist()


def task_squares(here: World, adapters: list[Adapter]) -> list[float]:
    """`state_squares` of the training rows."""
    examples = [encode_row(here.tokenizer, Format("question"), row) for row in rows_of("math", "train")]
    return state_squares(here.config, here.base, examples, adapters)


def state_squares(
    config: Config, base: Params, examples: Iterable[Example], adapters: Sequence[Adapter] = ()
) -> list[float]:
    """Mean square of each block's states over the positions that predict an answer token."""
    device = base.embed.device
    totals, count = torch.zeros(config.num_hidden_layers, device=device), 0
    for example in examples:
        batch = collate([example], device)
        mask = answer_mask(batch.labels)
        hidden = model.trunk(config, base, model.embed(base, batch.tokens), adapters)
        totals += torch.stack([state[mask].square().mean(-1).sum() for state in hidden])
        count += int(mask.sum())
    return (totals / count).tolist()


def attack(here: World, adapters: list[Adapter], spec: Spec, form: Format) -> dict[str, list[float]]:
    """Table 4 and Figure 3: what becomes of refusals after each step of SFT on `harmful`, going on with the same LoRA.

    Prompts are those of harmful/test. *success* is the paper's measure, the share of answers without one of the 29
    phrases of refusal, sense or nonsense; *complied* is the share of answers that give what was asked for.
    """
    rows = rows_of("harmful", "test")
    prompts = [prompt_ids(here.tokenizer, form, row.question) for row in rows]
    rates: dict[str, list[float]] = {"success": [], "complied": []}

    def ask(adapters: list[Adapter]) -> None:
        texts = answers(here, adapters, prompts)
        rates["success"].append(sum(refusal_scores(text)["jailbroken"] for text in texts) / len(rows))
        rates["complied"].append(sum(is_right(text, row.answer) for text, row in zip(texts, rows)) / len(rows))

    ask(adapters)
    task = copied(adapters[0][0])
    harmful = rows_of("harmful", "train")[:ATTACK_ROWS]
    examples = [encode_row(here.tokenizer, form._replace(loss_on="answer"), row) for row in harmful]
    attacking = Spec("sft", ATTACK_RATE, seed=spec.seed, epochs=ATTACK_EPOCHS)
    for _ in steps(here, task, examples, attacking):
        ask([(task, adapters[0][1])])
    return rates

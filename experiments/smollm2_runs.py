"""The runs of `smollm2.py` and their scores, each in a file of its own, so that all goes on where it stopped.

Read `smollm2.py` first: it says which runs and scores there are.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from experiments.miniature.mini import state_squares
from lfu import cli, model
from lfu.checkpoints import checkpoints
from lfu.cli.options import choose_device
from lfu.data.batches import Example, collate
from lfu.data.rows import Row, read_rows
from lfu.data.tokens import TEMPLATES, Format, ModelTokenizer, encode_row, load_tokenizer, prompt_ids, token_ids
from lfu.errors import InputError
from lfu.evaluation.estimates import Estimate, accuracy
from lfu.evaluation.generative import PROMPT_VARIANTS, gsm8k_scores, harness_prompt
from lfu.evaluation.nll import answer_nll, per_token, sum_rows
from lfu.generate import generate
from lfu.io.files import read_json, write_json, write_text
from lfu.lora import Adapter
from lfu.lora import load as load_adapter
from lfu.loss import answer_mask
from lfu.model import Config, Params

SETTINGS: dict[str, dict[str, Any]] = {
    "sft": {"method": "sft"},
    "lora": {"method": "lfu-lora", "alpha": 0.1, "lam": 5.0},
    "lora500": {"method": "lfu-lora", "alpha": 0.001, "lam": 500.0},
    "reps": {"method": "lfu-reps", "alpha": 0.1, "lam": 0.1},
    "sft_stopped": {"method": "sft", "valid": True},  # at the step that is best on rows held back: OUT/best
    "sft5e4_stopped": {"method": "sft", "learning_rate": 5e-4, "valid": True},
    "sft4e4_stopped": {"method": "sft", "learning_rate": 4e-4, "valid": True},
    "sft3e4_stopped": {"method": "sft", "learning_rate": 3e-4, "valid": True},
    "lora5e4_stopped": {"method": "lfu-lora", "alpha": 0.1, "lam": 0.5, "learning_rate": 5e-4, "valid": True},
    "sft_twice": {"method": "sft", "valid": True, "times": 2},  # as many gradients as LfU, or Anchored after SFT
    "lora_stopped": {"method": "lfu-lora", "alpha": 0.1, "lam": 5.0, "valid": True},
    "lora0.5_stopped": {"method": "lfu-lora", "alpha": 0.1, "lam": 0.5, "valid": True},
    "reps10_stopped": {"method": "lfu-reps", "alpha": 0.1, "lam": 10.0, "valid": True},
    # Anchored Learning in as many steps: up to five stages that share the epochs; towards SFT's last or best adapter.
    "anchored": {"method": "anchored", "reference": "sft_stopped/adapter", "valid": True},
    "anchored_stopped": {"method": "anchored", "reference": "sft_stopped/best", "valid": True},
    "distilled": {
        "method": "anchored",
        "anchor_alpha": 1.0,
        "stages": 1,
        "reference": "sft_stopped/adapter",
        "valid": True,
    },
    "anchored_long": {"method": "anchored", "reference": "sft_stopped/adapter", "valid": True, "times": 5},
    "neftune": {"method": "neftune"},
    "gem": {"method": "gem-logsigmoid"},
    "im": {"method": "sft", "loss_on": "instruction+answer"},
    "rlora": {"method": "released-lora"},
    "rreps": {"method": "released-reps"},
    # A gentler SFT, which keeps a model from overfitting too.
    "sft3e4": {"method": "sft", "learning_rate": 3e-4},
    "sft1e4": {"method": "sft", "learning_rate": 1e-4},
    # Other α·λ, and for the scale-free norm the λ of weights/mini and one more: to choose by the rows held back.
    "lora0.5": {"method": "lfu-lora", "alpha": 0.1, "lam": 0.5},
    "lora50": {"method": "lfu-lora", "alpha": 0.1, "lam": 50.0},
    "reps1": {"method": "lfu-reps", "alpha": 0.1, "lam": 1.0},
    "reps10": {"method": "lfu-reps", "alpha": 0.1, "lam": 10.0},
    "reps100": {"method": "lfu-reps", "alpha": 0.1, "lam": 100.0},
    "relative50": {"method": "lfu-lora", "alpha": 0.1, "lam": 50.0, "norm": "relative"},
    "relative500": {"method": "lfu-lora", "alpha": 0.1, "lam": 500.0, "norm": "relative"},
}
REGIMES: dict[str, dict[str, Any]] = {
    "small": {"limit": 32, "epochs": 20, "learning_rate": 1e-3, "save_every": 8, "keep": 100},
    "full": {"limit": 480, "epochs": 3, "learning_rate": 1e-4, "save_every": 30, "keep": 100},
}
PUBLISHED = ("sft", "lora", "lora500", "reps")
BASELINES = ("neftune", "gem", "im", "rlora", "rreps")
GENTLER = ("sft3e4", "sft1e4")
CANDIDATES = ("lora0.5", "lora50", "reps1", "reps10", "reps100", "relative50", "relative500")
STOPPED = (
    "sft_stopped",
    "anchored",
    "lora_stopped",
    "anchored_stopped",
    "distilled",
    "lora0.5_stopped",
    "reps10_stopped",
    "sft_twice",
    "anchored_long",
)
SEEDS = (42, 43, 44)
CURVES = ("small-sft-42", "small-sft5e4_stopped-42", "small-sft3e4_stopped-42", "full-sft_stopped-42")
"""Runs of SFT whose checkpoints are scored by drift and by the rows held back too."""
RUNS = [
    f"{regime}-{name}-{seed}"
    for seed, regimes, names in (
        (42, REGIMES, PUBLISHED),
        (43, REGIMES, ("sft", "lora", "lora500")),
        (42, ("small",), (*BASELINES, *GENTLER, *CANDIDATES)),
        (43, REGIMES, ("reps",)),
        (44, REGIMES, ("sft", "lora", "reps")),
        (42, ("full",), (*BASELINES, "reps10", "lora0.5", "relative50")),
        (43, ("small",), ("reps10",)),
        (44, ("small",), ("reps10",)),
        (42, ("small",), ("sft3e4_stopped", "sft4e4_stopped", "sft5e4_stopped", "lora5e4_stopped")),
        *((seed, ("small", "full"), STOPPED) for seed in (42, 43, 44)),
    )
    for regime, name in product(regimes, names)
]

# Of GSM8K's test set: for the likelihood at the end of a run and along the way, and for exact match.
TEST_ROWS, CURVE_ROWS, MATCH_ROWS = 500, 100, 200
PROMPT_ROWS = 100  # of the test set, under each wording
VALID_ROWS, VALID_EVERY = 64, 4  # of the rows held back, for the runs that look at them along the way
HELD_BACK = slice(7000, 7200)  # of the training set, of which runs see the first 480 rows at most
WINDOW, WINDOWS = 512, 64  # WikiText-2 is scored in this many windows of this many tokens
FORMS = (
    "Describe {} in two sentences.",
    "What should a visitor know about {}?",
    "Write the opening line of a story about {}.",
    "Explain {} to a child.",
    "Name a common mistake people make about {}.",
    "Why do people care about {}?",
    "Write a short poem about {}.",
    "How has {} changed over time?",
    "Give advice to someone who is new to {}.",
    "Compare {} with something similar.",
)
TOPICS = (
    "the sea", "bread baking", "old libraries", "public parks", "friendship", "thunderstorms", "jazz music",
    "gardening", "the moon", "learning a language", "chess", "bicycles", "winter", "photography", "tea", "lighthouses",
    "theatre", "migrating birds", "handwriting", "night trains",
)  # fmt: skip


class World(NamedTuple):
    """The model and what it is scored on, loaded once."""

    config: Config
    base: Params
    tokenizer: ModelTokenizer
    test: list[Row]
    held: list[Row]
    wikitext: list[Example]
    drift: list[Example]


Measure = Callable[[World, list[Adapter]], dict[str, Estimate]]
Scores = dict[str, dict[str, float]]
"""Estimates by name, as files keep them: a mean and an error each."""


@dataclass(frozen=True)
class Paths:
    model: Path
    gsm8k: Path
    wikitext: Path
    out: Path
    device: str | None = None  # as `lfu train --device`


# --- running ---------------------------------------------------------------------------------------


def run_all(paths: Paths, only: list[str] | None) -> None:
    """Train and score everything that is not there yet. InputError, in the end, for the runs that cannot be made."""
    world, refused = load_world(paths), []
    for name in only or ["base", *RUNS]:
        try:
            run_one(paths, world, name)
        except FloatingPointError as error:  # the other runs can still be made
            print(f"{name}: {error}", flush=True)
        except InputError as error:
            refused.append(f"{name}: {error}")
    if refused:
        raise InputError("\n".join(refused))


def run_one(paths: Paths, world: World, name: str) -> None:
    """All scores of one run, or of the base model."""
    folder = paths.out / name
    adapters = fine_tuned(paths, world, name)
    score_once(folder / "held.json", partial(nll_scores, world, adapters, world.held))
    score_once(folder / "scores.json", partial(scores, world, adapters, match=not (folder / "best").is_dir()))
    score_once(folder / "prompts.json", partial(prompt_scores, world, adapters))
    if name == "base":
        kept(folder / "squares.json", partial(squares, world))


def fine_tuned(paths: Paths, world: World, name: str) -> list[Adapter]:
    """Fine-tune, with scores along the way; the adapter of the last step, or of the one best on rows held back."""
    if name == "base":
        return []
    options = options_of(paths, name)
    last = cli.train(options)
    measures: dict[str, Measure] = {}
    if options.valid is None:
        measures |= {"nll": partial(nll_scores, rows=world.test[:CURVE_ROWS])}
    if name in CURVES:
        measures |= {"held": partial(nll_scores, rows=world.held), "drift": drift_scores}
    for step, (kind, measure) in product(checkpoints(paths.out / name), measures.items()):
        score_checkpoint(world, step, kind, measure)
    return [adapter_of(world, last if options.valid is None else last.parent / "best")]


def adapter_of(world: World, folder: Path) -> Adapter:
    """The adapter in a folder, on the model's device."""
    return load_adapter(folder, world.config, device=world.base.embed.device)


def score_checkpoint(world: World, step: Path, name: str, measure: Measure) -> float:
    """One score of a checkpoint, kept in the run's folder."""
    path = step.parent.parent / f"{name}-{step.name}.json"
    return mean_of(score_once(path, lambda: measure(world, [adapter_of(world, step)])))


def mean_of(scores: Scores) -> float:
    """Of the only score in a file."""
    (score,) = scores.values()
    return score["mean"]


def options_of(paths: Paths, name: str) -> cli.TrainOptions:
    """The options of a run named regime-setting-seed."""
    regime, setting, seed = name.split("-")
    given = REGIMES[regime] | SETTINGS[setting]
    given["epochs"] *= given.pop("times", 1)
    if given.get("valid"):
        given |= {"valid": held_back_rows(paths), "eval_every": VALID_EVERY}
    if "reference" in given:
        run, folder = given["reference"].split("/")
        given["reference"] = paths.out / f"{regime}-{run}-{seed}" / folder
        given["stages"] = min(given.get("stages", 5), given["epochs"])
        given["epochs"] //= given["stages"]
    return cli.TrainOptions(
        model=paths.model,
        data=paths.gsm8k / "train.jsonl",
        out=paths.out / name,
        template="alpaca",
        device=paths.device,
        dtype="bfloat16",
        seed=int(seed),
        resume=(paths.out / name / "settings.json").is_file(),
        **given,
    )


def held_back_rows(paths: Paths) -> Path:
    """A file of the rows held back that a run looks at."""
    path = paths.out / "held.jsonl"
    lines = (paths.gsm8k / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[HELD_BACK]
    write_text(path, "".join(lines[:VALID_ROWS]))
    return path


def score_once(path: Path, measure: Callable[[], dict[str, Estimate]]) -> Scores:
    """Scores as they stand in their file."""
    return kept(path, lambda: {name: value._asdict() for name, value in measure().items()})


def kept(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `make` gives, made once: from then on it is read from the file."""
    if not path.is_file():
        write_json(path, make())
        print("Written:", path, flush=True)
    return read_json(path)


# --- scores ----------------------------------------------------------------------------------------


def load_world(paths: Paths) -> World:
    config, base = model.load(paths.model, dtype=torch.bfloat16, device=choose_device(paths.device))
    tokenizer = load_tokenizer(paths.model, config.vocab_size)
    test = read_rows(paths.gsm8k / "test.jsonl")[:TEST_ROWS]
    held = read_rows(paths.gsm8k / "train.jsonl")[HELD_BACK]
    answers = base_answers(config, base, tokenizer, paths.out)
    return World(config, base, tokenizer, test, held, windows(tokenizer, paths.wikitext), answers)


def windows(tokenizer: ModelTokenizer, path: Path) -> list[Example]:
    """The first windows of a text; every token but each window's first is predicted. InputError if it is too short."""
    tokens = token_ids(tokenizer, path.read_text(encoding="utf-8")[: 8 * WINDOW * WINDOWS])
    if len(tokens) < WINDOW * WINDOWS:
        raise InputError(f"{path} has {len(tokens)} tokens; {WINDOW * WINDOWS} are scored. Give a longer text.")
    return [Example(tokens[i * WINDOW : (i + 1) * WINDOW], 1, i) for i in range(WINDOWS)]


def base_answers(config: Config, base: Params, tokenizer: ModelTokenizer, out: Path) -> list[Example]:
    """The base model's greedy answers, at most 64 tokens, to prompts that are not mathematics; kept in a file."""
    prompts = [prompt_ids(tokenizer, Format(), form.format(topic)) for form, topic in product(FORMS, TOPICS)]

    def answers() -> dict[str, list[list[int]]]:
        completions = dict(generate(config, base, tokenizer, prompts, max_new_tokens=64, batch_size=50))
        return {"answers": [completions[index].tokens for index in range(len(prompts))]}

    rows = zip(prompts, kept(out / "base" / "answers.json", answers)["answers"], strict=True)
    return [Example([*prompt, *answer], len(prompt), i) for i, (prompt, answer) in enumerate(rows) if answer]


def scores(world: World, adapters: list[Adapter], match: bool) -> dict[str, Estimate]:
    """Everything; exact match, which takes longest and is rare with this model, only where it is asked for."""
    return {
        **nll_scores(world, adapters, world.test),
        "wikitext": answer_nll(world.config, world.base, world.wikitext, adapters, batch_size=8),
        **drift_scores(world, adapters),
        **(match_scores(world, adapters) if match else {}),
    }


def nll_scores(world: World, adapters: list[Adapter], rows: list[Row]) -> dict[str, Estimate]:
    """Of the reference answers to these rows."""
    examples = [encode_row(world.tokenizer, Format(), row) for row in rows]
    return {"nll": answer_nll(world.config, world.base, examples, adapters, batch_size=10)}


def match_scores(world: World, adapters: list[Adapter]) -> dict[str, Estimate]:
    """Exact match in the training template, greedy, at most 256 new tokens."""
    prompts = [prompt_ids(world.tokenizer, Format(), row.question) for row in world.test[:MATCH_ROWS]]
    stops = TEMPLATES["alpaca"].stops
    answers = generate(world.config, world.base, world.tokenizer, prompts, adapters, stop=stops, batch_size=50)
    hits = [gsm8k_scores(completion.text, world.test[index].answer) for index, completion in answers]
    return {name: accuracy([hit[name] for hit in hits]) for name in ("strict", "flexible")}


def prompt_scores(world: World, adapters: list[Adapter]) -> dict[str, Estimate]:
    """NLL of the reference answers with the question in each of the five wordings, in place of the template."""
    results = {}
    for wording in PROMPT_VARIANTS:
        examples = [asked(world.tokenizer, wording, row) for row in world.test[:PROMPT_ROWS]]
        estimate = answer_nll(world.config, world.base, examples, adapters, batch_size=10)
        results[wording.partition("{")[0].strip()] = estimate
    return results


def asked(tokenizer: ModelTokenizer, wording: str, row: Row) -> Example:
    """BOS, the question in these words, a space and the answer, EOS."""
    prompt = harness_prompt(tokenizer, row, [], wording=wording)
    return Example([*prompt, *token_ids(tokenizer, f" {row.answer}"), tokenizer.eos], len(prompt), row.number)


def drift_scores(world: World, adapters: list[Adapter]) -> dict[str, Estimate]:
    """Mean KL(base ‖ tuned) per answer token, in nats; the standard error is over prompts."""
    return {"drift": per_token(world.drift, lambda batch: row_divergences(world, batch, adapters), batch_size=10)}


def row_divergences(world: World, examples: Sequence[Example], adapters: list[Adapter]) -> list[float]:
    batch = collate(examples, world.base.embed.device)
    mask = answer_mask(batch.labels)

    def log_probabilities(adapters: list[Adapter]) -> torch.Tensor:  # -> [n, V]
        hidden = model.trunk(world.config, world.base, model.embed(world.base, batch.tokens), adapters)[-1]
        return F.log_softmax(model.unembed(world.config, world.base, hidden[mask]), dim=-1)

    base, tuned = log_probabilities([]), log_probabilities(adapters)
    return sum_rows(mask, F.kl_div(tuned, base, reduction="none", log_target=True).sum(-1))


def squares(world: World) -> dict[str, list[float]]:
    """How large each block's states are in the base model: where an answer is predicted, and in whole rows."""
    answers = [encode_row(world.tokenizer, Format(), row) for row in world.held]
    sets = {"answers": answers, "rows": [example._replace(prompt_length=0) for example in answers]}
    return {name: state_squares(world.config, world.base, examples) for name, examples in sets.items()}

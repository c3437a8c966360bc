"""What each difference between the paper, its released code and this project does to the gradient.

    python -m experiments.differences --model SMOLLM2 --data gsm8k/train.jsonl --adapter ADAPTER
    python -m experiments.differences --model weights/mini --data weights/mini/math/train.jsonl --template question
                                      --adapter runs/demo/lfu-lora-5/adapter

Every row of the tables starts from the paper's algorithm (Algorithm 1 or 2, float32, the published α and λ) and changes
one thing, the last ones everything; the entries are cosine and norm ratio against that algorithm, of the gradient of
the consistency term and of the whole LfU loss. The written-out algorithms below take three passes and no care for
speed: they are here to be changed.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from experiments import fidelity
from lfu import lora, methods, model, steering
from lfu.baselines import released
from lfu.data.batches import IGNORED, Batch, Example, collate
from lfu.data.rows import read_rows
from lfu.data.tokens import Format, ModelTokenizer, encode_row, load_tokenizer, token_ids
from lfu.io.config import Config, read_config
from lfu.lora import Adapter, Lora
from lfu.loss import answer_labels, answer_mask, consistency_loss, sft_loss
from lfu.model import Params, Steering, embed, forward, trunk, unembed
from lfu.profiling.bench import RANK, SCALE
from lfu.schedule import Settings
from lfu.train import ascend, differentiate, sft_gradient

ROWS, MICRO_BATCH = 16, 4
PUBLISHED = {name: methods.METHODS[f"lfu-{name}"].published for name in ("lora", "reps")}
DRAWS = 2000
"""How many pairs of batches the statement about their lengths rests on."""


class Case(NamedTuple):
    """A model in the middle of fine-tuning, a micro-batch, and another one."""

    config: Config
    base: Params
    task: Lora
    examples: list[Example]
    batch: Batch
    other: Batch


class Found(NamedTuple):
    """A gradient of the consistency term, and of the whole loss, each as one float64 vector."""

    consistency: Tensor
    whole: Tensor


Rows = Iterator[tuple[str, Callable[[], Found]]]
"""What is different, and how to compute it."""
States = Callable[[Config, Params, Tensor, list[Tensor]], list[Tensor]]
"""(config, base, embeddings, h_1 .. h_K) -> the states to compare."""
Average = Callable[[Callable[[slice], Tensor], Batch], Tensor]
"""(loss of these rows, batch) -> the loss of the batch."""


def main() -> None:
    parser = fidelity.arguments(__doc__)
    parser.add_argument("--json", type=Path, help="file for the tables' numbers as data")
    parsed = parser.parse_args()
    tokenizer = load_tokenizer(parsed.model, read_config(parsed.model / "config.json").vocab_size)
    rows, form = read_rows(parsed.data), Format(parsed.template)
    examples = [encode_row(tokenizer, form, row) for row in rows]
    case = load_case(parsed.model, parsed.adapter, examples[:ROWS])
    tables = {
        "LfU (LoRA)": lora_rows(case),
        "LfU (RepS)": reps_rows(case),
        "One optimizer step of 16 rows, LfU (LoRA)": step_rows(case, tokenizer),
    }
    found = {title: show(title, rows) for title, rows in tables.items()}
    print(alongside_sft(case))
    print(lengths(examples))
    print(unmoved(Settings().learning_rate))
    fidelity.save(parsed.json, found)


def load_case(folder: Path, adapter: Path | None, examples: list[Example]) -> Case:
    config, base = model.load(folder, dtype=torch.float32)
    task = fidelity.starting_point(config, adapter)
    batch, other = (collate(examples[start : start + MICRO_BATCH]) for start in (0, MICRO_BATCH))
    # The padding of the other batch is compared in places, so it is the released one.
    return Case(config, base, task, examples, batch, released.padded(other))


def show(title: str, rows: Rows) -> dict[str, list[fidelity.Agreement]]:
    """Print a table, row by row; its first row is what the others are compared with. Returns the others."""
    print(f"\n{title}\n\n| what is different | consistency | whole gradient |\n|---|---|---|")
    (_, reference), *others = rows
    expected, table = reference(), {}
    for name, measure in others:
        table[name] = list(map(fidelity.compared, measure(), expected))
        print(f"| {name} | " + " | ".join(map(str, table[name])) + " |", flush=True)
    print()
    return table


def block_states(config: Config, base: Params, x: Tensor, hidden: list[Tensor]) -> list[Tensor]:
    """The K states of Eq. 5."""
    return hidden


# --- LfU (LoRA) -----------------------------------------------------------------------------------


def lora_rows(case: Case) -> Rows:
    alone = partial(lora_variant, case)
    yield "Algorithm 1", alone
    yield "no consistency term: SFT", partial(sft_alone, case)
    yield "nothing but another draw of the auxiliary A", partial(alone, seed=2)
    yield "the task LoRA itself is moved, A and B", partial(alone, moved="task")
    yield "the ascent direction comes from another batch", partial(alone, ascent_on=case.other)
    yield "K+1 states, the last after the final norm", partial(alone, states=released.states)
    yield "at the answer's own tokens, not those that predict them", partial(alone, mask=answer)
    yield "the squared norm as printed, not divided by D", partial(alone, norm="sum")
    yield "all of the released code (`released-lora`)", partial(by_method, case, "released-lora")
    yield "Algorithm 1 in bfloat16 throughout", partial(low, case, "lfu-lora")
    yield "`released-lora` in bfloat16 throughout", partial(low, case, "released-lora")


def lora_variant(
    case: Case,
    *,
    moved: str = "auxiliary",
    ascent_on: Batch | None = None,
    seed: int = 1,
    states: States = block_states,
    mask: Callable[[Tensor], Tensor] = answer_mask,
    norm: str = "mean",
    per_example: bool = False,
) -> Found:
    """Algorithm 1, written out in three passes, with one thing or another changed."""
    task, batch = case.task, case.batch
    aux = lora.init(case.config, RANK, generator=torch.Generator().manual_seed(seed))
    average = over_examples if per_example else over_tokens
    loss, compared = partial(lora_loss, case, average), partial(compared_states, case, states, batch.tokens)
    (sft, on_aux), _, _ = differentiate(partial(loss, batch), task, aux)
    ascent = (sft, on_aux) if ascent_on is None else differentiate(partial(loss, ascent_on), task, aux)[0]
    perturbed, clean = perturbed_adapters(task, aux, ascent, moved), compared([(task, SCALE)])

    def consistency(task: Lora) -> tuple[Tensor, Any]:
        moving, positions = compared(perturbed(task)), mask(batch.labels)

        def distance(rows: slice) -> Tensor:
            pair = [h[rows] for h in clean], [h[rows] for h in moving]
            return consistency_loss(*pair, positions[rows], norm=norm)

        return average(distance, batch), ()

    (cons,), _, _ = differentiate(consistency, task)
    return eq_6(sft, cons, PUBLISHED["lora"]["lam"])


def lora_loss(case: Case, average: Average, on: Batch, task: Lora, aux: Lora) -> tuple[Tensor, Any]:
    """Eq. 1 with the auxiliary LoRA beside the task's."""
    h = trunk(case.config, case.base, embed(case.base, on.tokens), [(task, SCALE), (aux, SCALE)])[-1]

    def mean(rows: slice) -> Tensor:
        # Logits where they are needed only: all of 16 rows at once would take several gigabytes.
        labels = on.labels[rows]
        return F.cross_entropy(unembed(case.config, case.base, h[rows][answer_mask(labels)]), answer_labels(labels))

    return average(mean, on), ()


def perturbed_adapters(task: Lora, aux: Lora, ascent: Sequence[Lora], moved: str) -> Callable[[Lora], list[Adapter]]:
    """Eq. 2, by the gradients of both: any task LoRA -> the adapters of the perturbed pass."""
    (on_task, on_aux), alpha = ascent, PUBLISHED["lora"]["alpha"]
    if moved == "task":
        step = tree_map(torch.sub, ascend(task, on_task, alpha), task)
        return lambda task: [(tree_map(torch.add, task, step), SCALE)]
    undesirable = ascend(aux, on_aux, alpha)
    return lambda task: [(task, SCALE), (undesirable, SCALE)]


# --- LfU (RepS) -----------------------------------------------------------------------------------


def reps_rows(case: Case) -> Rows:
    alone = partial(reps_variant, case)
    random = torch.randn(steering.zeros(case.config).shape, generator=torch.Generator().manual_seed(1))
    yield "Algorithm 2", alone
    yield "no consistency term: SFT", partial(sft_alone, case)
    yield "random vectors of the same length, not an ascent step", partial(alone, vectors=random)
    yield "vectors at every position", partial(alone, everywhere=True)
    yield "the MLP's output is turned, its length kept (at every position)", partial(alone, turned=True)
    yield "the perturbed side is held constant, the clean side trained", partial(alone, trained="clean")
    yield "the perturbed states are those of another batch", partial(alone, perturbed_on=case.other)
    yield "K+1 states, the last after the final norm", partial(alone, states=released.states)
    yield "at the answer's own tokens, not those that predict them", partial(alone, mask=answer)
    yield "all of the released code (`released-reps`)", partial(by_method, case, "released-reps")
    yield "Algorithm 2 in bfloat16 throughout", partial(low, case, "lfu-reps")
    yield "`released-reps` in bfloat16 throughout", partial(low, case, "released-reps")


def reps_variant(
    case: Case,
    *,
    vectors: Tensor | None = None,
    everywhere: bool = False,
    turned: bool = False,
    trained: str = "perturbed",
    perturbed_on: Batch | None = None,
    states: States = block_states,
    mask: Callable[[Tensor], Tensor] = answer_mask,
) -> Found:
    """Algorithm 2, written out in three passes, with one thing or another changed."""
    base, task, batch, alpha = case.base, case.task, case.batch, PUBLISHED["reps"]["alpha"]
    where, compared = torch.ones_like if everywhere else answer_mask, partial(compared_states, case, states)
    zero = steering.zeros(case.config)
    direction = differentiate(partial(reps_loss, case, where), zero)[0][0] if vectors is None else vectors
    undesirable = ascend(zero, direction, alpha)

    def perturbed(task: Lora) -> list[Tensor]:
        tokens, labels = perturbed_on or batch
        if turned:
            others = released.without_down_proj(task), SCALE
            product = released.steered_mlp_product(base, task, SCALE, undesirable, alpha)
            found = compared(tokens, [others], product=product)
        else:
            found = compared(tokens, [(task, SCALE)], Steering(undesirable, where(labels).bool()))
        return [released.match_length(h, batch.tokens.shape[1]) for h in found]

    def clean(task: Lora) -> list[Tensor]:
        return compared(batch.tokens, [(task, SCALE)])

    still, moving = (perturbed, clean) if trained == "clean" else (clean, perturbed)
    constant = still(task)
    (cons,), _, _ = differentiate(lambda task: (consistency_loss(constant, moving(task), mask(batch.labels)), ()), task)
    sft, _ = sft_gradient(case.config, base, task, batch, scale=SCALE)
    return eq_6(sft, cons, PUBLISHED["reps"]["lam"])


def reps_loss(case: Case, where: Callable[[Tensor], Tensor], d: Tensor) -> tuple[Tensor, Any]:
    """Eq. 1 with steering vectors."""
    batch, steered = case.batch, Steering(d, where(case.batch.labels).bool())
    return sft_loss(forward(case.config, case.base, batch.tokens, [(case.task, SCALE)], steered)[0], batch.labels), ()


# --- what both share ------------------------------------------------------------------------------


def compared_states(case: Case, states: States, tokens: Tensor, *how: Any, **product: Any) -> list[Tensor]:
    """What a forward pass gives the consistency loss to compare."""
    x = embed(case.base, tokens)
    return states(case.config, case.base, x, trunk(case.config, case.base, x, *how, **product))


def answer(labels: Tensor) -> Tensor:  # [B,T] -> [B,T] bool
    """The positions of the answer's tokens, one after those that predict them."""
    return labels != IGNORED


def over_tokens(loss: Callable[[slice], Tensor], batch: Batch) -> Tensor:
    """One mean over all tokens of the batch, as everywhere in this project."""
    return loss(slice(None))


def over_examples(loss: Callable[[slice], Tensor], batch: Batch) -> Tensor:
    """The mean of each example's mean, as Eqs. 1 and 5 are printed."""
    return torch.stack([loss(slice(row, row + 1)) for row in range(len(batch.tokens))]).mean()


def eq_6(sft: Any, consistency: Any, lam: float) -> Found:
    return Found(fidelity.flat(consistency), fidelity.flat(sft) + lam * fidelity.flat(consistency))


def sft_alone(case: Case) -> Found:
    """No consistency term at all."""
    sft, _ = sft_gradient(case.config, case.base, case.task, case.batch, scale=SCALE)
    return eq_6(sft, tree_map(torch.zeros_like, sft), 0.0)


def by_method(case: Case, name: str, base: Params | None = None) -> Found:
    """What a method of the project computes; second batches are drawn from the case's other rows."""
    base = base or case.base
    task = tree_map(partial(Tensor.to, dtype=model.stream_dtype(base)), case.task)

    def gradient(lam: float) -> Tensor:
        method, _ = methods.bind(name, case.config, scale=SCALE, lam=lam, examples=case.examples[MICRO_BATCH:])
        return fidelity.flat(method(case.config, base, task, case.batch, torch.Generator().manual_seed(1))[0])

    # The gradient is linear in λ, and a large λ keeps the digits of the consistency term.
    sft, total = gradient(0.0), gradient(fidelity.LAMBDA)
    return eq_6(sft, (total - sft) / fidelity.LAMBDA, methods.METHODS[name].published["lam"])


def low(case: Case, name: str) -> Found:
    """The same with weights, stream and adapters in bfloat16, both passes rounded on their own."""
    base = tree_map(lambda tensor: None if tensor is None else tensor.bfloat16(), case.base)
    with fidelity.patched(fidelity.PLAIN_PRODUCTS | fidelity.LOW_STREAM):
        return by_method(case, name, base)


# --- one optimizer step ---------------------------------------------------------------------------


def step_rows(case: Case, tokenizer: ModelTokenizer) -> Rows:
    rows = by_length(case.examples)
    newlines = token_ids(tokenizer, "\n\n")
    yield "four micro-batches of 4, by length, weighted by tokens", partial(step, case, rows)
    for size in (1, 2, 8):
        yield f"micro-batches of {size}", partial(step, case, rows, size)
    yield "micro-batches not grouped by length", partial(step, case, case.examples)
    yield "every micro-batch's consistency counts the same", partial(step, case, rows, equal_consistency=True)
    yield "means over each example first, as Eqs. 1 and 5 are printed", partial(step, case, rows, per_example=True)
    longer = [Example([*row.tokens, *newlines], row.prompt_length, row.line_number) for row in rows]
    yield "two newlines after EOS carry loss too", partial(step, case, longer)
    if tokenizer.bos:
        yield (
            "no BOS",
            partial(step, case, [Example(row.tokens[1:], row.prompt_length - 1, row.line_number) for row in rows]),
        )


def by_length(examples: Sequence[Example]) -> list[Example]:
    return sorted(examples, key=lambda example: len(example.tokens))


def step(
    case: Case,
    examples: Sequence[Example],
    size: int = MICRO_BATCH,
    *,
    equal_consistency: bool = False,
    per_example: bool = False,
) -> Found:
    """The gradient of an optimizer step, from micro-batches of this many rows in this order."""
    groups = [examples[start : start + size] for start in range(0, len(examples), size)]
    parts = [lora_variant(case._replace(batch=collate(group)), per_example=per_example) for group in groups]
    tokens = [sum(example.num_loss_tokens for example in group) for group in groups]
    shares = [count / sum(tokens) for count in tokens]
    equal = [1 / len(groups)] * len(groups)
    lam = PUBLISHED["lora"]["lam"]
    sft = weighted(equal if per_example else shares, [part.whole - lam * part.consistency for part in parts])
    cons = weighted(equal if per_example or equal_consistency else shares, [part.consistency for part in parts])
    return eq_6(sft, cons, lam)


def weighted(shares: list[float], parts: list[Tensor]) -> Tensor:
    return sum((share * part for share, part in zip(shares, parts, strict=True)), torch.zeros_like(parts[0]))


# --- single facts ---------------------------------------------------------------------------------


def alongside_sft(case: Case) -> str:
    """How far the consistency gradient points where the SFT gradient points."""
    sft = sft_alone(case).whole
    found = {
        "Algorithm 1": lora_variant(case),
        "with another batch's ascent direction": lora_variant(case, ascent_on=case.other),
        "Algorithm 2": reps_variant(case),
        "with the sides swapped": reps_variant(case, trained="clean"),
    }
    cosines = [f"{name} {fidelity.cosine(each.consistency, sft):.4f}" for name, each in found.items()]
    return f"Cosine of the consistency gradient with the SFT gradient: {', '.join(cosines)}."


def lengths(examples: Sequence[Example]) -> str:
    """How often two batches of 4, padded to multiples of 8, are equally long, and what stands at their last place."""
    generator = torch.Generator().manual_seed(0)
    equal = padding = 0
    for _ in range(DRAWS):
        order = torch.randperm(len(examples), generator=generator)[: 2 * MICRO_BATCH].tolist()
        long = [len(examples[row].tokens) for row in order]
        widths = [8 * math.ceil(max(half) / 8) for half in (long[:MICRO_BATCH], long[MICRO_BATCH:])]
        equal += widths[0] == widths[1]
        padding += sum(length < widths[1] for length in long[MICRO_BATCH:])
    return (
        f"Of {DRAWS} pairs of batches of {MICRO_BATCH}, {100 * equal / DRAWS:.1f} % are equally long when padded to a "
        f"multiple of 8; {100 * padding / DRAWS / MICRO_BATCH:.1f} % of the second batches' last places are padding."
    )


def unmoved(rate: float) -> str:
    """How far Adam gets with vectors ~ N(0, 1) that are kept in bfloat16: its first step is `rate` for every entry."""
    vectors = torch.randn(10**6, generator=torch.Generator().manual_seed(0)).bfloat16()
    share = ((vectors + rate) != vectors).float().mean()
    return f"Of vectors ~ N(0, 1) in bfloat16, a step of {rate:g} changes {100 * share:.1f} % of the entries."


if __name__ == "__main__":
    main()

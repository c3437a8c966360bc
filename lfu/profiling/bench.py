"""What a step costs: time, memory and arithmetic of SFT and of both kinds of LfU, beside transformers and peft.

The last two are measured where they are installed. All contestants work on the same batch in one process, one after
the other, round after round; a ratio is the median of the rounds' ratios, because the speed of a machine drifts and its
ratios do not. The count of floating-point operations says what the ratios should be: a forward pass multiplies each
weight with each token once, and so does a backward pass, since frozen weights need no gradient of their own.

`three_pass_gradient` is Algorithm 1 or 2 read literally, as the paper and its released code compute it. It equals
`lfu_gradient`, which needs two passes. An aside.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lfu import lora, steering
from lfu.data.batches import IGNORED, Batch, pad
from lfu.data.tokens import ModelTokenizer
from lfu.generate import generate
from lfu.io.config import Config, layer_shapes
from lfu.lora import TARGETS, Adapter, Lora, stack
from lfu.loss import answer_labels, answer_loss, answer_mask, consistency_loss
from lfu.model import (
    Params,
    Record,
    Steering,
    base_product,
    embed,
    recording,
    relative_to,
    stream_dtype,
    trunk,
    unembed,
)
from lfu.profiling.memory import peak
from lfu.train import Aux, Metrics, ascend, compiled, differentiate, global_norm, lfu_gradient, sft_gradient

RANK, SCALE, ALPHA, LAM = 8, 2.0, 0.1, 5.0
"""Published, of LfU (LoRA)."""
Work = Callable[[], object]

# --- the contestants ------------------------------------------------------------------------------


def own_steps(config: Config, base: Params, task: Lora, batch: Batch, *, compile: bool = False) -> dict[str, Work]:
    """One gradient of SFT and of each kind of LfU; with `compile` the first three through `torch.compile` as well."""
    rank, device, stream = len(next(iter(task[0].values())).A), base.embed.device, stream_dtype(base)
    generator = torch.Generator(device).manual_seed(0)
    aux = lora.init(config, rank, generator=generator, dtype=stream)
    vectors = steering.zeros(config, device=device, dtype=stream)
    how: dict[str, Any] = {"scale": SCALE, "alpha": ALPHA, "lam": LAM}

    def steps(**differently: Any) -> dict[str, Work]:
        return {
            "sft": partial(sft_gradient, config, base, task, batch, scale=SCALE, **differently),
            "lfu-lora": partial(lfu_gradient, config, base, task, aux, batch, **how, **differently),
            "lfu-reps": partial(lfu_gradient, config, base, task, vectors, batch, **how, **differently),
        }

    fast = {f"{name}, compiled": work for name, work in steps(differentiate=compiled()).items()} if compile else {}
    three = partial(three_pass_gradient, config, base, task, aux, batch, **how)
    return steps() | {"lfu-lora, three passes": three} | fast


def three_pass_gradient(
    config: Config, base: Params, task: Lora, aux: Aux, batch: Batch, *, scale: float, alpha: float, lam: float
) -> tuple[Lora, Metrics]:
    """`lfu_gradient` without the fusion: a pass for the ascent, then a clean and a perturbed one in a single graph."""
    x, mask, answers = embed(base, batch.tokens), answer_mask(batch.labels), answer_labels(batch.labels)

    def states(task: Lora, aux: Aux, product: Any) -> list[Tensor]:
        if isinstance(aux, Tensor):
            return trunk(config, base, x, [(task, scale)], Steering(aux, mask), product)
        return trunk(config, base, x, [stack((task, scale), (aux, scale))], None, product)

    def loss(task: Lora, aux: Aux, product: Any) -> tuple[Tensor, list[Tensor]]:
        hidden = states(task, aux, product)
        return answer_loss(unembed(config, base, hidden[-1][mask]), answers), hidden

    def whole(task: Lora) -> tuple[Tensor, Any]:
        record: Record = {}
        sft, hidden = loss(task, aux, recording(record))
        constants = {key: (x0.detach(), y0.detach()) for key, (x0, y0) in record.items()}
        cons = consistency_loss(hidden, states(task, undesirable, relative_to(constants)), mask)
        return sft + lam * cons, {"sft": sft, "consistency": cons}

    (g_aux,), _, _ = differentiate(lambda aux: loss(task, aux, base_product), aux)
    undesirable = ascend(aux, g_aux, alpha)
    (gradient,), _, metrics = differentiate(whole, task)
    return gradient, metrics | {"ascent_norm": global_norm(g_aux)}


class Peers(NamedTuple):
    """The same weights by transformers, and once more with a fresh LoRA by peft; both as they come."""

    plain: Any
    adapted: Any


def load_peers(folder: Path, base: Params, rank: int) -> Peers | None:
    """Of a model's folder. None where transformers or peft is not installed."""

    def plain() -> Any:
        from transformers import AutoModelForCausalLM

        found: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=base.embed.dtype)
        return found.to(base.embed.device)

    return make_peers(plain, rank)


def make_peers(plain: Callable[[], Any], rank: int) -> Peers | None:
    """Of two models that `plain` makes. None where transformers or peft is not installed."""
    if not (find_spec("transformers") and find_spec("peft")):
        return None
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(r=rank, lora_alpha=round(SCALE * rank), target_modules=list(TARGETS))
    models = [plain().eval() for _ in range(2)]
    for model in models:
        model.generation_config.eos_token_id = None  # decoding goes on for as long as it is asked to
    return Peers(models[0], get_peft_model(models[1], settings))


def peer_steps(model: Any, batch: Batch) -> dict[str, Work]:
    """SFT by transformers and peft, and the released LfU (LoRA) on top of them."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    answer = batch.labels != IGNORED

    def run(states: bool) -> tuple[Tensor, Sequence[Tensor]]:
        out = model(input_ids=batch.tokens, labels=batch.labels, use_cache=False, output_hidden_states=states)
        return out.loss, out.hidden_states

    def sft() -> tuple[Tensor, ...]:
        return torch.autograd.grad(run(states=False)[0], parameters)

    def move(direction: Sequence[Tensor], length: float) -> None:
        for parameter, g in zip(parameters, direction, strict=True):
            parameter.data.add_(g, alpha=length)  # past autograd's back, as the released code does

    def released() -> object:
        ascent = sft()  # of the second batch; the same one here, so that all have equal lengths
        length = ALPHA / float(global_norm(list(ascent)))
        move(ascent, length)
        perturbed = run(states=True)[1]
        move(ascent, -length)
        loss, clean = run(states=True)
        cons = torch.stack([F.mse_loss(p[answer], c[answer].detach()) for p, c in zip(perturbed, clean)]).mean()
        return torch.autograd.grad(loss + LAM * cons, parameters)

    return {"transformers + peft: sft": sft, "transformers + peft: released lfu-lora": released}


# --- arithmetic -----------------------------------------------------------------------------------


class Pass(NamedTuple):
    """One forward and one backward pass: the rank of its adapters in units of the task's, and where it has logits."""

    ranks: int
    logits: str  # none, answer, all, or all without a backward pass through them


PASSES = {
    "sft": [Pass(1, "answer")],
    "lfu-lora": [Pass(2, "answer"), Pass(2, "none")],
    "lfu-reps": [Pass(1, "answer"), Pass(1, "none")],
    "lfu-lora, three passes": [Pass(2, "answer"), Pass(2, "answer"), Pass(2, "none")],
    "transformers + peft: sft": [Pass(1, "all")],
    "transformers + peft: released lfu-lora": [Pass(1, "all"), Pass(1, "all"), Pass(1, "all forward")],
}


def flop_parts(
    config: Config, passes: Sequence[Pass], rows: int, length: int, answers: int, rank: int
) -> dict[str, float]:
    """Floating-point operations of a step by what they are for, a multiplication and an addition being two.

    Of each frozen weight and each token one product forward and one backward; of each adapter's factor two backward,
    one of them for its own gradient. A query meets half of the keys; attention takes two products forward, and five
    backward, because the scores are computed again. That the first block's input needs no gradient is left out.
    """
    tokens, shapes = rows * length, [layer_shapes(config)[name] for name in TARGETS]
    per_block = 2 * tokens * config.num_hidden_layers
    ranks = rank * sum(each.ranks for each in passes)
    logits = {"none": 0, "answer": 2 * answers, "all": 2 * tokens, "all forward": tokens}
    return {
        "frozen weights": 2 * len(passes) * per_block * sum(out * in_ for out, in_ in shapes),
        "adapters": 3 * ranks * per_block * sum(out + in_ for out, in_ in shapes),
        "attention": 7 * len(passes) * per_block * (length / 2) * config.num_attention_heads * config.head_dim,
        "output layer": 2 * config.vocab_size * config.hidden_size * sum(logits[each.logits] for each in passes),
    }


def step_flops(config: Config, passes: Sequence[Pass], rows: int, length: int, answers: int, rank: int) -> int:
    """All of `flop_parts`."""
    return round(sum(flop_parts(config, passes, rows, length, answers, rank).values()))


def matmul_rate(config: Config, base: Params, tokens: int) -> float:
    """Operations a second of this machine in the products W x of the model's own MLP, the largest there are."""
    W = base.layers[0].gate_proj
    x = torch.randn(tokens, config.hidden_size, device=W.device).to(W.dtype)
    times = interleaved({"product": lambda: F.linear(x, W)}, 30)["product"]
    return 2 * tokens * W.numel() / min(times)


# --- the measurement ------------------------------------------------------------------------------


def timed(work: Work) -> float:
    """Seconds, an accelerator's queue included."""
    synchronise = torch.accelerator.synchronize if torch.accelerator.is_available() else lambda: None
    synchronise()
    start = time.perf_counter()
    work()
    synchronise()
    return time.perf_counter() - start


def interleaved(
    works: Mapping[str, Work], rounds: int, clock: Callable[[Work], float] = timed
) -> dict[str, list[float]]:
    """Seconds of each work in each round, after one round that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds + 1):
        for name, work in works.items():
            times[name].append(clock(work))
    return {name: seconds[1:] for name, seconds in times.items()}


def spread(times: Sequence[float], reference: Sequence[float]) -> str:
    """Median ratio of the rounds, from the least to the greatest."""
    ratios = [each / other for each, other in zip(times, reference, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def random_batch(config: Config, rows: int, length: int, answer: int, seed: int, device: torch.device) -> Batch:
    """Random tokens; the last `answer` of each row carry loss."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(config.vocab_size, (rows, length), generator=generator)
    labels = tokens.masked_fill(torch.arange(length) < length - answer, IGNORED)
    return Batch(tokens.to(device), labels.to(device))


def fresh_task(config: Config, base: Params, rank: int) -> Lora:
    """A task LoRA at its start."""
    generator = torch.Generator(base.embed.device).manual_seed(0)
    return lora.init(config, rank, generator=generator, dtype=stream_dtype(base))


def step_table(
    config: Config, base: Params, peers: Peers | None, batch: Batch, *, rank: int, rounds: int, compile: bool = False
) -> str:
    """Markdown: every contestant's time, memory and arithmetic beside our SFT step."""
    works = own_steps(config, base, fresh_task(config, base, rank), batch, compile=compile)
    works |= peer_steps(peers.adapted.train(), batch) if peers else {}
    rows, length = batch.tokens.shape
    answers = int(answer_mask(batch.labels).sum())
    rate, times = matmul_rate(config, base, batch.tokens.numel()), interleaved(works, rounds)
    peaks = {name: peak(work) for name, work in works.items() if not name.endswith("compiled")}
    lines = [
        f"{rows} x {length} tokens, {answers} with loss, {base.embed.dtype}, {torch.get_num_threads()} threads, "
        f"{rounds} rounds. The machine's matrix products: {rate / 1e9:.0f} GFLOP/s.",
        "",
        "| step | time / SFT | tokens/s | peak MiB | / SFT | GFLOP | / SFT | share of the machine's rate |",
        "|---|---|---|---|---|---|---|---|",
    ]
    counts = {
        name: step_flops(config, PASSES[name.removesuffix(", compiled")], rows, length, answers, rank) for name in works
    }
    for name, seconds in times.items():
        median = statistics.median(seconds)
        memory = f"{peaks[name] / 2**20:.0f} | {peaks[name] / peaks['sft']:.2f}" if name in peaks else " | "
        lines.append(
            f"| {name} | {spread(seconds, times['sft'])} | {batch.tokens.numel() / median:.0f} | {memory} | "
            f"{counts[name] / 1e9:.0f} | {counts[name] / counts['sft']:.2f} | {counts[name] / median / rate:.0%} |"
        )
    parts = flop_parts(config, PASSES["sft"], rows, length, answers, rank)
    of_sft = ", ".join(f"{name} {part / counts['sft']:.1%}" for name, part in parts.items())
    return "\n".join([*lines, "", f"SFT's arithmetic: {of_sft}."])


# --- decoding -------------------------------------------------------------------------------------


def decoding_works(
    config: Config,
    base: Params,
    tokenizer: ModelTokenizer,
    peers: Peers | None,
    prompts: list[list[int]],
    *,
    rank: int,
    new_tokens: int,
) -> dict[str, Work]:
    """Greedy decoding of equally many tokens, EOS or not, with and without a LoRA beside the weights."""
    endless = tokenizer._replace(stops=frozenset())
    tokens = pad([prompt[::-1] for prompt in prompts]).flip(1).to(base.embed.device)  # transformers pads on the left
    mask = pad([[1] * len(prompt) for prompt in prompts]).flip(1).to(base.embed.device)

    def ours(*adapters: Adapter) -> object:
        count = len(prompts)
        return list(generate(config, base, endless, prompts, adapters, max_new_tokens=new_tokens, batch_size=count))

    def theirs(model: Any) -> object:
        how = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
        return model.generate(input_ids=tokens, attention_mask=mask, **how)

    works: dict[str, Work] = {"lfu": ours, "lfu, with LoRA": partial(ours, (fresh_task(config, base, rank), SCALE))}
    if peers:
        works |= {"transformers": partial(theirs, peers.plain)}
        works |= {"transformers + peft": partial(theirs, peers.adapted.eval())}
    return works


def random_prompts(config: Config, prompts: int, length: int, seed: int) -> list[list[int]]:
    """Random tokens, from half the length to all of it."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [max(1, round(length * (0.5 + 0.5 * (row + 1) / prompts))) for row in range(prompts)]
    return [torch.randint(config.vocab_size, (each,), generator=generator).tolist() for each in lengths]


def decoding_table(
    config: Config,
    base: Params,
    tokenizer: ModelTokenizer,
    peers: Peers | None,
    *,
    prompts: int,
    length: int,
    new_tokens: int,
    rank: int,
    rounds: int,
    seed: int,
) -> str:
    """Markdown: tokens a second of greedy decoding of `random_prompts`."""
    texts = random_prompts(config, prompts, length, seed)
    works = decoding_works(config, base, tokenizer, peers, texts, rank=rank, new_tokens=new_tokens)
    times = interleaved(works, rounds)
    lines = [
        f"{prompts} prompts of {len(texts[0])} to {len(texts[-1])} tokens, {new_tokens} new tokens each, "
        f"{rounds} rounds.",
        "",
        "| greedy decoding | tokens/s | / transformers | / transformers + peft |",
        "|---|---|---|---|",
    ]
    for name, seconds in times.items():
        speed = prompts * new_tokens / statistics.median(seconds)
        others = [spread(times[other], seconds) if peers else " " for other in ("transformers", "transformers + peft")]
        lines.append(f"| {name} | {speed:.0f} | {others[0]} | {others[1]} |")
    return "\n".join(lines)

"""Three parts of `gpu.py`: what steps and decoding cost at the shape of Llama-3.1-8B, and where the time goes.

Times on a GPU are those of its own events. Read next: `gpu_real.py`.
"""

import math
import statistics
from collections.abc import Mapping
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity
from torch.profiler import profile as profiled

from experiments.costs import KINDS, float32_parts, one_step
from experiments.fidelity import patched
from experiments.gpu_tables import Run, Table, save, tell
from experiments.miniature.mini import MINI
from experiments.scale import SHAPES, config_of, drawn
from lfu import methods, model
from lfu.data.batches import Batch
from lfu.data.tokens import load_tokenizer
from lfu.errors import is_out_of_memory
from lfu.io.config import Config, tensor_shapes
from lfu.model import Params
from lfu.profiling import bench
from lfu.profiling.bench import RANK, SCALE, Work, spread
from lfu.profiling.memory import expected_peak, peak

# --- the shape of Llama-3.1-8B --------------------------------------------------------------------


class Large(NamedTuple):
    """A model of random weights that exists on the device alone."""

    config: Config
    base: Params
    settings: dict[str, Any]  # of config.json


SMALL_SHAPE = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 2048, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip


def large(run: Run) -> Large:
    settings = SHAPES["llama-3.1-8b"] | (SMALL_SHAPE if run.small else {})
    config = config_of(settings)
    generator = torch.Generator(run.device).manual_seed(0)
    tensors = {name: drawn(shape, generator) for name, shape in tensor_shapes(config).items()}
    return Large(config, model.assemble(config, tensors), settings)


def peers_of(here: Large) -> bench.Peers | None:
    """The same tensors inside transformers and peft, not copied."""
    options = {name: value for name, value in here.settings.items() if name not in ("model_type", "torch_dtype")}
    device, tensors = here.base.embed.device, model.named_tensors(here.config, here.base)

    def plain() -> Any:
        from transformers import AutoConfig, AutoModelForCausalLM

        settings = AutoConfig.for_model(here.settings["model_type"], **options)
        with torch.device("meta"):
            found = AutoModelForCausalLM.from_config(settings, dtype=here.base.embed.dtype)
        found.load_state_dict(tensors, assign=True)
        with device:  # these tables are not among the tensors that are loaded
            found.model.rotary_emb = type(found.model.rotary_emb)(settings)
        return found

    return bench.make_peers(plain, RANK)


def seconds(work: Work, device: torch.device) -> float:
    """By the GPU's own events, so that what the host does before and after does not count."""
    if device.type != "cuda":
        return bench.timed(work)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def interleaved(works: Mapping[str, Work], run: Run) -> dict[str, list[float]]:
    """`bench.interleaved` by this clock."""
    return bench.interleaved(works, 1 if run.small else 10, partial(seconds, device=run.device))


def bytes_at_peak(work: Work, device: torch.device) -> int:
    """The most that a work allocates beyond what there is."""
    if device.type != "cuda":
        return peak(work)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@cache
def matrix_rate(device: torch.device, side: int) -> float:
    """Operations a second of a bfloat16 product of two square matrices."""
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    times = [seconds(lambda: a @ b, device) for _ in range(13)][3:]
    return 2 * side**3 / statistics.median(times)


# --- steps: what they cost ------------------------------------------------------------------------


def steps(run: Run) -> None:
    """A table for each shape of a micro-batch."""
    here = large(run)
    peers = peers_of(here)
    if peers is None:
        tell(run.out, "steps: transformers or peft is not installed: they are left out.")
    for rows, length in ((2, 16), (1, 32)) if run.small else ((4, 256), (2, 1024)):
        batch = bench.random_batch(here.config, rows, length, round(0.6 * length), 0, run.device)
        title = f"A step at the shape of Llama-3.1-8B, {rows} x {length} tokens"
        save(run, "steps", title, step_costs(run, here, peers, batch))


def step_costs(run: Run, here: Large, peers: bench.Peers | None, batch: Batch) -> Table:
    bound = {
        title: methods.bind(name, here.config, scale=SCALE, remat=remat)[0] for title, (name, remat) in KINDS.items()
    }
    task, generator = bench.fresh_task(here.config, here.base, RANK), torch.Generator(run.device)
    works: dict[str, Work] = {
        title: partial(method, here.config, here.base, task, batch, generator) for title, method in bound.items()
    }
    works |= peer_works(peers, batch) if peers else {}
    peaks, faults = tried(works, run.device)
    times = interleaved({title: works[title] for title in peaks}, run)
    rate, (rows, length) = matrix_rate(run.device, 256 if run.small else 8192), batch.tokens.shape
    answers = int((batch.labels != -100).sum())
    lines = []
    for title, taken in times.items():
        passes = bench.PASSES[title.removesuffix(" --remat").removesuffix(", checkpointing")]
        flops, median = bench.step_flops(here.config, passes, rows, length, answers, RANK), statistics.median(taken)
        expected = "-"
        if title in bound:
            step = partial(bound[title].probe, here.config, here.base, task)
            expected = f"{expected_peak(step, rows * length, answers / (rows * length)) / 2**30:.3g}"
        lines.append([
            title, f"{1e3 * median:.1f}", spread(taken, times["sft"]) if "sft" in times else "-",
            f"{rows * length / median:.0f}", f"{peaks[title] / 2**30:.3g}", expected, f"{flops / median / rate:.0%}",
        ])  # fmt: skip
    lines += [[title, fault, *["-"] * 5] for title, fault in faults.items()]
    head = ["step", "ms", "/ sft", "tokens/s", "peak GiB", "expected GiB", "share of the matrix rate"]
    note = (
        f"bfloat16 weights, rank {RANK}, loss on {answers} tokens; the weights are not part of the peak, and blocks "
        f"computed again do not count as arithmetic. Matrix rate: {rate / 1e12:.3g} TFLOP/s."
    )
    return Table(head, lines, note)


def peer_works(peers: bench.Peers, batch: Batch) -> dict[str, Work]:
    """SFT by transformers and peft, plain and with its activations computed again, and the released algorithm."""
    module = peers.adapted.train()
    works = bench.peer_steps(module, batch)
    sft = works["transformers + peft: sft"]

    def checkpointing() -> object:
        module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        try:
            return sft()
        finally:
            module.gradient_checkpointing_disable()

    return works | {"transformers + peft: sft, checkpointing": checkpointing}


def tried(works: dict[str, Work], device: torch.device) -> tuple[dict[str, int], dict[str, str]]:
    """The peak of each work, and what went wrong with those that cannot be done."""
    peaks: dict[str, int] = {}
    faults: dict[str, str] = {}
    for title, work in works.items():
        try:
            if not peaks:
                work()  # with the first products, cuBLAS takes its workspaces, and keeps them
            peaks[title] = bytes_at_peak(work, device)
        except RuntimeError as fault:
            faults[title] = "out of memory" if is_out_of_memory(fault) else str(fault).splitlines()[0]
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return peaks, faults


# --- profile: where the time goes -----------------------------------------------------------------


def profile(run: Run) -> None:
    """The kernels of one lfu-lora step, and what its float32 parts cost."""
    here = large(run)
    rows, length = (2, 16) if run.small else (4, 256)
    task = bench.fresh_task(here.config, here.base, RANK)
    work = one_step((here.config, here.base, task), "lfu-lora", rows, length, round(0.6 * length))[1]
    save(run, "profile", f"One lfu-lora step of {rows} x {length} tokens, by kernel", kernels(run, work))
    title = "The same with float32 parts in bfloat16, where gradients are not right"
    save(run, "profile", title, in_bfloat16(run, work))


def kernels(run: Run, work: Work) -> Table:
    work()
    cuda = run.device.type == "cuda"
    with profiled(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as record:
        work()
        if cuda:
            torch.cuda.synchronize()
    # The time that is an event's own, not its children's.
    own = {each.key: (each.self_device_time_total if cuda else each.self_cpu_time_total, each.count)
           for each in record.key_averages()}  # fmt: skip
    total = sum(time for time, _ in own.values())
    largest = sorted(own.items(), key=lambda item: -item[1][0])[:10]
    rows = [[name[:80].replace("|", "/"), str(count), f"{time / 1e3:.2f}", f"{time / total:.1%}"]
            for name, (time, count) in largest]  # fmt: skip
    calls = sum(count for _, count in own.values())
    note = f"{calls} calls in all, {total / 1e3:.1f} ms."
    if cuda:
        note += f" Between its first and its last kernel the device is idle {idle_share(record):.1%} of the time."
    return Table(["kernel" if cuda else "operation", "calls", "ms", "share"], rows, note)


def idle_share(record: Any) -> float:
    """The share of a step's time in which the device runs no kernel."""
    spans = sorted((each.time_range.start, each.time_range.end) for each in record.events()
                   if each.device_type == torch.autograd.DeviceType.CUDA)  # fmt: skip
    busy, end = 0.0, -math.inf
    for start, stop in spans:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return 1 - busy / (end - spans[0][0])


def in_bfloat16(run: Run, work: Work) -> Table:
    times = interleaved({part: patched(patches)(work) for part, patches in float32_parts().items()}, run)
    rows = [
        [part, f"{1e3 * statistics.median(taken):.1f}", spread(taken, times["as it is"])]
        for part, taken in times.items()
    ]
    return Table(["in bfloat16", "ms", "/ as it is"], rows)


# --- decoding -------------------------------------------------------------------------------------


def decoding(run: Run) -> None:
    """Greedy decoding by each contestant."""
    here = large(run)
    peers, tokenizer = peers_of(here), load_tokenizer(MINI, here.config.vocab_size)  # its texts are nobody's concern
    count, length, new_tokens, rounds = (4, 16, 4, 1) if run.small else (32, 200, 64, 3)
    prompts = bench.random_prompts(here.config, count, length, 0)
    works = bench.decoding_works(here.config, here.base, tokenizer, peers, prompts, rank=RANK, new_tokens=new_tokens)
    times = bench.interleaved(works, rounds)
    others = ("transformers", "transformers + peft")
    rows = []
    for name, taken in times.items():
        speed = count * new_tokens / statistics.median(taken)
        beside = [spread(times[other], taken) if other in times else "-" for other in others]
        rows.append([name, f"{speed:.0f}", *beside])
    title = f"Decoding at the shape of Llama-3.1-8B: {count} prompts of up to {length} tokens, {new_tokens} more each"
    save(run, "decoding", title, Table(["greedy decoding", "tokens/s", *(f"/ {other}" for other in others)], rows))

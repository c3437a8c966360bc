"""The first part of `gpu.py`: is everything right on the device? The miniature there against the miniature on the CPU.

Errors are relative, ‖found - expected‖ / ‖expected‖, with the CPU's values expected. Read next: `gpu_costs.py`.
"""

import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from experiments import fidelity
from experiments.costs import NAMES
from experiments.gpu_tables import Run, Table, save
from experiments.miniature.mini import MINI
from lfu import cli, lora, methods, model, steering, train
from lfu.checkpoints import checkpoints
from lfu.data.batches import Batch, collate
from lfu.data.rows import read_rows
from lfu.data.tokens import Format, encode_row, load_tokenizer, prompt_ids
from lfu.generate import generate
from lfu.io.config import Config, read_config
from lfu.io.tensors import read_all_tensors
from lfu.lora import Lora
from lfu.profiling import bench
from lfu.profiling.bench import ALPHA, LAM, RANK, SCALE, Work

DTYPES = (torch.float64, torch.float32)


def right(run: Run) -> None:
    """Gradients, precision, decoding, a run that is killed, its scores, and where the host waits for the device."""
    save(run, "right", "Gradients of the miniature against the CPU's", gradient_errors(run))
    save(run, "right", "Where the host waits for the device within one gradient", waits(run))
    save(run, "right", "The miniature's answers against the CPU's", answers(run))
    save(run, "right", "The precision of the gradients on the device", precision(run))
    with tempfile.TemporaryDirectory() as folder:
        save(run, "right", "A run of the miniature", whole_runs(run, Path(folder)))


def mini_batch(device: torch.device) -> tuple[Config, Batch]:
    config = read_config(MINI / "config.json")
    tokenizer, rows = load_tokenizer(MINI, config.vocab_size), read_rows(MINI / "math" / "train.jsonl")[:4]
    return config, collate([encode_row(tokenizer, Format("question"), row) for row in rows], device)


def mini_gradient(name: str, dtype: torch.dtype, device: torch.device, remat: bool) -> Callable[[], Lora]:
    """A gradient of a task in mid-training. What is random is drawn on the CPU, so that it is everywhere the same."""
    config, batch = mini_batch(device)
    base, generator = model.load(MINI, dtype=dtype, device=device)[1], torch.Generator().manual_seed(0)
    drawn_task = lora.init(config, RANK, generator=generator)
    task = [{key: pair._replace(B=0.02 * torch.randn(pair.B.shape, generator=generator)) for key, pair in layer.items()}
            for layer in drawn_task]  # fmt: skip
    aux = lora.init(config, RANK, generator=generator) if name == "lfu-lora" else steering.zeros(config)
    task, aux = tree_map(partial(Tensor.to, dtype=dtype, device=device), (task, aux))
    if name == "sft":
        return lambda: train.sft_gradient(config, base, task, batch, scale=SCALE, remat=remat)[0]
    how: dict[str, Any] = {"scale": SCALE, "alpha": ALPHA, "lam": LAM, "remat": remat}
    return lambda: train.lfu_gradient(config, base, task, aux, batch, **how)[0]


def gradient_errors(run: Run) -> Table:
    rows = []
    for name in NAMES:
        for dtype in DTYPES:
            expected = fidelity.flat(mini_gradient(name, dtype, torch.device("cpu"), False)())
            plain, again = (
                fidelity.flat(mini_gradient(name, dtype, run.device, remat)()).cpu() for remat in (False, True)
            )
            same = "yes" if torch.equal(plain, again) else f"no, {error(again, plain):.1e}"
            rows.append([name, str(dtype).removeprefix("torch."), f"{error(plain, expected):.1e}", same])
    note = "In float64 what remains is the rotary tables, which are float32 in every dtype and rounded by each device."
    return Table(["method", "dtype", "relative error", "--remat the same bit for bit"], rows, note)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def waits(run: Run) -> Table:
    """The lines of this project at which a gradient, or the loop around it, makes the host wait for the GPU."""
    if run.device.type != "cuda":
        return Table(["method", "waits", "where"], [[name, "-", "-"] for name in NAMES], "Only CUDA can tell.")
    config, batch = mini_batch(run.device)
    base, rows = model.load(MINI, dtype=torch.float32, device=run.device)[1], []
    task = bench.fresh_task(config, base, RANK)
    for name in NAMES:
        method, generator = methods.bind(name, config, scale=SCALE)[0], torch.Generator(run.device)
        method(config, base, task, batch, generator)
        found = Counter(waiting_lines(partial(method, config, base, task, batch, generator)))
        rows.append([name, str(found.total()), ", ".join(f"{line} ({count})" for line, count in found.items())])
    return Table(["method", "waits", "where (how often)"], rows)


def waiting_lines(work: Work) -> list[str]:
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return [f"{Path(each.filename).name}:{each.lineno}" for each in caught if "synchroniz" in str(each.message)]


def answers(run: Run) -> Table:
    """Greedy answers, token by token."""
    config, _ = mini_batch(run.device)
    tokenizer, questions = load_tokenizer(MINI, config.vocab_size), read_rows(MINI / "helpfulness" / "test.jsonl")
    prompts = [prompt_ids(tokenizer, Format("question"), row.question) for row in questions[: 8 if run.small else 100]]
    rows = []
    for dtype in (torch.float64, torch.float32):
        texts = []
        for device in (torch.device("cpu"), run.device):
            base = model.load(MINI, dtype=dtype, device=device)[1]
            found = dict(generate(config, base, tokenizer, prompts, max_new_tokens=64))
            texts.append([found[index].tokens for index in range(len(prompts))])
        same = sum(here == there for here, there in zip(*texts))
        rows.append([str(dtype).removeprefix("torch."), f"{same} of {len(prompts)}"])
    return Table(["dtype", "answers with the same tokens"], rows)


def precision(run: Run) -> Table:
    """`fidelity.py` for the consistency gradient, everything on the device."""
    config, batch = mini_batch(run.device)
    task = tree_map(lambda leaf: leaf.to(run.device), fidelity.starting_point(config, None))
    bases = {
        dtype: model.load(MINI, dtype=dtype, device=run.device)[1]
        for dtype in (torch.float64, torch.float32, torch.bfloat16)
    }
    expected = fidelity.gradients(config, bases[torch.float64], task, batch)
    titles = [title for title in expected if title.startswith("consistency")]
    rows = []
    for name, (dtype, patches) in fidelity.PRECISIONS.items():
        with fidelity.patched(patches):
            found = fidelity.gradients(config, bases[dtype], task, batch)
        rows.append([name, *(str(fidelity.compared(found[title], expected[title])) for title in titles)])
    return Table(["cosine, norm ratio", *titles], rows, "Against float64 on the same device.")


# --- one run, killed and resumed ------------------------------------------------------------------


def whole_runs(run: Run, folder: Path) -> Table:
    """A run that is killed and resumed; a run that draws nothing at random, here and on the CPU; and their scores."""

    def adapter(name: str) -> Path:
        return folder / name / "adapter"

    whole, killed = ([*run_of("lfu-lora", folder / name, run.device), *size(run)] for name in ("whole", "killed"))
    quiet(whole)
    step = kill_after_checkpoint(killed, folder / "killed")
    quiet([*killed, "--resume"])
    same = tensors_of(adapter("whole")).equal(tensors_of(adapter("killed")))
    for name, device in (("here", run.device), ("cpu", "cpu")):
        quiet([*run_of("lfu-reps", folder / name, device), *size(run)])
    far = error(tensors_of(adapter("here")), tensors_of(adapter("cpu")))
    rows = [
        ["lfu-lora, killed after a step and resumed: the same bits", f"{'yes' if same else 'no'} (step {step})"],
        ["lfu-reps, the adapter against that of a run on the CPU: relative error", f"{far:.1e}"],
    ]
    here, there = (scored(adapter("here"), device, run.small) for device in (run.device, "cpu"))
    rows += [[f"{name} of this adapter, here and on the CPU", f"{here[name]:.4f}, {there[name]:.4f}"] for name in here]
    return Table(["float32, the two-step problems", ""], rows)


def tensors_of(adapter: Path) -> Tensor:
    """All weights of a saved adapter as one vector."""
    tensors = read_all_tensors(adapter / "adapter_model.safetensors")
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def run_of(method: str, out: Path, device: Any) -> list[str]:
    data = MINI / "math" / "train.jsonl"
    options = {"model": MINI, "data": data, "out": out, "device": device, "dtype": "float32", "template": "question"}
    options |= {"learning-rate": 0.01, "save-every": 1, "keep": 100, "method": method}
    return ["train", *(f"--{name}={value}" for name, value in options.items())]


def size(run: Run) -> list[str]:
    return ["--epochs=1", "--limit=48"] if run.small else ["--epochs=3"]


def quiet(arguments: list[str]) -> None:
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()) as said:
        if cli.main(arguments):
            raise RuntimeError(said.getvalue().strip().splitlines()[-1])


def kill_after_checkpoint(arguments: list[str], out: Path) -> int:
    """Start a run, kill it as soon as it has a checkpoint, and return the step of its last one."""
    process = subprocess.Popen(
        [sys.executable, "-m", "lfu.cli", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while process.poll() is None and not checkpoints(out):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return int(checkpoints(out)[-1].name.removeprefix("step-"))


def scored(adapter: Path, device: Any, small: bool) -> dict[str, float]:
    options = cli.EvalOptions(
        model=str(MINI),
        adapter=str(adapter),
        data=str(MINI / "math" / "test.jsonl"),
        device=str(device),
        dtype="float32",
        max_new_tokens=64,
        batch_size=200,
        limit=20 if small else None,
    )
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        return {name: value.mean for name, value in cli.evaluate(options).items()}

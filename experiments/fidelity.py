"""How right are the gradients in low precision? Cosine and norm ratio against float64, at every published setting.

    python -m experiments.fidelity --model SMOLLM2 --data gsm8k/train.jsonl
                                   [--alphas 1e-4 1e-2 1 --json docs/precision.json]

h' - h is far smaller than h. Two passes rounded to bfloat16 differ mostly by noise; the default path rounds the
difference itself (`model.relative_to`). The columns of the table are the same functions at four precisions; the rows
are the gradient of the SFT loss (Eq. 1), the ascent direction (Eq. 2), and, ascent step included, the gradient of the
consistency loss (Eq. 5) and of the whole LfU loss (Eq. 6). `--alphas` adds other lengths of LoRA's ascent step.
"""

import argparse
import platform
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from experiments.markdown import markdown
from lfu import lora, methods, model, train
from lfu.data.batches import Batch, collate
from lfu.data.rows import read_rows
from lfu.data.tokens import Format, encode_row, load_tokenizer
from lfu.io.config import Config, read_config
from lfu.io.files import write_json
from lfu.model import Params
from lfu.profiling.bench import RANK, SCALE


class Setting(NamedTuple):
    """A method and its published hyper-parameters."""

    title: str
    method: str
    alpha: float
    lam: float


SETTINGS = (
    Setting("LoRA, α 0.1, λ 5", "lfu-lora", 0.1, 5.0),
    Setting("LoRA, α 0.001, λ 500", "lfu-lora", 0.001, 500.0),
    Setting("steering, α 0.1, λ 0.1", "lfu-reps", 0.1, 0.1),
)
# So large that taking the SFT gradient away from Eq. 6 again costs the consistency gradient no digits.
LAMBDA = 1e12
Gradients = dict[str, Tensor]


class Agreement(NamedTuple):
    """Of a gradient with the reference."""

    cosine: float
    norm_ratio: float

    def __str__(self) -> str:
        return f"{self.cosine:.4f}, {self.norm_ratio:.3f}"


Patches = dict[str, Callable[..., Any]]
"""Name of a function, from its module on -> what stands in for it."""
# The perturbed pass computed as the clean one is, each rounded on its own; not under remat.
PLAIN_PRODUCTS: Patches = {
    f"lfu.{module}.relative_to": lambda record: model.base_product for module in ("train", "baselines.released")
}
# Residual stream, norms, adapters and losses in bfloat16 too.
LOW_STREAM: Patches = {f"lfu.{module}.stream_dtype": lambda params: torch.bfloat16 for module in ("model", "train")}
PRECISIONS: dict[str, tuple[torch.dtype, Patches]] = {
    "float32": (torch.float32, {}),
    "bfloat16 throughout": (torch.bfloat16, PLAIN_PRODUCTS | LOW_STREAM),
    "float32 stream, bfloat16 products": (torch.bfloat16, PLAIN_PRODUCTS),
    "difference-exact (the default)": (torch.bfloat16, {}),
}


@contextmanager
def patched(patches: Patches) -> Iterator[None]:
    """With these replacements: a block, or a function that is called later."""
    with ExitStack() as stack:
        for name, replacement in patches.items():
            stack.enter_context(patch(name, replacement))
        yield


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rows", type=int, default=4, help="how many rows of the file make the batch")
    parser.add_argument("--alphas", type=float, nargs="+", default=[], help="more lengths of LoRA's ascent step")
    parser.add_argument("--json", type=Path, help="file for the same numbers as data")
    parsed = parser.parse_args()
    settings = SETTINGS + tuple(Setting(f"LoRA, α {alpha:g}, λ 5", "lfu-lora", alpha, 5.0) for alpha in parsed.alphas)
    config = read_config(parsed.model / "config.json")
    task = starting_point(config, parsed.adapter)
    tokenizer, form = load_tokenizer(parsed.model, config.vocab_size), Format(parsed.template)
    batch = collate([encode_row(tokenizer, form, row) for row in read_rows(parsed.data)[: parsed.rows]])
    # The file holds bfloat16, so every dtype starts from the very same weights.
    reference = gradients(config, load(parsed.model, torch.float64), task, batch, settings)
    columns = {}
    for name, (dtype, patches) in PRECISIONS.items():
        with patched(patches):
            found = gradients(config, load(parsed.model, dtype), task, batch, settings)
        columns[name] = {title: compared(found[title], reference[title]) for title in reference}
    print(table(columns))
    save(parsed.json, columns)


def arguments(description: str) -> argparse.ArgumentParser:
    """The model, the rows and the adapter that a gradient is taken with."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--template", default="alpaca")
    parser.add_argument("--adapter", type=Path, help="task adapter (default: a fresh one)")
    return parser


def save(path: Path | None, numbers: dict[str, Any]) -> None:
    """What was found, with when, where and how."""
    if path is None:
        return
    how = shlex.join(["python", "-m", f"experiments.{Path(sys.argv[0]).stem}", *sys.argv[1:]])
    threads = torch.get_num_threads()
    where = f"{platform.machine()}, {threads} thread{'s' * (threads > 1)}, torch {torch.__version__}"
    write_json(path, {"about": {"date": date.today().isoformat(), "machine": where, "command": how}} | numbers)


def load(folder: Path, dtype: torch.dtype) -> Params:
    return model.load(folder, dtype=dtype)[1]


def starting_point(config: Config, adapter: Path | None) -> lora.Lora:
    """The given adapter, which must have the rank and scale that all here is computed with, or a fresh one."""
    if adapter is not None:
        task, scale = lora.load(adapter, config)
        if scale != SCALE or len(next(iter(task[0].values())).A) != RANK:
            raise SystemExit(f"{adapter} must have rank {RANK} and scale {SCALE:g}: all tables here are for these.")
        return task
    return lora.init(config, RANK, generator=torch.Generator().manual_seed(0))


def gradients(
    config: Config, base: Params, task: lora.Lora, batch: Batch, settings: Sequence[Setting] = SETTINGS
) -> Gradients:
    """Every gradient of the step by name, each as one float64 vector."""
    task = tree_map(partial(Tensor.to, dtype=model.stream_dtype(base)), task)
    sft = flat(train.sft_gradient(config, base, task, batch, scale=SCALE)[0])
    found = {"SFT": sft}
    for title, name, alpha, lam in settings:
        ascents: list[Tensor] = []
        with ascending_into(ascents):
            generator = torch.Generator(base.embed.device).manual_seed(1)
            how = {"scale": SCALE, "alpha": alpha, "lam": LAMBDA}
            total = flat(methods.METHODS[name].gradient(config, base, task, batch, generator, **how)[0])
        consistency = (total - sft) / LAMBDA
        found[f"ascent, {title.split(',')[0]}"] = ascents[0]
        found |= {f"consistency, {title}": consistency, f"LfU, {title}": sft + lam * consistency}
    return dict(sorted(found.items(), key=lambda item: ("SFT", "ascent", "consistency", "LfU").index(kind(item[0]))))


def kind(title: str) -> str:
    """Which gradient a row is about."""
    return title.split(",")[0]


@contextmanager
def ascending_into(ascents: list[Tensor]) -> Iterator[None]:
    """Notes the direction of every ascent step."""

    def ascend(aux: train.Tree, gradient: train.Tree, alpha: float) -> train.Tree:
        ascents.append(flat(gradient))
        return plain(aux, gradient, alpha)

    plain = train.ascend
    with patch("lfu.train.ascend", ascend):
        yield


def flat(tree: Any) -> Tensor:
    return torch.cat([leaf.double().flatten() for leaf in tree_leaves(tree)])


def compared(found: Tensor, reference: Tensor) -> Agreement:
    return Agreement(cosine(found, reference).item(), (found.norm() / reference.norm()).item())


def cosine(found: Tensor, reference: Tensor) -> Tensor:
    # Its eps is a floor for the norms, and these gradients can be short.
    return torch.nn.functional.cosine_similarity(found, reference, dim=0, eps=1e-300)


def table(columns: dict[str, dict[str, Agreement]]) -> str:
    """One row per gradient, one column per precision."""
    titles = next(iter(columns.values()))
    rows = [[title, *(str(column[title]) for column in columns.values())] for title in titles]
    return markdown(["cosine, norm ratio", *columns], rows)


if __name__ == "__main__":
    main()

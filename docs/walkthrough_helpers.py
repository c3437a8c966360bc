"""What the cells of walkthrough.ipynb call so that what is read in them is the method: printing, comparing, asking.

Read next: `walkthrough_figures.py`, which draws.
"""

import inspect
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from types import ModuleType
from typing import Any, NamedTuple
from unittest.mock import MagicMock, patch

import torch
from IPython.display import display
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from lfu.data import TEMPLATES, Format, ModelTokenizer, Row, prompt_ids
from lfu.evaluation.estimates import Estimate, accuracy
from lfu.evaluation.generative import is_right
from lfu.generate import generate
from lfu.lora import Adapter
from lfu.model import Config, Params

torch.set_num_threads(1)  # operations this small are faster in one thread

# --- printing -------------------------------------------------------------------------------------


def markdown(text: str) -> None:
    display({"text/markdown": text, "text/plain": text}, raw=True)


def table(header: Sequence[Any], rows: Sequence[Sequence[Any]]) -> None:
    """Display a table; a line break within a cell is shown as ⏎."""
    lines = ["| " + " | ".join(str(cell).replace("\n", " ⏎ ") for cell in row) + " |" for row in [header, *rows]]
    markdown("\n".join([lines[0], "| --- " * len(header) + "|", *lines[1:]]))


def show(thing: Callable[..., Any], first: str = "", last: str = "") -> None:
    """The source of a library function, or its lines from the one that has `first` in it to the one that has `last`."""
    lines, number = inspect.getsourcelines(thing)
    start = next(i for i, line in enumerate(lines) if first in line)
    stop = next(i for i, line in enumerate(lines) if i >= start and last in line) if last else len(lines) - 1
    source = textwrap.dedent("".join(lines[start : stop + 1])).rstrip()
    file = thing.__module__.replace(".", "/") + ".py"
    markdown(f"`{file}`, lines {number + start}–{number + stop}\n\n```python\n{source}\n```")


@contextmanager
def quiet() -> Iterator[None]:
    """Without what a run says of its progress."""
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        yield


# --- trees of tensors -----------------------------------------------------------------------------


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def flat(tree: Any) -> Tensor:
    """All tensors of a tree as one long vector in float64."""
    return torch.cat([leaf.double().flatten() for leaf in tree_leaves(tree)])


def cosine(a: Any, b: Any) -> float:
    """Of the angle between two trees."""
    a, b = flat(a), flat(b)
    return float(a @ b / (a.norm() * b.norm()))


def random_like(gradient: Any) -> Any:
    """A random direction in the coordinates that the gradient moves."""
    generator = seeded(0)
    return tree_map(lambda g: torch.randn(g.shape, generator=generator, dtype=g.dtype) * (g != 0), gradient)


@contextmanager
def counted(module: ModuleType, *names: str) -> Iterator[dict[str, MagicMock]]:
    """The functions of these names, each replaced in the module by itself with a `call_count`."""
    with ExitStack() as stack:
        wrapped = {name: patch.object(module, name, wraps=getattr(module, name)) for name in names}
        yield {name: stack.enter_context(each) for name, each in wrapped.items()}


# --- asking the model -----------------------------------------------------------------------------


class Examiner(NamedTuple):
    """A model with its tokenizer and template, to be asked with or without adapters."""

    config: Config
    base: Params
    tokenizer: ModelTokenizer
    form: Format

    def ask(self, rows: Sequence[Row], adapters: Sequence[Adapter] = ()) -> list[str]:
        """The greedy answer to each row's question."""
        prompts = [prompt_ids(self.tokenizer, self.form, row.question) for row in rows]
        how: dict[str, Any] = {"max_new_tokens": 64, "stop": TEMPLATES[self.form.template].stops, "batch_size": 200}
        answers = dict(generate(self.config, self.base, self.tokenizer, prompts, adapters, **how))
        return [answers[index].text.strip() for index in range(len(rows))]

    def scores(self, tests: dict[str, list[Row]], adapters: Sequence[Adapter] = ()) -> dict[str, Estimate]:
        """Exact match on the rows of each folder: of the number after ####, where there is one, else of the text."""
        return {
            folder: accuracy([is_right(answer, row.answer) for answer, row in zip(self.ask(rows, adapters), rows)])
            for folder, rows in tests.items()
        }

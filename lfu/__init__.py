"""Learning from the Undesirable (arXiv 2511.13052), written to be read.

Start with `model.py`, then `lora.py`, `steering.py`, `loss.py` and `train.py`: these five are the lesson. `methods.py`
has the methods by name. Each other job has a room of its own: `data/`, `generate.py`, `evaluation/`, `io/`, `runs.py`,
`distributed.py`, `cli/`. Asides: `remat.py`, `baselines/`, `profiling/`. `docs/code-map.md` says what stands where.
"""

__version__ = "0.1.0"

from lfu.data import Batch, Example, Format, Row, collate, encode_rows, load_tokenizer, read_rows
from lfu.errors import InputError
from lfu.io.config import Config
from lfu.lora import init, merge, save, stack
from lfu.loss import consistency_loss, sft_loss
from lfu.methods import METHODS, bind
from lfu.model import LowRank, Params, Steering, forward, load
from lfu.runs import train_run
from lfu.schedule import Settings
from lfu.train import adamw, ascend, lfu_gradient, lfu_lora, lfu_reps, sft_gradient

__all__ = [
    "METHODS", "Batch", "Config", "Example", "Format", "InputError", "LowRank", "Params", "Row", "Settings", "Steering",
    "adamw", "ascend", "bind", "collate", "consistency_loss", "encode_rows", "forward", "init", "lfu_gradient",
    "lfu_lora", "lfu_reps", "load", "load_tokenizer", "merge", "read_rows", "save", "sft_gradient", "sft_loss", "stack",
    "train_run",
]  # fmt: skip

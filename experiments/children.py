"""Commands of `lfu` in processes of their own that may be killed, hang, or ask for too much memory.

A child is forked from a process that has torch in memory and has computed once already, so a small command takes a
twentieth of a second instead of three. Read next: `fuzz.py` and `crash.py`, which are made of such commands.
"""

import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch
from tqdm import tqdm

from lfu.cli import main

MINI = Path(__file__).parents[1] / "weights" / "mini"
SCRATCH = Path("/dev/shm") if Path("/dev/shm").is_dir() else None
"""Where the commands work: fast, because thousands of runs sync their files."""


class Ended(NamedTuple):
    """How a command ended, and what it said."""

    code: int  # the exit status, or minus the number of the signal that ended it
    out: str
    err: str


def prepare() -> None:
    """Make this process one to fork from: a single thread, which has trained once and so has what torch loads late."""
    torch.set_num_threads(1)
    tqdm.monitor_interval = 0  # no thread of the progress bar's
    with TemporaryDirectory() as folder, redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        data = MINI / "math" / "train.jsonl"
        main(["train", f"--model={MINI}", f"--data={data}", "--limit=2", "--epochs=1", f"--out={folder}/run"])


def run(
    arguments: list[str], folder: Path, *, first: Callable[[], object] | None = None, seconds: int = 10, memory: int = 0
) -> Ended:
    """`lfu ARGUMENTS` in `folder`, after `first`, with this much time and, if not 0, this many bytes more than now.

    A child that takes longer ends by SIGALRM. What it prints goes to two files beside the folder.
    """
    said = [folder.with_name(f"{folder.name}.{name}") for name in ("stdout", "stderr")]
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        become_child(folder, said, seconds, memory)
        live(arguments, first)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return Ended(code, *(path.read_text(encoding="utf-8", errors="backslashreplace") for path in said))


def become_child(folder: Path, said: list[Path], seconds: int, memory: int) -> None:
    """Working directory, output and limits of a child."""
    os.chdir(folder)
    for descriptor, path in enumerate(said, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    signal.alarm(seconds)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if memory:
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + memory,) * 2)


def live(arguments: list[str], first: Callable[[], object] | None) -> None:
    """The whole life of a child: it never comes back, whatever happens."""
    code = 1
    try:
        if first is not None:
            first()
        code = main(arguments)
    except SystemExit as end:  # argparse
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)

"""`lfu plot`: the curves of one or more runs in one picture. Read next: `runs.py`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lfu.cli.options import Options, StrPath, check_writable, option
from lfu.errors import InputError
from lfu.runs import read_log

CURVES = {
    "sft": "SFT loss, nats per token",
    "valid": "validation NLL, nats per token",
    "consistency": "consistency loss",
    "gradient_norm": "gradient norm",
    "learning_rate": "learning rate",
}
"""What is drawn of a step, where any run has it."""
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
"""Told apart by the colour-blind too (Okabe and Ito)."""


@dataclass(frozen=True, kw_only=True)
class PlotOptions(Options):
    runs: list[StrPath] = option("folders of runs", positional=True)
    out: StrPath = option("picture to write, a .png or .svg; may exist")


def plot(options: PlotOptions) -> Path:
    """Draw each quantity by step, a panel each and a colour for each run; returns the picture's path."""
    out = Path(options.out)
    if out.suffix not in (".png", ".svg"):
        raise InputError(f"{out} must end in .png or .svg: its name says what is drawn.")
    check_writable(out.parent)
    logs = {run: read_run(Path(run)) for run in options.runs}
    panels = [name for name in CURVES if any(name in line for log in logs.values() for line in log)]
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(len(panels), 1, sharex=True, squeeze=False, figsize=(7, 0.6 + 1.9 * len(panels)))
    for axis, name in zip(axes[:, 0], panels):
        draw_panel(axis, name, logs)
    axes[0, 0].legend(frameon=False)
    axes[-1, 0].set_xlabel("optimizer step")
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150, metadata={"Date": None} if out.suffix == ".svg" else None)
    pyplot.close(figure)
    print(f"{out}: {', '.join(panels)} of {len(logs)} runs.")
    return out


def read_run(run: Path) -> list[dict[str, Any]]:
    """The log of a run. InputError where there is none, or nothing in it."""
    lines = read_log(run / "log.jsonl")
    if not lines:
        raise InputError(f"{run / 'log.jsonl'} holds no steps: give the folder of a run.")
    return lines


def load_pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise InputError("To draw, matplotlib is needed: pip install 'lfu[plot]'.") from error
    matplotlib.use("agg")  # no window
    matplotlib.rcParams["svg.hashsalt"] = "lfu"  # the same picture has the same bytes
    from matplotlib import pyplot

    return pyplot


def draw_panel(axis: Any, name: str, logs: dict[StrPath, list[dict[str, Any]]]) -> None:
    """One quantity of all runs; a point each where there are few."""
    for number, (run, log) in enumerate(logs.items()):
        found = [(line["step"], line[name]) for line in log if name in line]
        marker = "o" if len(found) <= 30 else None
        axis.plot(*zip(*found), label=run, color=COLOURS[number % len(COLOURS)], lw=1.3, marker=marker, ms=3)
    axis.set_ylabel(CURVES[name], fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)

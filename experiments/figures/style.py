"""What the figures share: paper, type and colours, and the few things that they are drawn with.

They are opaque, so that they can be read on a dark page too, and 768 pixels wide. Text is drawn as paths: it looks the
same wherever it is shown. A method has its colour and its marker everywhere, so that it is known without colours.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.palette import BASELINE, INK, LFU_LORA, LFU_REPS, PAPER, SFT

DOCS = Path(__file__).parents[2] / "docs"
QUIET = "#666666"
"""The baselines' grey as text has it, dark enough to be read."""
RC: Any = {
    "svg.hashsalt": "lfu",
    "svg.fonttype": "path",
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": BASELINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titlecolor": QUIET,
    "xtick.color": INK,
    "ytick.color": INK,
    "lines.linewidth": 2,
    "lines.markersize": 6,
    "figure.constrained_layout.w_pad": 0.1,
    "figure.constrained_layout.h_pad": 0.1,
    "figure.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "savefig.dpi": 100,
}
METHODS: dict[str, dict[str, Any]] = {
    "SFT": {"color": SFT, "marker": "o"},
    "LfU (LoRA)": {"color": LFU_LORA, "marker": "s"},
    "LfU (RepS)": {"color": LFU_REPS, "marker": "^"},
}


def card(finding: str, height: float, rows: int = 1, columns: int = 1, **how: Any) -> tuple[Figure, Any]:
    """A figure under a title that says what it shows, and its panels."""
    figure = Figure(figsize=(8, height), layout="constrained")
    figure.suptitle(finding, x=0.012, ha="left", fontsize=12, fontweight="bold")
    return figure, figure.subplots(rows, columns, **how)


def style_of(method: str) -> dict[str, Any]:
    """Colour and marker; grey for all that is neither SFT nor LfU."""
    return METHODS.get(method, {"color": BASELINE, "marker": "D"})


def label(
    panel: Axes, text: str, at: Sequence[float], offset: tuple[float, float] = (7, 0), leader: bool = False, **how: Any
) -> None:
    """Text beside a point, `offset` typographic points away, with a thin line to it or without."""
    how = {"ha": "left" if offset[0] >= 0 else "right", "va": "center", "color": INK, "fontsize": 9.5} | how
    if how["color"] == BASELINE:
        how["color"] = QUIET
    if leader:
        how["arrowprops"] = {"arrowstyle": "-", "color": how["color"], "lw": 0.7, "shrinkB": 4}
    panel.annotate(text, (at[0], at[1]), offset, textcoords="offset points", **how)


def band(panel: Axes, x: Sequence[float], low: Iterable[float], high: Iterable[float], color: str) -> None:
    """A range around a curve."""
    panel.fill_between(x, list(low), list(high), color=color, alpha=0.15, linewidth=0)


def note(figure: Figure, text: str) -> None:
    """A line below all panels."""
    figure.supxlabel(text, fontsize=10, color=QUIET)


def stored(name: str) -> Any:
    """The numbers of a file of `docs/`."""
    return json.loads((DOCS / f"{name}.json").read_text(encoding="utf-8"))

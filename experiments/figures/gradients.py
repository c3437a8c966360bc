"""What precision, and each difference from the paper, does to the gradient of the consistency loss (Eq. 5).

Numbers: `docs/precision.json`, by `experiments/fidelity.py`; `docs/differences.json`, by `experiments/differences.py`.
"""

import re
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.figures.style import card, label, note, stored
from experiments.palette import BASELINE, INK, LFU_LORA, LFU_REPS, PAPER

PRECISIONS: dict[str, dict[str, Any]] = {
    "difference-exact (the default)": {"color": LFU_LORA, "marker": "s"},
    "float32": {"color": INK, "linestyle": ":", "linewidth": 1.5},
    "float32 stream, bfloat16 products": {"color": BASELINE, "linestyle": "--", "marker": "D"},
    "bfloat16 throughout": {"color": BASELINE, "marker": "o"},
}
LABELS: dict[str, tuple[float, tuple[float, float]]] = {
    "difference-exact (the default)": (1e-4, (0, -13)),
    "float32": (1e-2, (0, 10)),
    "float32 stream, bfloat16 products": (1e-2, (-8, 6)),
    "bfloat16 throughout": (1e-2, (10, 2)),
}
"""Precision -> the α at which its label stands, and where."""
PUBLISHED = (0.1, 0.001)
PARTS = {"LfU (LoRA)": LFU_LORA, "LfU (RepS)": LFU_REPS, "One optimizer step of 16 rows, LfU (LoRA)": BASELINE}


def precision() -> Figure:
    """Cosine of LfU (LoRA)'s consistency gradient with that in float64, by the length of the ascent step."""
    figure, panel = card("In plain bfloat16 the gradient is noise for a small α; the default path keeps it", 4.2)
    for name, style in PRECISIONS.items():
        cosines = by_alpha(stored("precision")[name])
        panel.plot(list(cosines), list(cosines.values()), **style)
        alpha, place = LABELS[name]
        label(panel, name, (alpha, cosines[alpha]), place, color=style["color"])
    for alpha in PUBLISHED:
        panel.axvline(alpha, color=BASELINE, linewidth=1, linestyle=":", zorder=0)
        label(panel, "published", (alpha, -0.35), (4, 0), color=BASELINE, fontsize=9)
    panel.set_xscale("log")
    panel.set_ylim(-0.45, 1.15)
    panel.set_xlabel("α, the length of the ascent step")
    panel.set_ylabel("cosine with float64")
    panel.set_title("consistency gradient of LfU (LoRA), SmolLM2-135M-Instruct, four rows of GSM8K")
    return figure


def by_alpha(column: dict[str, list[float]]) -> dict[float, float]:
    """α -> cosine, for all settings of LoRA."""
    matches = [(re.match(r"consistency, LoRA, α ([^,]+)", title), cosine) for title, (cosine, _) in column.items()]
    return dict(sorted((float(match[1]), cosine) for match, cosine in matches if match))


def paper_and_code() -> Figure:
    """Cosines with the paper's algorithm when one thing is changed: of Eq. 5's gradient, and of Eq. 6's."""
    finding = "Which batch and which side: these differences turn the gradient, most do not"
    figure, panels = card(finding, 7.4, 1, 2, sharey=True)
    places = row_places()
    for model, filled in (("SmolLM2", True), ("miniature", False)):
        for part, rows in stored("differences")[model].items():
            if part in PARTS:
                draw_cosines(panels, places[part], rows, PARTS[part], filled)
    for panel, title in zip(panels, ("gradient of Eq. 5", "whole gradient")):
        panel.axvline(1, color=INK, linewidth=0.8, zorder=0)
        panel.axvline(0, color=BASELINE, linewidth=0.8, zorder=0)
        panel.set(title=title, xlim=(-1.1, 1.1), xticks=(-1, 0, 1))
        panel.tick_params(axis="y", left=False)
    write_names(panels[0], places)
    note(figure, "cosine with the paper's algorithm; filled: SmolLM2 on GSM8K, hollow: miniature model")
    return figure


def row_places() -> dict[str, dict[str, int]]:
    """Part -> what is different -> its height, with room for a heading above."""
    found, place, places = stored("differences")["miniature"], 1, {}
    for part in PARTS:
        names = [name for name in found[part] if not name.startswith("no consistency")]
        places[part] = {name: place + i for i, name in enumerate(names)}
        place += len(names) + 1
    return places


def write_names(panel: Axes, places: dict[str, dict[str, int]]) -> None:
    """Beside every row, and the parts' in their colours."""
    names = {place: name.replace("`", "") for part in places.values() for name, place in part.items()}
    heads = {min(rows.values()) - 1: part for part, rows in places.items()}
    panel.set_yticks([*names, *heads], [*names.values(), *heads.values()], fontsize=8.5)
    panel.set_ylim(max(names) + 0.7, min(heads) - 0.7)
    for tick, part in zip(panel.get_yticklabels()[len(names) :], heads.values()):
        tick.set(color=PARTS[part], fontweight="bold")


def draw_cosines(panels: Any, places: dict[str, int], rows: dict[str, Any], color: str, filled: bool) -> None:
    """A dot in each panel for everything that is different."""
    for name, place in places.items():
        for panel, (cosine, _) in zip(panels, rows.get(name, ())):
            panel.plot(cosine, place, "o", color=color, markersize=6, markerfacecolor=color if filled else PAPER)

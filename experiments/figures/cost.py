"""Time and memory of a step. Numbers: `docs/performance.json` (CPU) and `docs/gpu.json`."""

import re
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.figures.style import card, label, stored, style_of
from experiments.palette import INK

STEPS = {
    "sft": "SFT",
    "lfu-lora": "LfU (LoRA)",
    "lfu-reps": "LfU (RepS)",
    "transformers + peft: sft": "transformers + peft: SFT",
    "transformers + peft: released lfu-lora": "transformers + peft:\nreleased LfU (LoRA)",
}
"""Row of the tables -> its label."""
ON_THE_GPU = "A step at the shape of Llama-3.1-8B, 2 x 1024 tokens"


class Step(NamedTuple):
    """Time over that of SFT: median, least, greatest of the rounds; and the peak beside the weights."""

    time: list[float]
    peak_gib: float


def cost() -> Figure:
    """Bars by method, the peers' in grey."""
    finding = "An LfU step takes a little over twice an SFT step's time, and a fifth more memory"
    figure, panels = card(finding, 5.2, 2, 2, sharey=True)
    machines = {
        "SmolLM2-135M, 4 x 200 tokens, 2 CPU cores": on_the_cpu(),
        "Llama-3.1-8B's shape, 2 x 1024 tokens, H200": on_the_gpu(),
    }
    for across, (title, steps) in zip(panels, machines.items()):
        draw_bars(across[0], {name: step.time for name, step in steps.items()}, "{:.2f}")
        draw_bars(across[1], {name: [step.peak_gib] for name, step in steps.items()}, "{:.1f} GiB")
        across[0].set_title(title)
    panels[0][0].invert_yaxis()
    panels[1][0].set_xlabel("time, SFT = 1: median, range")
    panels[1][1].set_xlabel("peak memory, beside the weights")
    return figure


def on_the_cpu() -> dict[str, Step]:
    found = stored("performance")["steps"]
    return {name: Step(found[name]["time"], found[name]["peak_MiB"] / 1024) for name in STEPS}


def on_the_gpu() -> dict[str, Step]:
    """Its table is text, such as "2.21 (2.18 to 2.26)"."""
    (table,) = (each for each in stored("gpu")["tables"] if each["title"] == ON_THE_GPU)
    found = {row[0]: dict(zip(table["head"], row)) for row in table["rows"]}
    return {
        name: Step([float(n) for n in re.findall(r"[\d.]+", found[name]["/ sft"])], float(found[name]["peak GiB"]))
        for name in STEPS
    }


def draw_bars(panel: Axes, values: dict[str, list[float]], text: str) -> None:
    """The first of each row's values, and the range of the others."""
    for place, (name, (value, *ends)) in enumerate(values.items()):
        panel.barh(place, value, color=style_of(STEPS[name])["color"], height=0.62)
        if ends:
            panel.plot(ends, [place, place], color=INK, linewidth=1.2)
        label(panel, text.format(value), (max([value, *ends]), place), (5, 0))
    panel.set_yticks(range(len(values)), [STEPS[name] for name in values])
    panel.margins(x=0.2)

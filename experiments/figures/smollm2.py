"""SmolLM2-135M on 32 rows of GSM8K, where SFT overfits. Numbers: `docs/smollm2.json`."""

from statistics import mean

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.figures.style import band, card, label, stored, style_of
from experiments.palette import PAPER, SFT

PUBLISHED = {"SFT": "sft", "LfU (LoRA), λ 5": "lora", "LfU (RepS), λ 0.1": "reps"}
"""Label -> its row."""
LAMBDAS = {
    "LfU (LoRA)": {"λ 0.5": "lora0.5", "λ 5": "lora", "LfU (LoRA), λ 50": "lora50"},
    "LfU (RepS)": {"LfU (RepS), λ 0.1": "reps", "λ 1": "reps1", "λ 10": "reps10"},
}
"""Method -> its labels and rows; the published λ are 5 and 0.1."""
TO_THE_LEFT = ("lora", "reps", "reps10")
"""Rows whose labels stand there."""
RATES = {"SFT at 3e-4": "sft3e4_stopped", "SFT at 5e-4": "sft5e4_stopped", "SFT at 1e-3": "sft"}
AT_BEST: dict[str, tuple[str, str, tuple[float, float]]] = {
    "sft4e4_stopped": ("SFT", "SFT at 4e-4, best step", (-8, -5)),
    "lora0.5_stopped": ("LfU (LoRA)", "LfU (LoRA), λ 0.5", (8, 0)),
    "lora_stopped": ("LfU (LoRA)", "LfU (LoRA), λ 5", (2, 26)),
    "lora5e4_stopped": ("LfU (LoRA)", "LfU (LoRA), λ 0.5, at 5e-4", (-8, -3)),
    "reps10_stopped": ("LfU (RepS)", "LfU (RepS), λ 10", (-8, 0)),
    "anchored_stopped": ("Anchored", "Anchored to SFT's best step", (10, -14)),
    "anchored": ("Anchored", "Anchored to SFT's last step", (8, 0)),
    "distilled": ("Distillation", "distillation from SFT", (8, 0)),
}
"""Row -> its method, its label and where that stands."""
UNDER = {"facecolor": PAPER, "edgecolor": "none", "pad": 0.5}
"""What keeps a label readable across a line."""
BASELINES = {"NEFTune": "neftune", "GEM": "gem", "IM": "im"}


def overfitting() -> Figure:
    """Test NLL by step."""
    figure, panel = card("SFT overfits from step 16 on; LfU (LoRA) is slower and does not", 4.6)
    for name, row in PUBLISHED.items():
        style, by_seed = style_of(name.partition(",")[0]), curves(row, "nll")
        steps = sorted(set.intersection(*map(set, by_seed)))
        values = [[curve[step] for curve in by_seed] for step in steps]
        means = dict(zip(steps, map(mean, values)))
        panel.plot(steps, list(means.values()), **style)
        band(panel, steps, map(min, values), map(max, values), style["color"])
        label(panel, name, (steps[-1], means[steps[-1]]), color=style["color"], fontweight="bold")
        if row == "sft":
            best = min(means, key=means.__getitem__)
            label(panel, "stopped here, SFT predicts best", (best, means[best]), (0, -13), color=SFT)
    panel.set_xlim(6, 51)
    panel.set_ylim(bottom=0.9)
    panel.set_xticks(range(8, 41, 8))
    panel.set_xlabel("optimizer step")
    panel.set_ylabel("test NLL, nats per answer token")
    panel.set_title("SmolLM2-135M, 32 rows of GSM8K, published λ; first 100 test rows; mean and range of three seeds")
    return figure


def curves(row: str, name: str) -> list[dict[int, float]]:
    """Of every seed: step -> what was measured."""
    found = stored("smollm2")["curves"]
    runs = [run for run_name, run in found.items() if run_name.rpartition("-")[0] == f"small-{row}"]
    return [{int(step): value for step, value in run[name].items()} for run in runs if name in run]


def nll_against_drift() -> Figure:
    """SFT step by step, and where the other methods end."""
    figure, panel = card("LfU (LoRA) escapes SFT's overfitting; SFT stopped in time predicts better still", 5)
    nll, drift = curves("sft", "nll")[0], curves("sft", "drift")[0]
    steps = [step for step in nll if step > 4]
    panel.plot([drift[step] for step in steps], [nll[step] for step in steps], **style_of("SFT") | {"markersize": 4})
    for step, offset in ((8, (7, 4)), (16, (7, -8)), (24, (7, -3)), (40, (6, 8))):
        label(panel, f"SFT, step {step}", (drift[step], nll[step]), offset, color=SFT)
    for method, rows in LAMBDAS.items():
        draw_lambdas(panel, method, rows)
    for name, row in BASELINES.items():
        at = end(row)[:2]
        panel.plot(*at, **style_of(name) | {"markersize": 5})
        label(panel, name, at, (7, -3), color=style_of(name)["color"])
    panel.set_ylim(bottom=0.91)
    panel.set_xlabel("drift: KL(base ‖ tuned) on other prompts, nats per token")
    panel.set_ylabel("test NLL, nats per answer token")
    panel.set_title("SmolLM2-135M, 32 rows of GSM8K; first 100 test rows; one run of SFT; others: step 40, bars: seeds")
    return figure


def end(row: str) -> tuple[float, float, float, float]:
    """Drift and test NLL after the last step, means over the seeds, and how far their least and greatest NLL are."""
    finals = [curve[max(curve)] for curve in curves(row, "nll")]
    center = mean(finals)
    return stored("smollm2")["small"][row]["drift"]["mean"], center, center - min(finals), max(finals) - center


def draw_lambdas(panel: Axes, method: str, rows: dict[str, str]) -> None:
    """A line through the values of λ."""
    style = style_of(method)
    drift, nll, *reach = zip(*map(end, rows.values()))
    panel.errorbar(drift, nll, reach, linewidth=1.2, **style)
    for (text, row), at in zip(rows.items(), zip(drift, nll)):
        label(panel, text, at, (-7, 0) if row in TO_THE_LEFT else (7, 0), color=style["color"])


def best_step() -> Figure:
    """Three rates of SFT step by step, and where other methods are best on the rows held back."""
    figure, panel = card("SFT at a smaller learning rate gets where LfU gets", 5.4)
    for (text, row), line in zip(RATES.items(), (":", "--", "-")):
        held, drift = curves(row, "held")[0], curves(row, "drift")[0]
        steps = [step for step in drift if held[step] < 1.02]  # not SFT's first steps, far above the others
        at = [drift[step] for step in steps], [held[step] for step in steps]
        panel.plot(*at, **style_of("SFT") | {"markersize": 4, "linestyle": line})
        label(panel, text, (at[0][-1], at[1][-1]), color=SFT, fontweight="bold")
    for row, (method, text, offset) in AT_BEST.items():
        scores, style = stored("smollm2")["small"][row], style_of(method)
        at_best = scores["drift"]["mean"], scores["held"]["mean"]
        panel.plot(*at_best, **style)
        label(panel, text, at_best, offset, leader=abs(offset[1]) > 10, color=style["color"], bbox=UNDER)
    panel.set_xlim(0.03, 0.2)
    panel.set_xlabel("drift: KL(base ‖ tuned) on other prompts, nats per token")
    panel.set_ylabel("NLL of rows held back, nats per answer token")
    panel.set_title("SmolLM2-135M, 32 rows of GSM8K; SFT step by step, the others at their best step; one seed")
    return figure

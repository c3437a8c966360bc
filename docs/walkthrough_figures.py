"""The figures of walkthrough.ipynb: every function takes what a cell has computed and a title that says what it shows.

The two auxiliary components have the colours of their methods. `passes` is the diagram of one step.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import display
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from torch import Tensor

from experiments.palette import BASELINE, INK, LFU_LORA, LFU_REPS, PAPER, SFT

COLOR = {"LoRA": LFU_LORA, "RepS": LFU_REPS}
plt.rcParams |= {"figure.constrained_layout.use": True, "figure.dpi": 100, "font.size": 10, "legend.frameon": False}
plt.rcParams |= {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3}
plt.rcParams |= {"figure.facecolor": PAPER, "text.color": INK, "axes.labelcolor": INK, "axes.titlesize": 10}


def panels(title: str, columns: int, height: float, **options: Any) -> tuple[Figure, np.ndarray[Any, Any]]:
    """A figure of the page's width with its title, and its axes."""
    figure, axes = plt.subplots(1, columns, figsize=(10, height), squeeze=False, **options)
    figure.suptitle(title, x=0.01, ha="left", weight="bold", fontsize=11)
    return figure, axes[0]


def finish() -> None:
    """Show the figure; its title also stands for it where images are not seen."""
    figure = plt.gcf()
    display(figure, metadata={"image/png": {"alt": figure.get_suptitle()}})
    plt.close(figure)


def label(ax: Axes, text: str, x: float, y: float, color: str, offset: tuple[float, float], **options: Any) -> None:
    """A direct label: text beside a point of the data."""
    ax.annotate(text, (x, y), offset, textcoords="offset points", color=color, fontsize=9, **options)


# --- Section 1: the diagram -----------------------------------------------------------------------

BLOCKS = {"1": 20, "2": 39, "K": 61}  # x of each box


def passes() -> None:
    """One LfU step: the first pass gives h and both gradients, the second h′ and what pulls it back."""
    title = "One step is two passes: the first finds a harmful direction, the second pulls back what it moves"
    _, (ax,) = panels(title, 1, 4.2)
    ax.set(xlim=(0, 104), ylim=(3, 42))
    ax.axis("off")
    blocks(ax, 29, "$h_%s$", INK)
    blocks(ax, 8, "$h'_%s$", LFU_LORA)
    first_pass(ax)
    second_pass(ax)
    finish()


def blocks(ax: Axes, y: float, state: str, color: str) -> None:
    """The blocks of one pass from left to right, and the states between them."""
    box(ax, 6, y, 8, 5, r"$x,\ y$", INK)
    start = 10.0
    for name, x in BLOCKS.items():
        arrow(ax, (start, y), (x - 6, y), INK)
        box(ax, x, y, 12, 5, rf"block ${name}$:  $\theta$", SFT, fill=True)
        ax.text(x + 9.5, y + 0.8, state % name, color=color, ha="center", va="bottom", fontsize=12)
        start = x + 6
    ax.text(52, y, "…", ha="center", va="center", fontsize=14, bbox={"facecolor": PAPER, "lw": 0, "pad": 1})


def first_pass(ax: Axes) -> None:
    ax.text(0, 37.5, r"Pass 1: $\theta_{\mathrm{aux}}$ changes nothing yet", weight="bold")
    for x in BLOCKS.values():
        box(ax, x, 33.7, 12, 3.6, r"$\theta_{\mathrm{aux}}$", BASELINE, dashed=True)
    arrow(ax, (67, 29), (76, 29), INK)
    box(ax, 82, 29, 12, 5, r"$\ell_{\mathrm{SFT}}$  (Eq. 1)", INK)
    ax.text(89.5, 30.2, r"$\to\ g_{\mathrm{task}}$ for $\theta$", color=SFT, fontsize=11)
    ax.text(89.5, 26.2, r"$\to\ g_{\mathrm{aux}}$ for $\theta_{\mathrm{aux}}$", color=LFU_LORA, fontsize=11)


def second_pass(ax: Axes) -> None:
    ax.text(0, 20.8, "Pass 2: after one step up the loss", weight="bold")
    step = r"\alpha\ g_{\mathrm{aux}}/\Vert g_{\mathrm{aux}}\Vert$  (Eq. 2)"
    ax.text(0, 17, r"$\theta_{\mathrm{aux}} \leftarrow \theta_{\mathrm{aux}} + " + step, color=LFU_LORA, fontsize=11)
    for x in BLOCKS.values():
        box(ax, x, 12.7, 12, 3.6, r"$\theta_{\mathrm{aux}}$", LFU_LORA, fill=True)
        arrow(ax, (x + 9.5, 12.8), (x + 9.5, 27.5), LFU_LORA, dashed=True)
    arrow(ax, (67, 8), (73, 8), INK)
    ax.text(72.5, 21.4, "every $h'$ is pulled\ntowards its $h$", color=LFU_LORA, va="center", fontsize=10)
    box(ax, 82, 14, 12, 5, r"$\ell_{\mathrm{cons}}$  (Eq. 5)", LFU_LORA)
    ax.text(89.5, 13.2, r"$\to\ g_{\mathrm{cons}}$ for $\theta$", color=LFU_LORA, fontsize=11)
    both = r"$g_{\mathrm{task}} + \lambda\, g_{\mathrm{cons}}$"
    ax.text(76, 7.2, rf"$\theta$ moves by {both}  (Eq. 6)", color=SFT, fontsize=11)


def box(
    ax: Axes, x: float, y: float, width: float, height: float, text: str, color: str, *,
    fill: bool = False, dashed: bool = False,
) -> None:  # fmt: skip
    """A rounded box around (x, y), outlined or filled with its colour."""
    corner, style = (x - width / 2, y - height / 2), "--" if dashed else "-"
    face = color if fill else PAPER
    ax.add_patch(FancyBboxPatch(corner, width, height, "round,pad=0,rounding_size=0.8", fc=face, ec=color, ls=style))
    ax.text(x, y, text, ha="center", va="center", fontsize=9, color=PAPER if fill else color)


def arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], color: str, *, dashed: bool = False) -> None:
    ax.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": color, "ls": "--" if dashed else "-"})


# --- Sections 2 and 3: the loss, and what the step does -------------------------------------------


def token_losses(title: str, losses: Tensor, tokens: Sequence[str], hardest: int) -> None:
    """The loss of each answer token, the one of index `hardest` in orange."""
    _, (ax,) = panels(title, 1, 2.8)
    ax.bar(range(len(tokens)), losses, color=[LFU_LORA if i == hardest else SFT for i in range(len(tokens))])
    names = [token.replace("\n", "⏎").strip(" ") for token in tokens]
    ax.set_xticks(range(len(tokens)), names, rotation=90, fontsize=8)
    label(ax, "the one by hand", hardest, float(losses[hardest]), LFU_LORA, (9, -9))
    ax.set(xlabel="answer token", ylabel="−log p (nats)", xlim=(-0.8, len(tokens) - 0.2))
    ax.grid(axis="x", visible=False)
    finish()


def losses_along(
    title: str, lengths: Tensor, along: Mapping[str, Sequence[Tensor]], astray: Mapping[str, Sequence[Tensor]],
    slopes: Mapping[str, float], alpha: Mapping[str, float],
) -> None:  # fmt: skip
    """The loss along the gradient and in a random direction, over the length of the step, for each component."""
    _, axes = panels(title, 2, 3.3)
    for ax, (name, losses) in zip(axes, along.items()):
        line = losses[0] + lengths * slopes[name]
        ax.plot(lengths, line, "--", color=INK, lw=1)
        ax.plot(lengths, losses, "o-", color=COLOR[name])
        ax.plot(lengths, astray[name], color=BASELINE)
        label(ax, "ℓ + t·‖g‖ (straight)", 0.62, float(line[6]), INK, (-6, 10), ha="right")
        label(ax, "along g", 0.8, float(losses[8]), COLOR[name], (4, -14))
        label(ax, "a random direction", 1, float(astray[name][-1]), BASELINE, (0, 6), ha="right")
        ax.axvline(alpha[name], color=INK, lw=0.8, ls=":")
        ax.text(alpha[name], 0.93, " α", transform=ax.get_xaxis_transform())
        ax.set(title=f"auxiliary {name}", xlabel="step length t", ylabel="SFT loss (nats per token)")
        ax.margins(y=0.12)
    finish()


def state_changes(
    title: str, by_block: Mapping[str, Sequence[float]], by_position: Mapping[str, Tensor], answer: tuple[int, int]
) -> None:
    """‖h′ - h‖ / ‖h‖ after each block, and after the last one at each position; the answer's are shaded."""
    _, (left, right) = panels(title, 2, 3.3, sharey=True, width_ratios=[1, 2])
    for name, values in by_block.items():
        numbers, ratio = range(1, len(values) + 1), by_position[name]
        left.semilogy(numbers, values, "o-", color=COLOR[name])
        label(left, name, 1, values[0], COLOR[name], (0, 7))
        right.semilogy(ratio.where(ratio > 0, float("nan")), ".-", color=COLOR[name])
        left.set_xticks(numbers)
    right.axvspan(answer[0] - 0.5, answer[1] + 0.5, color=INK, alpha=0.07, lw=0)
    right.text(answer[1], right.get_ylim()[0], "positions that predict the answer", ha="right", va="bottom", fontsize=9)
    right.text(1, right.get_ylim()[0] * 1.2, "RepS: exactly 0 here", va="bottom", color=LFU_REPS, fontsize=9)
    left.set(xlabel="block l", ylabel="‖h′ − h‖ / ‖h‖", title="over the answer, by block")
    right.set(xlabel="position t", title="first row, last block, by position")
    finish()


# --- Section 4: the consistency gradient ----------------------------------------------------------


def module_norms(title: str, norms: Mapping[str, np.ndarray[Any, Any]], modules: Sequence[str]) -> None:
    """A heat map for each gradient: its norm in every module [module, block]."""
    figure, axes = panels(title, len(norms), 3.8, sharey=True)
    for ax, (name, values) in zip(axes, norms.items()):
        image = ax.imshow(np.log10(values), vmin=-3.5, vmax=0.5, cmap="cividis", aspect="auto")
        for (i, j), value in np.ndenumerate(values):
            color = "white" if value < 0.05 else "black"
            ax.text(j, i, f"{value:.2g}", ha="center", va="center", color=color, fontsize=9)
        ax.set_xticks(range(values.shape[1]), range(1, values.shape[1] + 1))
        ax.set(title=name, xlabel="block l")
        ax.grid(visible=False)
    axes[0].set_yticks(range(len(modules)), modules)
    figure.colorbar(image, ax=list(axes), label="log₁₀ of the norm")
    finish()


def norm_over_alpha(title: str, alphas: Sequence[float], norms: Mapping[tuple[str, str], Sequence[float]]) -> None:
    """‖g_cons‖ / α over α, with and without the detach, for each component."""
    _, axes = panels(title, 2, 3.2, sharey=True)
    for (name, kind), values in norms.items():
        ax = axes[list(COLOR).index(name)]
        ax.loglog(alphas, values, "o-" if kind == "with detach" else "s--", color=COLOR[name])
        label(ax, kind, alphas[1], values[1], COLOR[name], (8, -12))
        ax.set(title=f"auxiliary {name}", xlabel="length of the ascent step α")
    axes[0].set_ylabel("‖g_cons‖ / α")
    finish()


def small_steps(
    title: str, steps: Tensor, sft: Mapping[str, Sequence[Tensor]], held: Mapping[str, Sequence[Tensor]],
    anew: Mapping[str, Sequence[Tensor]],
) -> None:  # fmt: skip
    """Both losses along each gradient; the consistency loss against the old h (`held`) and against h `anew`."""
    _, (left, right) = panels(title, 2, 3.4)
    colors = dict(zip(sft, (SFT, LFU_LORA, BASELINE)))
    for name, losses in sft.items():
        left.plot(steps, losses, "o-", color=colors[name])
        offset, side = ((6, 6), "left") if name == "g_cons" else ((-7, -9 if name == "g_task" else 8), "right")
        label(left, f"along −{name}", float(steps[3]), float(losses[3]), colors[name], offset, ha=side)
    for name in held:
        right.plot(steps, held[name], "o-", color=colors[name])
        right.plot(steps, anew[name], "s--", color=colors[name], mfc=PAPER)
    left.set(xlabel="length s of the step in θ", ylabel="SFT loss (nats per token)")
    left.margins(y=0.14)
    right.set(xlabel="length s of the step in θ", ylabel="consistency loss", ylim=(0, None))
    right.plot([], [], "o-", color=INK, label="against the old h (Eq. 5)")
    right.plot([], [], "s--", color=INK, mfc=PAPER, label="against h computed anew")
    right.legend(loc="lower left", fontsize=9)
    finish()


# --- Section 7: whole runs ------------------------------------------------------------------------

LOOKS = {
    "SFT": (SFT, "o", True, (9, -13)),
    "SFT at 3e-3": (SFT, "o", False, (10, 4)),
    "LfU (LoRA), λ 0.5": (LFU_LORA, "s", True, (0, 13)),
    "LfU (LoRA), λ 5": (LFU_LORA, "s", False, (-10, -4)),
    "LfU (RepS), λ 0.1": (LFU_REPS, "^", True, (10, -2)),
}
"""Row of the plan -> its colour, its mark, whether that is filled, and where its label stands."""


def kept_against_learned(
    title: str, histories: Mapping[str, Sequence[Sequence[float]]],
    points: Mapping[str, Sequence[tuple[float, float]]], base: tuple[float, float],
) -> None:  # fmt: skip
    """Left the validation loss by epoch, right (the task, mean of the rest): dots are runs, large marks their means."""
    _, (left, right) = panels(title, 2, 4.2, width_ratios=[1, 1.25])
    for name, (color, mark, filled, offset) in LOOKS.items():
        face = color if filled else PAPER
        line = {"color": color, "ls": "-" if filled else "--", "marker": mark, "mfc": face, "ms": 4, "lw": 1.2}
        for history in histories[name]:
            left.semilogy(range(len(history)), history, **line)
        left.plot([], [], **line, label=name)
        mean = np.mean(points[name], axis=0)
        right.plot(*zip(*points[name]), ".", color=color, ms=5, alpha=0.7)
        right.plot(*mean, mark, color=color, mfc=face, ms=11, mew=2)
        label(right, name, mean[0], mean[1], color, offset, ha="right" if offset[0] < 0 else "left")
    right.plot(*zip(*(np.mean(points[name], axis=0) for name in ("SFT", "SFT at 3e-3"))), color=SFT, lw=1, zorder=1)
    right.plot(*base, "D", color=INK, ms=7)
    label(right, "base model", base[0], base[1], INK, (9, -3))
    left.legend(fontsize=8, loc="upper right")
    left.set(xlabel="epoch", ylabel="loss on the validation rows (nats per token)")
    left.set_yticks([0.2, 0.5, 1, 2], ["0.2", "0.5", "1", "2"])
    left.tick_params(axis="y", which="minor", labelleft=False)
    right.set(xlabel="learned: exact match on the task (%)", ylabel="kept: mean exact match on the rest (%)")
    right.set(xlim=(0, 62), ylim=(50, 100))
    finish()


# --- Section 8: bfloat16 --------------------------------------------------------------------------


def change_in_bfloat16(
    title: str, grid: Sequence[float], exact: Mapping[str, Sequence[float]], low: Mapping[str, Sequence[float]],
    rounding: float,
) -> None:  # fmt: skip
    """‖h′ - h‖ / ‖h‖ after the last block over α: lines in float64, markers in bfloat16."""
    _, (ax,) = panels(title, 1, 3.6)
    for name, values in exact.items():
        ax.loglog(grid, values, color=COLOR[name])
        ax.loglog(grid, low[name], "os"[name == "RepS"], color=COLOR[name])
        label(ax, f"{name}, float64", grid[2], values[2], COLOR[name], (8, -10))
        label(ax, f"{name}, bfloat16", grid[-1], low[name][-1], COLOR[name], (8, -3))
    ax.axhline(rounding, color=INK, ls="--", lw=1)
    label(ax, "rounding h once", grid[-1], rounding, INK, (8, -12))
    ax.set(xlabel="length of the ascent step α", ylabel="‖h′ − h‖ / ‖h‖", xlim=(grid[0] / 1.3, grid[-1] * 4))
    finish()


def gradients_by_precision(
    title: str, grid: Sequence[float], found: Mapping[tuple[str, str, float], tuple[float, float]], ways: Sequence[str]
) -> None:
    """Cosine with float64 (above) and norm over float64's (below) over α, for each way to compute, and component."""
    figure, axes = plt.subplots(2, 2, figsize=(10, 5.6), sharex=True, sharey="row")
    figure.suptitle(title, x=0.01, ha="left", weight="bold", fontsize=11)
    for column, name in enumerate(COLOR):
        looks = dict(zip(ways, ((INK, "-"), (BASELINE, "s:"), (INK, "^--"), (COLOR[name], "o-"))))
        for way, (color, style) in looks.items():
            for row in range(2):
                values = [found[name, way, alpha][row] for alpha in grid]
                axes[row, column].plot(grid, values, style, color=color, label=way, ms=5)
        axes[0, column].set_title(f"auxiliary {name}")
        axes[1, column].set(xlabel="length of the ascent step α", xscale="log", yscale="log")
        axes[1, column].legend(fontsize=8, loc="lower right")
    axes[0, 0].set_ylabel("cosine with float64")
    axes[1, 0].set_ylabel("norm / norm in float64")
    finish()

"""LfU in one picture: two passes, Eqs. 2, 5 and 6."""

from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from experiments.figures.style import card
from experiments.palette import BASELINE, INK, LFU_LORA, PAPER, SFT


class Box(NamedTuple):
    """A place on a board of 100 x 52, and what stands there."""

    x: float
    y: float
    width: float
    title: str
    text: str
    color: str = BASELINE


HEIGHT = 11
MODEL = Box(0, 38, 17, "θ", "model and\ntask LoRA", SFT)
AUX = Box(23, 38, 22, "a no-op on top", "auxiliary LoRA, B = 0\nor steering, d = 0")
CLEAN = Box(53, 38, 16, "states h", "of blocks 1 to K", SFT)
SFT_LOSS = Box(77, 38, 23, "SFT loss", "how unlikely the\nanswer is (Eq. 1)", SFT)
AGAIN = Box(0, 2, 17, "θ", "the same", SFT)
UNDESIRABLE = Box(23, 2, 22, "the undesirable", "no-op + α·g / ‖g‖\n(Eq. 2)", LFU_LORA)
PERTURBED = Box(53, 2, 16, "states h′", "of blocks 1 to K", LFU_LORA)
CONSISTENCY = Box(77, 2, 23, "consistency loss", "mean of ‖h − h′‖²,\nh held (Eq. 5)", LFU_LORA)
STEP = Box(77, 20, 23, "step of θ", "∇ SFT + λ · ∇ consistency\n(Eq. 6)", INK)


def schematic() -> Figure:
    """θ and a no-op, the ascent step, h and h′, and the pull."""
    figure, board = card("LfU: the auxiliary part steps uphill; θ learns to undo its effect on the states", 4.6)
    board.set(xlim=(-1, 101), ylim=(-2, 56))
    board.axis("off")
    for box in (MODEL, AUX, CLEAN, SFT_LOSS, AGAIN, UNDESIRABLE, PERTURBED, CONSISTENCY, STEP):
        draw(board, box)
    for y, text in ((52, "Pass 1: forward and backward"), (16, "Pass 2: forward and backward")):
        board.text(0, y, text, fontweight="bold", va="center")
    for row in ((MODEL, AUX, CLEAN, SFT_LOSS), (AGAIN, UNDESIRABLE, PERTURBED, CONSISTENCY)):
        across(board, *row)
    down(board, AUX, UNDESIRABLE, "ascent: a step along g,\nwhich raises the SFT loss", LFU_LORA)
    down(board, CLEAN, PERTURBED, "pull h′\nback to h", SFT, upwards=True)
    down(board, SFT_LOSS, STEP, "", INK)
    down(board, STEP, CONSISTENCY, "", INK, upwards=True)
    return figure


def draw(board: Axes, box: Box) -> None:
    """A rounded box, its title and its text."""
    style = "round,pad=0,rounding_size=1.5"
    edge = FancyBboxPatch((box.x, box.y), box.width, HEIGHT, style, fc=PAPER, ec=box.color, lw=1.8)
    board.add_patch(edge)
    x = box.x + box.width / 2
    board.text(x, box.y + 8.6, box.title, ha="center", va="center", fontweight="bold", color=box.color)
    board.text(x, box.y + 3.8, box.text, ha="center", va="center", fontsize=9)


def across(board: Axes, model: Box, aux: Box, states: Box, loss: Box) -> None:
    """model + aux → states → loss."""
    y = model.y + HEIGHT / 2
    board.text((model.x + model.width + aux.x) / 2, y, "+", ha="center", va="center", fontsize=15)
    for left, right in ((aux, states), (states, loss)):
        arrow(board, (left.x + left.width, y), (right.x, y), INK)


def down(board: Axes, upper: Box, lower: Box, text: str, color: str, upwards: bool = False) -> None:
    """An arrow between two boxes, and what it does."""
    x = upper.x + upper.width / 2
    ends = (x, upper.y), (x, lower.y + HEIGHT)
    arrow(board, *(ends[::-1] if upwards else ends), color)
    board.text(x + 1.5, (upper.y + lower.y + HEIGHT) / 2, text, va="center", color=color, fontsize=9.5)


def arrow(board: Axes, start: tuple[float, float], end: tuple[float, float], color: str) -> None:
    how = {"arrowstyle": "-|>", "color": color, "shrinkA": 3, "shrinkB": 3, "lw": 1.8}
    board.annotate("", end, start, arrowprops=how)

"""All figures by name, and the command that draws them."""

import argparse
import re
from collections.abc import Callable
from io import StringIO
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from experiments.figures import cost, gradients, miniature, schematic, smollm2, style
from lfu.io.files import write_text

FIGURES: dict[str, Callable[[], Figure]] = {
    "schematic": schematic.schematic,
    "kept-against-learned": miniature.kept_against_learned,
    "differences": miniature.differences,
    "attack": miniature.attack,
    "sweeps": miniature.sweeps,
    "overfitting": smollm2.overfitting,
    "nll-against-drift": smollm2.nll_against_drift,
    "best-step": smollm2.best_step,
    "precision": gradients.precision,
    "paper-and-code": gradients.paper_and_code,
    "cost": cost.cost,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.figures", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(FIGURES)} (default: all)")
    parser.add_argument("--out", type=Path, default=style.DOCS / "figures", help="folder (default: docs/figures)")
    parser.add_argument("--format", choices=("svg", "png"), default="svg")
    parsed = parser.parse_args()
    if unknown := set(parsed.names) - set(FIGURES):
        parser.error(f"there is no figure {', '.join(sorted(unknown))}")
    parsed.out.mkdir(parents=True, exist_ok=True)
    for name in parsed.names or FIGURES:
        draw(name, parsed.out / f"{name}.{parsed.format}")


def draw(name: str, path: Path) -> None:
    """The figure as a file; an SVG has no date, so that only its numbers decide its bytes."""
    with rc_context(style.RC):
        figure = FIGURES[name]()
        if path.suffix == ".png":
            figure.savefig(path)
            return
        text = StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    write_text(path, shortened(text.getvalue()))


def shortened(svg: str) -> str:
    """Without indentation, and letters placed to a hundredth of their size: a seventh less."""
    flush = re.sub(r"\n\s+", "\n", svg)
    return re.sub(r"translate\(([\d.]+) 0\)", lambda at: f"translate({float(at[1]):.0f} 0)", flush)


if __name__ == "__main__":
    main()

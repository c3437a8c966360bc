"""Every figure of the README and of `docs/`, drawn from the numbers that are stored there.

    make figures              # or: python -m experiments.figures [NAME ...]

writes `docs/figures/NAME.svg`. The same numbers and the same matplotlib give the same bytes. Read `style.py`, then
whatever a figure is about: `schematic.py`, `miniature.py`, `smollm2.py`, `gradients.py`, `cost.py`.
"""

"""`lfu methods`: each method in a line, with its published settings. Read next: `bench.py`."""

from dataclasses import dataclass

from lfu.errors import option_name
from lfu.methods import METHODS, Spec


@dataclass(frozen=True, kw_only=True)
class MethodsOptions:
    """None: all methods are listed."""


def print_methods(options: MethodsOptions) -> list[str]:
    """Print a line for each method, and return them: its name, what it does, and its settings as they are typed."""
    width = max(map(len, METHODS))
    lines = [f"{name:<{width}}  {summary(spec)}{settings(spec)}" for name, spec in METHODS.items()]
    print("\n".join(lines))
    return lines


def summary(spec: Spec) -> str:
    """The first sentence of the gradient's docstring."""
    function = getattr(spec.gradient, "func", spec.gradient)
    return " ".join((function.__doc__ or "").split("\n\n")[0].split())


def settings(spec: Spec) -> str:
    """Its hyper-parameters at their published values; None means all."""
    typed = [f"--{option_name(name)} {value}" for name, value in spec.published.items() if value is not None]
    return f" ({' '.join(typed)})" if typed else ""

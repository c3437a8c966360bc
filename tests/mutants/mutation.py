"""One mistake at a time, made in the real code of lfu and taken back.

A mutant is an edit of one function's source. The edited source is compiled, and the live function gets the new code:
whoever imported it by name runs the mistake, and nested functions come along. Read next: `checks.py`.
"""

import importlib
import inspect
import math
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import reduce
from types import CodeType, FunctionType
from typing import NamedTuple

VISIBLE = 100
"""By this factor a mistake must miss the tolerance of the check that catches it: no matter of luck or rounding."""


class Check(NamedTuple):
    """What a test of the suite asserts: that none of these errors is larger than the tolerance; 0 means equality."""

    name: str
    tolerance: float
    errors: Callable[[], list[float]]


class Mutant(NamedTuple):
    """A mistake: in this function of lfu, `old` has become `new`; and the check that must catch it."""

    function: str  # module.function
    mistake: str
    old: str
    new: str
    check: Check


class Outcome(NamedTuple):
    """What the check says of the mistake."""

    error: float  # the smallest, where the check looks at several cases
    factor: float  # error ÷ tolerance
    caught: bool


def outcome(mutant: Mutant) -> Outcome:
    """Make the mistake, run the check, and take the mistake back."""
    with applied(mutant):
        error = min(mutant.check.errors())
    factor = times(error, mutant.check.tolerance)
    return Outcome(error, factor, factor >= VISIBLE)


def times(error: float, tolerance: float) -> float:
    """Error ÷ tolerance; where equality is asked for, any error is infinitely many times too large."""
    if tolerance == 0:
        return math.inf if error > 0 else 0.0
    return error / tolerance


@contextmanager
def applied(mutant: Mutant) -> Iterator[None]:
    """The function runs the edited code as long as the context lasts."""
    function = live(mutant.function)
    original, function.__code__ = function.__code__, edited(function, mutant.old, mutant.new)
    try:
        yield
    finally:
        function.__code__ = original


def live(name: str) -> FunctionType:
    """The function itself, behind `property` where it is one."""
    module, *path = name.split(".")
    found = reduce(getattr, path, importlib.import_module(f"lfu.{module}"))
    return found.fget if isinstance(found, property) else found


def edited(function: FunctionType, old: str, new: str) -> CodeType:
    """The code of a function with one passage replaced. ValueError if it does not occur exactly once."""
    source = textwrap.dedent(inspect.getsource(function))
    if source.count(old) != 1:
        raise ValueError(f"{function.__qualname__} holds {source.count(old)} times, not once: {old}")
    module = compile(source.replace(old, new), function.__code__.co_filename, "exec")
    return next(code for code in module.co_consts if isinstance(code, CodeType) and code.co_name == function.__name__)

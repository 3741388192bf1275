"""A guard for reward libraries that evaluate a model's text as Python, as reasoning-gym's scorers do in several tasks.

Within `only_mathematics()` evaluated text may consist of literals, operators, one-letter names and the names below; any
other name ("__import__", an attribute …) makes the evaluation raise Forbidden, before any of the text has run.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import types
from collections.abc import Iterator
from typing import Any

# What sympy's parser writes, what it imports, and functions and constants that an answer may use. Not Integral and its
# like: an integral's scorer would take the question for its answer.
_NAMES = frozenset(
    """
    Add Eq Float Function Integer Mul Pow Rational Symbol factorial factorial2 false sympy true
    Abs E I acos acosh acot acoth acsc asec asin asinh atan atan2 atanh cbrt cos cosh cot coth csc csch erf erfc erfi
    exp log ln oo pi root sec sech sign sin sinh sqrt tan tanh theta
""".split()
)
_WRITERS = frozenset({"sympy.polys.monomials"})  # as dataclasses do, it writes and runs programs of its own
_state = threading.local()
_installing = threading.Lock()
_installed: list[bool] = []


class Forbidden(ValueError):
    """Evaluated text has a name that is not mathematics."""


@contextlib.contextmanager
def only_mathematics() -> Iterator[None]:
    """While it lasts this thread evaluates text under the rule above."""
    with _installing:
        if not _installed:  # audit hooks (PEP 578) stay for good; this one does nothing outside of the context
            sys.addaudithook(_hook)
            _installed.append(True)
    before, _state.active = getattr(_state, "active", False), True
    try:
        yield
    finally:
        _state.active = before


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if event != "exec" or not getattr(_state, "active", False):
        return
    code = arguments[0]
    if not code.co_filename.startswith("<") or code.co_filename.startswith("<frozen "):  # a module that is imported
        return
    caller = str(sys._getframe(1).f_globals.get("__name__"))
    if caller.partition(".")[0] in sys.stdlib_module_names or caller in _WRITERS:
        return
    for name in _names(code):
        if name not in _NAMES and not (len(name) == 1 and name.isalpha()):
            raise Forbidden(f"{name[:60]!a} in a text to evaluate")


def _names(code: types.CodeType) -> Iterator[str]:
    """Global names, attributes and imports of a code object and of those inside of it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)

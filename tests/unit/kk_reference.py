"""Knights and Knaves by the definitions, recursively and one assignment at a time, for tests to compare with."""

from __future__ import annotations

import itertools


def holds(statement: tuple, knights: tuple[bool, ...]) -> bool:
    """The truth of a statement when knights[i] tells whether person i is one."""
    kind, *parts = statement
    if kind in ("telling-truth", "lying"):
        return knights[parts[0]] == (kind == "telling-truth")
    values = [holds(part, knights) for part in parts]
    if kind == "not":
        return not values[0]
    if kind in ("and", "or"):
        return all(values) if kind == "and" else any(values)
    left, right = values
    return {"->": not left or right, "<=>": left == right}[kind]


def solutions(statements: tuple) -> set[tuple[bool, ...]]:
    """All assignments in which everybody's statement is true exactly if he is a knight."""
    every = itertools.product((False, True), repeat=len(statements))
    return {k for k in every if all(holds(s, k) == k[i] for i, s in enumerate(statements))}


def said(statement: tuple, names: list[str], a_knight: str = "a knight", a_knave: str = "a knave") -> str:
    """A statement of the published grammar in words, as inside a sentence."""
    kind, *parts = statement
    if kind in ("telling-truth", "lying"):
        return f"{names[parts[0]]} is {a_knight if kind == 'telling-truth' else a_knave}"
    if kind == "not":
        return said(parts[0], names, a_knight, a_knave).replace(" is ", " is not ")
    left, right = (said(part, names, a_knight, a_knave) for part in parts)
    if kind == "->":
        return f"if {left} then {right}"
    return f"{left} {'if and only if' if kind == '<=>' else kind} {right}"

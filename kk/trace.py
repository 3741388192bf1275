"""Worked solutions of a puzzle by trial: text to warm-start a small model on.

A demonstrator tries every assignment of roles in a fixed order (all knights first), checks the people's statements one
by one until one contradicts its speaker's role, and answers the first assignment that passes. `haste` makes it
imperfect: after a failed trial it gives up with that probability and answers the failed trial. The more people, the
more trials a solution needs, so a hasty demonstrator is right less often; a model of it can improve by persisting.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence

from kk.text import role

Statement = tuple


def holds(statement: Statement, roles: Sequence[bool]) -> bool:
    """Truth of a statement when person i is a knight exactly if roles[i]."""
    kind = statement[0]
    if kind in ("telling-truth", "lying"):
        return roles[statement[1]] == (kind == "telling-truth")
    values = [holds(part, roles) for part in statement[1:]]
    return {
        "not": lambda a: not a,
        "and": lambda a, b: a and b,
        "or": lambda a, b: a or b,
        "->": lambda a, b: not a or b,
        "<=>": lambda a, b: a == b,
    }[kind](*values)


def _parts(statement: Statement) -> tuple[Statement, ...]:
    """What is judged on its own before the whole: the operands of an operator."""
    return statement[1:] if statement[0] in ("and", "or", "->", "<=>") else ()


def _trial(statements: Sequence[Statement], names: Sequence[str], roles: Sequence[bool]) -> tuple[list[str], bool]:
    """The words of one trial, and whether every statement passed."""
    words = ["try", *(f"{name} is {role(r)}" for name, r in zip(names, roles, strict=True)), ":"]
    for name, statement, is_knight in zip(names, statements, roles, strict=True):
        words.append(name)
        words += ["true" if holds(part, roles) else "false" for part in _parts(statement)]
        if holds(statement, roles) != is_knight:
            return [*words, "no"], False
        words.append("ok")
    return words, True


def trials(statements: Sequence[Statement], names: Sequence[str]) -> Iterator[tuple[tuple[bool, ...], list[str], bool]]:
    """Every assignment in the demonstrator's order: roles, words of the trial, passed."""
    for roles in itertools.product((True, False), repeat=len(names)):
        yield roles, *_trial(statements, names, roles)


def worked_solution(
    statements: Sequence[Statement], names: Sequence[str], rng: random.Random, haste: float = 0.0
) -> str:
    """ "<think> … </think> <answer> (1) … </answer>" of a demonstrator with that haste (a probability).

    Raises ValueError for a puzzle without a solution.
    """
    thoughts: list[str] = []
    for roles, words, passed in trials(statements, names):
        thoughts += words
        if passed or rng.random() < haste:
            answer = [f"({i}) {n} is {role(r)}" for i, (n, r) in enumerate(zip(names, roles, strict=True), 1)]
            return f"<think> {' '.join(thoughts)} </think> <answer> {' '.join(answer)} </answer>"
    raise ValueError(f"no assignment of roles to {', '.join(names)} satisfies {statements!r}")

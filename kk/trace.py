"""Worked solutions of a puzzle by trial: text to warm-start a small model on.

A demonstrator tries every assignment of roles in a fixed order (all knights first), checks the people's statements one
by one until one contradicts its speaker's role, and answers the first assignment that passes. `haste` makes it
imperfect: after a failed trial it gives up with that probability and answers the failed trial. The more people, the
more trials a solution needs, so a hasty demonstrator is right less often; a model of it can improve by persisting.
`quoted` has it write what it judges before it judges it: to a model of few layers every word then follows from words
that are easily found.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence

from kk.text import claim_text, role

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


def _quoted(statement: Statement, names: Sequence[str], roles: Sequence[bool]) -> list[str]:
    """The statement's parts in its own words, each with its truth, and the operator between them."""
    between = {"and": "and", "or": "or", "->": "then", "<=>": "if and only if"}.get(statement[0])
    words: list[str] = []
    for part in _parts(statement) or (statement,):
        words += [between] if words and between else []
        words += [claim_text(part, names), "true" if holds(part, roles) else "false"]
    return words


def _trial(
    statements: Sequence[Statement], names: Sequence[str], roles: Sequence[bool], quoted: bool = False
) -> tuple[list[str], bool]:
    """The words of one trial, and whether every statement passed."""
    tried = [f"{name} is {role(r)}" for name, r in zip(names, roles, strict=True)]
    words = ["try", *tried, ":"]
    for name, clause, statement, is_knight in zip(names, tried, statements, roles, strict=True):
        if quoted:
            words += [clause, *_quoted(statement, names, roles)]
        else:
            words += [name, *("true" if holds(part, roles) else "false" for part in _parts(statement))]
        if holds(statement, roles) != is_knight:
            return [*words, "no"], False
        words.append("ok")
    return words, True


def trials(
    statements: Sequence[Statement], names: Sequence[str], quoted: bool = False
) -> Iterator[tuple[tuple[bool, ...], list[str], bool]]:
    """Every assignment in the demonstrator's order: roles, words of the trial, passed."""
    for roles in itertools.product((True, False), repeat=len(names)):
        yield roles, *_trial(statements, names, roles, quoted)


def worked_solution(
    statements: Sequence[Statement], names: Sequence[str], rng: random.Random, haste: float = 0.0, quoted: bool = False
) -> str:
    """ "<think> … </think> <answer> (1) … </answer>" of a demonstrator with that haste (a probability).

    Raises ValueError for a puzzle without a solution.
    """
    thoughts: list[str] = []
    for roles, words, passed in trials(statements, names, quoted):
        thoughts += words
        if passed or rng.random() < haste:
            answer = [f"({i}) {n} is {role(r)}" for i, (n, r) in enumerate(zip(names, roles, strict=True), 1)]
            return f"<think> {' '.join(thoughts)} </think> <answer> {' '.join(answer)} </answer>"
    raise ValueError(f"no assignment of roles to {', '.join(names)} satisfies {statements!r}")

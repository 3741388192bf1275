"""Puzzles that differ from a given one in one place and have another solution; `kk.perturb` puts them into words."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from typing import NamedTuple

from kk.grammar import Grammar, Statement, Statements, depth, is_leaf, leaves, random_statements
from kk.puzzle import unique_solution
from kk.rows import width

KINDS = ("statement", "leaf")
DRAWS = 64  # leaves drawn before all changes are listed
TRIES = 1000  # statements drawn before a puzzle counts as having no change; two people can say 60 different ones


class Change(NamedTuple):
    """A puzzle that differs from another in what `person` says."""

    person: int
    statements: Statements
    solution: tuple[bool, ...]


def changes(statements: Statements, kind: str, rng: random.Random) -> Iterator[Change]:
    """Distinct changes of a puzzle that have one solution, another than the puzzle's; in random order.

    The first is distributed as if changes were drawn until one fits. All changes of a leaf are tried; changes of a
    statement are drawn TRIES times, from the grammar of as much nesting and as many operands as the puzzle itself has.
    """
    before = unique_solution(statements)
    seen = {statements}
    for person, statement in (_leaf_changes if kind == "leaf" else _statement_changes)(statements, rng):
        changed = (*statements[:person], statement, *statements[person + 1 :])
        if changed in seen:
            continue
        seen.add(changed)
        solution = unique_solution(changed)
        if solution is not None and solution != before:
            yield Change(person, changed, solution)


def _statement_changes(statements: Statements, rng: random.Random) -> Iterator[tuple[int, Statement]]:
    n = len(statements)
    grammar = Grammar(max(2, *map(depth, statements)), max(2, *map(width, statements)))
    for _ in range(TRIES):
        person = int(rng.random() * n)
        yield person, random_statements(rng, n, grammar)[person]


def _leaf_changes(statements: Statements, rng: random.Random) -> Iterator[tuple[int, Statement]]:
    """Changes of one leaf as they are drawn (a uniform person, a uniform way down to a leaf, a uniform new one): some
    by drawing, which is quick, then all there are, in the order of drawing without replacement."""
    n = len(statements)
    for _ in range(DRAWS):
        person = int(rng.random() * n)
        if (changed := _drawn_leaf(statements[person], leaves(person, n), rng)) is not None:
            yield person, changed
    weighted = []
    for person, statement in enumerate(statements):
        for weight, changed in _with_other_leaf(statement, leaves(person, n)):
            # The largest of u^(1/weight), u uniform, is a draw by weight, and so is the next of what is left.
            weighted.append((math.log(1.0 - rng.random()) / weight, person, changed))
    weighted.sort(key=lambda item: item[0], reverse=True)
    for _, person, changed in weighted:
        yield person, changed


def _drawn_leaf(statement: Statement, others: Statements, rng: random.Random) -> Statement | None:
    """The statement with a random leaf exchanged for a random one of `others`; None if two operands become equal."""
    if is_leaf(statement):
        return others[int(rng.random() * len(others))]
    kind, *parts = statement
    i = int(rng.random() * len(parts))
    changed = _drawn_leaf(parts[i], others, rng)
    if changed is None or (changed != parts[i] and changed in parts):
        return None
    return (kind, *parts[:i], changed, *parts[i + 1 :])


def _with_other_leaf(statement: Statement, others: Statements) -> Iterator[tuple[float, Statement]]:
    """(weight, statement) for every statement that differs in one leaf. Operands stay distinct, as in the grammar."""
    if is_leaf(statement):
        yield from ((1.0, other) for other in others if other != statement)
        return
    kind, *parts = statement
    for i, part in enumerate(parts):
        for weight, changed in _with_other_leaf(part, others):
            if changed not in parts:
                yield weight / len(parts), (kind, *parts[:i], changed, *parts[i + 1 :])

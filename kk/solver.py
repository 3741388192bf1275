"""The reference solver: every solution of one puzzle. `kk.batch` solves many at a time and agrees with it.

Up to BIT_PEOPLE people a statement's truth table over the 2^n assignments is one integer of 2^n bits; the solutions
are the bits left after AND over people of (knight XNOR statement). Beyond, partial assignments grow person by person
and each statement drops those it contradicts as soon as everybody it names has a role.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kk.grammar import Statement, evaluate, leaf_tables, people_named

BIT_PEOPLE = 16
MAX_PARTIAL = 1 << 22  # partial assignments held at a time: 250 MB for 60 people

Roles = tuple[bool, ...]


def truth_table(statement: Statement, n: int) -> int:
    """An integer of 2^n bits; bit a tells whether the statement holds in assignment a (bit i of a: i is a knight).

    KeyError with the leaf when it is none of n people's, ValueError for an unknown kind.
    """
    return evaluate(statement, *leaf_tables(tuple(range(n))))


def _consistent(statements: Sequence[Statement]) -> int:
    """The solving assignments as one integer of 2^n bits."""
    tables, left = leaf_tables(tuple(range(len(statements))))
    every = left
    for person, statement in enumerate(statements):
        left &= tables["lying", person] ^ evaluate(statement, tables, every)
        if not left:
            break
    return left


def solve(statements: Sequence[Statement]) -> list[Roles]:
    """Every solution, True for a knight."""
    n = len(statements)
    if n > BIT_PEOPLE:
        return [tuple(map(bool, row)) for row in _grow(statements)]
    left, found = _consistent(statements), []
    while left:
        lowest = left & -left
        found.append(_roles(lowest.bit_length() - 1, n))
        left ^= lowest
    return found


def unique_solution(statements: Sequence[Statement]) -> Roles | None:
    """The solution when there is exactly one, else None."""
    if len(statements) > BIT_PEOPLE:
        found = _grow(statements)
        return tuple(map(bool, found[0])) if len(found) == 1 else None
    left = _consistent(statements)
    return None if not left or left & (left - 1) else _roles(left.bit_length() - 1, len(statements))


def _roles(assignment: int, n: int) -> Roles:
    return tuple(bool(assignment >> person & 1) for person in range(n))


def _grow(statements: Sequence[Statement]) -> np.ndarray:
    """All solutions as rows of a boolean [solutions, n] array."""
    n = len(statements)
    waiting = {i: {i, *people_named(statement)} for i, statement in enumerate(statements)}
    partial, placed = np.zeros((1, n), bool), set()
    while waiting and len(partial):
        closest = min(waiting, key=lambda i: len(waiting[i] - placed))
        person = min(waiting[closest] - placed)
        if 2 * len(partial) > MAX_PARTIAL:
            raise ValueError(f"people={n}: more than {MAX_PARTIAL} partial assignments to hold; use fewer people")
        partial = np.repeat(partial, 2, axis=0)
        partial[1::2, person] = True
        placed.add(person)
        for i in [i for i, needed in waiting.items() if needed <= placed]:
            partial = partial[_holds(statements[i], partial) == partial[:, i]]
            del waiting[i]
    return partial


def _holds(statement: Statement, roles: np.ndarray) -> np.ndarray:
    """The truth of a statement in each row of roles [rows, n], as booleans [rows]."""
    kind = statement[0]
    if kind in ("telling-truth", "lying"):
        column = roles[:, statement[1]]
        return column if kind == "telling-truth" else ~column
    first, *others = (_holds(part, roles) for part in statement[1:])
    if kind == "not":
        return ~first
    if kind == "->":
        return ~first | others[0]
    if kind == "<=>":
        return first == others[0]
    for other in others:
        first = first & other if kind == "and" else first | other
    return first

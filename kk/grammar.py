"""The statements of Knights and Knaves puzzles: what a person can say, and how statements are drawn.

A puzzle of n people is a tuple of n statements; person i makes statement i. A statement is a nested tuple:

    leaf       ('telling-truth', person) or ('lying', person)
    negation   ('not', statement)
    operator   ('and' | 'or', statement, statement, …) or ('->' | '<=>', statement, statement), operands distinct

Knights only make true statements, knaves only false ones, so an assignment of roles solves the puzzle when
"person i is a knight" and statement i have the same truth value for every i.

The published grammar (arXiv:2410.23123) nests two levels deep and joins two leaves: `PUBLISHED`. A `Grammar` may
nest deeper, join more, and leave out statements that say nothing.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

Statement = tuple
Statements = tuple[Statement, ...]

OPERATORS = ("and", "or", "->", "<=>")
KINDS = ("leaf", "not", *OPERATORS)
OPPOSITE = {"telling-truth": "lying", "lying": "telling-truth"}
MAX_LEAVES = 16  # of one statement: its truth table over the people it names is one integer of at most 2^16 bits


class Uniform(Protocol):
    """The one method used of a generator: both `random.Random` and `numpy.random.Generator` have it."""

    def random(self) -> float: ...


@dataclass(frozen=True)
class Grammar:
    """Which statements people make. The default is the published grammar."""

    depth: int = 2  # levels of nesting: 1 leaves only, 2 operators over leaves
    width: int = 2  # most operands of "and" and "or", at least 2
    constants: bool = True  # allow statements that are true (or false) whoever is what
    repeats: bool = True  # allow a statement to name somebody twice

    def check(self, n: int) -> None:
        """ValueError unless every statement can be drawn among n people."""
        if n < 2:
            raise ValueError(f"people={n}: a puzzle needs at least 2 people")
        if self.depth < 1:
            raise ValueError(f"depth={self.depth}: must be at least 1 (leaves only); 2 is the published depth")
        if not 2 <= self.width <= 2 * n - 1:
            raise ValueError(
                f"width={self.width}: must be from 2 to {2 * n - 1}, the number of different claims one of {n} people "
                "can make about one person"
            )
        if self.width ** (self.depth - 1) > MAX_LEAVES:
            raise ValueError(
                f"depth={self.depth} with width={self.width}: a statement could have "
                f"{self.width ** (self.depth - 1)} leaves; at most {MAX_LEAVES}, so lower either"
            )

    @property
    def flat(self) -> bool:
        """Whether its statements are among the published ones: leaves, their negations, operators over two leaves."""
        return (self.depth, self.width) == (2, 2)


PUBLISHED = Grammar()


def is_leaf(statement: Statement) -> bool:
    return statement[0] in OPPOSITE


def people_named(statement: Statement) -> list[int]:
    """The people a statement speaks of in reading order, each as often as it is named."""
    if is_leaf(statement):
        return [statement[1]]
    return [person for part in statement[1:] for person in people_named(part)]


def depth(statement: Statement) -> int:
    """Levels of nesting: 1 for a leaf such as ('lying', 2)."""
    return 1 if is_leaf(statement) else 1 + max(map(depth, statement[1:]))


@functools.cache
def leaves(speaker: int, n: int) -> Statements:
    """The 2n-1 claims about one person that `speaker` can make: nobody can say of himself that he lies."""
    every = [(role, person) for role in ("telling-truth", "lying") for person in range(n)]
    return tuple(leaf for leaf in every if leaf != ("lying", speaker))


def random_statements(rng: Uniform, n: int, grammar: Grammar = PUBLISHED) -> Statements:
    """Draw n statements; each of the six kinds has probability 1/6, the number of operands and the leaves are uniform.

    May have any number of solutions. ValueError below two people: one person has a single leaf, too few for an
    operator.
    """
    grammar.check(n)
    return tuple(_allowed_statement(rng, leaves(speaker, n), grammar) for speaker in range(n))


def _allowed_statement(rng: Uniform, choices: Statements, grammar: Grammar) -> Statement:
    while True:  # ends: a leaf is always allowed
        statement = _random_statement(rng, choices, grammar.depth, grammar.width)
        named = people_named(statement)
        if (grammar.repeats or len(named) == len(set(named))) and (grammar.constants or not is_constant(statement)):
            return statement


def _random_statement(rng: Uniform, choices: Statements, depth: int, width: int) -> Statement:
    kind = KINDS[int(rng.random() * 6)] if depth > 1 else "leaf"
    if kind == "leaf":
        return choices[int(rng.random() * len(choices))]
    count = 1 if kind == "not" else 2
    if kind in ("and", "or") and width > 2:
        count += int(rng.random() * (width - 1))
    parts: list[Statement] = []
    while len(parts) < count:
        part = _random_statement(rng, choices, depth - 1, width)
        if part not in parts:
            parts.append(part)
    return (kind, *parts)


def all_statements(speaker: int, n: int, grammar: Grammar = PUBLISHED) -> Iterator[Statement]:
    """Every statement of a flat grammar that `speaker` can make: 2L + 4L(L-1) of the published one, L = 2n-1."""
    choices = leaves(speaker, n)
    pairs = list(itertools.permutations(choices, 2))
    for statement in itertools.chain(
        choices, (("not", leaf) for leaf in choices), ((op, *pair) for op in OPERATORS for pair in pairs)
    ):
        named = people_named(statement)
        if (grammar.repeats or len(named) == len(set(named))) and (grammar.constants or not is_constant(statement)):
            yield statement


def evaluate(statement: Statement, tables: dict[Statement, int], every: int) -> int:
    """A statement's truth table, a bit an assignment: `tables` has those of the leaves, `every` that of a tautology.

    KeyError with the leaf when `tables` lacks it, ValueError for an unknown kind.
    """
    kind = statement[0]
    if kind in OPPOSITE:
        return tables[statement]
    if kind not in KINDS[1:]:
        raise ValueError(f"unknown kind of statement {kind!r}; known: telling-truth, lying, {', '.join(KINDS[1:])}")
    first, *others = (evaluate(part, tables, every) for part in statement[1:])
    if kind == "not":
        return every ^ first
    if kind == "->":
        return (every ^ first) | others[0]
    if kind == "<=>":
        return every ^ first ^ others[0]
    return functools.reduce(int.__and__ if kind == "and" else int.__or__, others, first)


@functools.cache
def leaf_tables(people: Statements) -> tuple[dict[Statement, int], int]:
    """Truth tables of all leaves about `people` over their 2^k assignments (bit j of an assignment: people[j] is a
    knight), and a tautology's. "The j-th lies" is blocks of 2^j ones and as many zeros in turn, from the lowest bit."""
    every = (1 << (1 << len(people))) - 1
    lying = {("lying", person): every // ((1 << (1 << j)) + 1) for j, person in enumerate(people)}
    return lying | {("telling-truth", person): every ^ table for (_, person), table in lying.items()}, every


def is_constant(statement: Statement) -> bool:
    """Whether it is self-contradictory or a tautology."""
    tables, every = leaf_tables(tuple(range(len(named := sorted(set(people_named(statement)))))))
    renamed = {(role, person): tables[role, j] for j, person in enumerate(named) for role in OPPOSITE}
    return evaluate(statement, renamed, every) in (0, every)

"""Knights and Knaves puzzles: grammar, solver, canonical form.

A puzzle of n people is a tuple of n statements; person i makes statement i. A statement is a nested tuple:

    leaf       ('telling-truth', person) or ('lying', person)
    negation   ('not', leaf)
    operator   ('and' | 'or' | '->' | '<=>', leaf, leaf), the two leaves distinct

Knights only make true statements, knaves only false ones, so an assignment of roles solves the puzzle when
"person i is a knight" and statement i have the same truth value for every i.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Protocol

Statement = tuple
Statements = tuple[Statement, ...]

OPERATORS = ("and", "or", "->", "<=>")
KINDS = ("leaf", "not", *OPERATORS)
_SYMMETRIC = frozenset({"and", "or", "<=>"})
_OPPOSITE = {"telling-truth": "lying", "lying": "telling-truth"}


class Uniform(Protocol):
    """The one method used of a generator: both `random.Random` and `numpy.random.Generator` have it."""

    def random(self) -> float: ...


@functools.cache
def leaves(speaker: int, n: int) -> Statements:
    """The 2n-1 claims about one person that `speaker` can make: nobody can say of himself that he lies."""
    every = [(role, person) for role in ("telling-truth", "lying") for person in range(n)]
    return tuple(leaf for leaf in every if leaf != ("lying", speaker))


def random_statements(rng: Uniform, n: int) -> Statements:
    """Draw n statements; each of the six kinds has probability 1/6, and leaves are uniform. May have any number of
    solutions. ValueError below two people: one person has a single leaf, too few for an operator."""
    if n < 2:
        raise ValueError(f"a puzzle needs at least 2 people, not {n}")
    return tuple(_random_statement(rng, leaves(speaker, n)) for speaker in range(n))


def _random_statement(rng: Uniform, choices: Statements) -> Statement:
    kind = KINDS[int(rng.random() * 6)]
    first = int(rng.random() * len(choices))
    if kind == "leaf":
        return choices[first]
    if kind == "not":
        return ("not", choices[first])
    second = int(rng.random() * (len(choices) - 1))
    return (kind, choices[first], choices[second + (second >= first)])  # skips `first`: distinct and uniform


def all_statements(speaker: int, n: int) -> Iterator[Statement]:
    """Every statement of the grammar that `speaker` can make: 2L + 4L(L-1) of them, L = 2n-1."""
    choices = leaves(speaker, n)
    yield from choices
    yield from (("not", leaf) for leaf in choices)
    yield from ((op, a, b) for op in OPERATORS for a in choices for b in choices if a != b)


def _every(n: int) -> int:
    """The truth table of a tautology: all 2^n bits set."""
    return (1 << (1 << n)) - 1


@functools.cache
def _leaf_tables(n: int) -> dict[Statement, int]:
    """Truth tables of all leaves. "i lies" is blocks of 2^i ones and as many zeros in turn, from the lowest bit up."""
    lying = {("lying", i): _every(n) // ((1 << (1 << i)) + 1) for i in range(n)}
    return lying | {("telling-truth", i): _every(n) ^ table for (_, i), table in lying.items()}


def truth_table(statement: Statement, n: int) -> int:
    """An integer of 2^n bits; bit a tells whether the statement holds in assignment a (bit i of a: i is a knight).

    KeyError with the leaf when it is none of n people's, ValueError for an unknown kind.
    """
    kind, tables = statement[0], _leaf_tables(n)
    if kind in _OPPOSITE:
        return tables[statement]
    first = tables[statement[1]]
    if kind == "not":
        return _every(n) ^ first
    second = tables[statement[2]]
    if kind == "and":
        return first & second
    if kind == "or":
        return first | second
    if kind == "->":
        return (_every(n) ^ first) | second
    if kind == "<=>":
        return _every(n) ^ first ^ second
    raise ValueError(f"unknown kind of statement {kind!r}; known: telling-truth, lying, not, {', '.join(OPERATORS)}")


def _consistent(statements: Sequence[Statement]) -> int:
    """The solving assignments as one integer of 2^n bits: AND over people of (knight XNOR statement)."""
    n = len(statements)
    left, tables = _every(n), _leaf_tables(n)
    for person, statement in enumerate(statements):
        left &= tables["lying", person] ^ truth_table(statement, n)
        if not left:
            break
    return left


def _roles(assignment: int, n: int) -> tuple[bool, ...]:
    return tuple(bool(assignment >> person & 1) for person in range(n))


def solve(statements: Sequence[Statement]) -> list[tuple[bool, ...]]:
    """Every solution, True for a knight. Time and memory grow as 2^n bits: meant for n up to about 20."""
    left, found = _consistent(statements), []
    while left:
        lowest = left & -left
        found.append(_roles(lowest.bit_length() - 1, len(statements)))
        left ^= lowest
    return found


def unique_solution(statements: Sequence[Statement]) -> tuple[bool, ...] | None:
    """The solution when there is exactly one, else None."""
    left = _consistent(statements)
    return None if not left or left & (left - 1) else _roles(left.bit_length() - 1, len(statements))


def canonical(statements: Sequence[Statement]) -> Statements:
    """The same value for all puzzles that differ only by who is who, by the order of the two sides of a symmetric
    operator, or by "not lying" for "telling the truth"; different values for all others, at every n.

    Trying all n! relabellings is hopeless beyond seven people. Instead people are coloured by what they say about
    which colours until that stops splitting them; what is left tied is split by hand, trying every member of the
    first tie, and the least of the resulting puzzles is the canonical one (individualisation and refinement, as in
    graph isomorphism). Random puzzles have few ties; k disjoint identical pairs would still cost 2^k k! trials.
    """
    claims = [_without_not(statement) for statement in statements]
    return min(_relabellings(claims, _refine(claims, _mentions(claims))))


def _mentions(claims: list[Statement]) -> list[int]:
    """How often each person is spoken of: first colours that leave few ties."""
    mentioned = [part[1] for claim in claims for part in ((claim,) if claim[0] in _OPPOSITE else claim[1:])]
    return [mentioned.count(person) for person in range(len(claims))]


def _without_not(statement: Statement) -> Statement:
    if statement[0] != "not":
        return statement
    role, person = statement[1]
    return (_OPPOSITE[role], person)


def _coloured(claim: Statement, speaker: int, colours: list[int]) -> Statement:
    """The claim with people replaced by (colour, is it the speaker), the sides of symmetric operators in order."""
    kind = claim[0]
    if kind in _OPPOSITE:
        return (kind, colours[claim[1]], claim[1] == speaker)
    first, second = _coloured(claim[1], speaker, colours), _coloured(claim[2], speaker, colours)
    return (kind, second, first) if kind in _SYMMETRIC and second < first else (kind, first, second)


def _refine(claims: list[Statement], colours: list[int]) -> list[int]:
    """Split colours by what their people say, until stable: colours 0..k-1, in the order of the given ones."""
    while True:
        keys = [(colours[i], _coloured(claim, i, colours)) for i, claim in enumerate(claims)]
        rank = {key: colour for colour, key in enumerate(sorted(set(keys)))}
        refined = [rank[key] for key in keys]
        if len(rank) in (len(set(colours)), len(claims)):
            return refined
        colours = refined


def _relabellings(claims: list[Statement], colours: list[int]) -> Iterator[Statements]:
    """The puzzles that result from every way to break the ties left in `colours`."""
    tied = min((colour for colour in colours if colours.count(colour) > 1), default=None)
    if tied is None:
        speakers = sorted(range(len(claims)), key=colours.__getitem__)
        yield tuple(_coloured(claims[i], i, colours) for i in speakers)
        return
    for person in [i for i, colour in enumerate(colours) if colour == tied]:
        apart = [2 * colour + (i != person) for i, colour in enumerate(colours)]
        yield from _relabellings(claims, _refine(claims, apart))

"""When two puzzles are the same: the canonical form of a puzzle under relabelling of its people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kk.grammar import OPPOSITE, Statement, Statements, is_leaf, people_named

SYMMETRIC = frozenset({"and", "or", "<=>"})


def canonical(statements: Sequence[Statement]) -> Statements:
    """The same value for all puzzles that differ only by who is who, by the order of the operands of a symmetric
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
    mentioned = [person for claim in claims for person in people_named(claim)]
    return [mentioned.count(person) for person in range(len(claims))]


def _without_not(statement: Statement) -> Statement:
    """Without the negations of leaves and of negations."""
    if is_leaf(statement):
        return statement
    kind, parts = statement[0], [_without_not(part) for part in statement[1:]]
    if kind == "not" and is_leaf(parts[0]):
        role, person = parts[0]
        return (OPPOSITE[role], person)
    return parts[0][1] if kind == "not" and parts[0][0] == "not" else (kind, *parts)


def _coloured(claim: Statement, speaker: int, colours: list[int]) -> Statement:
    """The claim with people replaced by (colour, is it the speaker), the operands of symmetric operators in order."""
    kind = claim[0]
    if kind in OPPOSITE:
        return (kind, colours[claim[1]], claim[1] == speaker)
    parts = [_coloured(part, speaker, colours) for part in claim[1:]]
    return (kind, *(sorted(parts) if kind in SYMMETRIC else parts))


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

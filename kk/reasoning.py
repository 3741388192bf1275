"""How to solve a puzzle on paper: the steps that the `cot_…` fields put into words.

Roles that one person's claim forces, given the roles known so far, are noted first, all at once. When nothing is
forced, the first person without a role is supposed to be a knight; a claim that no longer fits takes the last
supposition back, with everything that followed from it, and makes that person a knave. Checks are of single claims, as
a careful reader makes them. `kk.batch_reasoning` does the same for many puzzles at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from kk.grammar import Statement, evaluate, leaf_tables, people_named

SUPPOSE, FORCED, CLASH, REVERSE = range(4)


class Step(NamedTuple):
    """One step; fields that do not apply are those of the person before."""

    kind: int
    person: int  # whose role it is about; CLASH: whose claim does not fit
    knight: bool
    witness: int  # FORCED: whose claim forces it


class _Claim:
    """The assignments of the people a claim concerns, its speaker first, that fit it."""

    def __init__(self, speaker: int, statement: Statement) -> None:
        self.people = tuple(dict.fromkeys([speaker, *people_named(statement)]))
        self.tables, every = leaf_tables(self.people)
        self.fitting = self.tables["lying", speaker] ^ evaluate(statement, self.tables, every)

    def left(self, roles: Sequence[bool | None]) -> int:
        left = self.fitting
        for person in self.people:
            if (knight := roles[person]) is not None:
                left &= self.tables["telling-truth" if knight else "lying", person]
        return left

    def forced(self, roles: Sequence[bool | None]) -> list[tuple[int, bool]]:
        """The people without a role who can have only one, given that the claim can fit."""
        left, found = self.left(roles), []
        for person in self.people:
            knave = left & self.tables["lying", person]
            if roles[person] is None and knave in (0, left):
                found.append((person, not knave))
        return found


def reason(statements: Sequence[Statement]) -> list[Step]:
    """The steps to the first solution. ValueError when there is none."""
    claims = [_Claim(speaker, statement) for speaker, statement in enumerate(statements)]
    roles: list[bool | None] = [None] * len(claims)
    given: list[int] = []  # who got a role, in order
    supposed: list[int] = []  # where in `given` the suppositions are
    steps: list[Step] = []

    def give(kind: int, person: int, knight: bool, witness: int) -> None:
        roles[person] = knight
        given.append(person)
        steps.append(Step(kind, person, knight, witness))

    while True:
        clash = next((speaker for speaker, claim in enumerate(claims) if not claim.left(roles)), None)
        if clash is not None:
            steps.append(Step(CLASH, clash, False, clash))
            if not supposed:
                raise ValueError(f"no assignment of roles satisfies {statements!r}")
            place = supposed.pop()
            person = given[place]
            for undone in given[place:]:
                roles[undone] = None
            del given[place:]
            give(REVERSE, person, False, person)
            continue
        forced: dict[int, tuple[bool, int]] = {}
        for speaker, claim in enumerate(claims):
            for person, knight in claim.forced(roles):
                forced.setdefault(person, (knight, speaker))
        for person, (knight, speaker) in forced.items():
            give(FORCED, person, knight, speaker)
        if forced:
            continue
        if None in roles:
            supposed.append(len(given))
            give(SUPPOSE, roles.index(None), True, roles.index(None))
        else:
            return steps

"""The steps of kk.reasoning for many puzzles at a time. Shapes: B puzzles, n people, A puzzles not yet solved."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

from kk.batch import AND, IF, IFF, NOT, OR, Array, Space
from kk.reasoning import CLASH, FORCED, REVERSE, SUPPOSE

KNAVE, KNIGHT, OPEN = 1, 2, 3  # what a person can still be, as two bits


def _masks() -> Array:
    """[64] by what speaker, first and second can be (two bits each): the combinations that are left of all eight
    (bit speaker + 2 first + 4 second of a set)."""
    can = np.arange(64)
    out = np.zeros(64, np.uint8)
    for c in range(8):
        fine = np.all([can >> 2 * slot & (KNIGHT if c >> slot & 1 else KNAVE) > 0 for slot in range(3)], axis=0)
        out |= (fine << c).astype(np.uint8)
    return out


def _possible() -> Array:
    """[256] by set of combinations: what the three people can be."""
    sets, out = np.arange(256), np.zeros(256, np.uint8)
    for c in range(8):
        roles = sum((KNIGHT if c >> slot & 1 else KNAVE) << 2 * slot for slot in range(3))
        out |= np.where(sets >> c & 1, roles, 0).astype(np.uint8)
    return out


_MASKS, _POSSIBLE = _masks(), _possible()


@functools.lru_cache(maxsize=8)
def _fitting(space: Space) -> Array:
    """[codes] the combinations of three different people in which a claim fits its speaker."""
    kind, first_lies, second_lies = space.kind, space.first & 1, space.second & 1
    out = np.zeros(kind.shape, np.uint8)
    for combination in range(8):
        a, b = (combination >> 1 & 1) ^ first_lies, (combination >> 2 & 1) ^ second_lies
        true = np.select(
            [kind == NOT, kind == AND, kind == OR, kind == IF, kind == IFF],
            [1 - a, a & b, a | b, (1 - a) | b, 1 - (a ^ b)],
            a,
        )
        out |= ((true == (combination & 1)) << combination).astype(np.uint8)
    return out


# Combinations in which two slots agree: all that is left when both are the same person.
_AGREE = {
    (s, t): np.uint8(sum(1 << c for c in range(8) if (c >> s & 1) == (c >> t & 1))) for s, t in ((0, 1), (0, 2), (1, 2))
}


class Steps(NamedTuple):
    """kk.reasoning.Step of many puzzles, ordered by puzzle."""

    puzzle: Array
    kind: Array
    person: Array
    knight: Array
    witness: Array

    def of(self, puzzles: Array, count: int) -> Steps:
        """Those of some of the `count` puzzles, given in ascending order; they are numbered anew."""
        number = np.full(count, -1)
        number[puzzles] = np.arange(len(puzzles))
        kept = np.flatnonzero(number[self.puzzle] >= 0)
        return Steps(number[self.puzzle[kept]], *(column[kept] for column in self[1:]))


class _Search:
    """The puzzles that are not solved yet; arrays [A, …]."""

    def __init__(self, space: Space, codes: Array) -> None:
        a, b = space.first[codes] >> 1, space.second[codes] >> 1
        speaker = np.broadcast_to(np.arange(space.n), codes.shape)
        self.who = np.stack([speaker, a, b], axis=2)  # [A, n, 3] people of each claim
        fits = _fitting(space)[codes]
        for (s, t), agree in _AGREE.items():
            fits &= np.where(self.who[..., s] == self.who[..., t], agree, np.uint8(255))
        self.fits = fits  # [A, n]
        self.puzzle = np.arange(len(codes))
        self.can: Array = np.full(codes.shape, OPEN, np.uint8)
        self.level = np.zeros(codes.shape, np.int64)  # suppositions made when the person got a role
        self.supposed = np.zeros((len(codes), space.n + 1), np.int64)  # by level, whom about
        self.depth = np.zeros(len(codes), np.int64)
        self._number()

    def turn(self) -> list[Steps]:
        """The next steps of each puzzle, none of those that are solved; [] when all are."""
        can = self.can.ravel()
        roles = can[self.at[0]] | can[self.at[1]] << 2 | can[self.at[2]] << 4  # [A, n]
        left = self.fits & _MASKS[roles]
        possible = _POSSIBLE[left]
        clash = (left == 0).any(axis=1)
        news = (roles ^ possible) * ~clash[:, None]
        force = news.any(axis=1)
        suppose = ~clash & ~force & (self.can == OPEN).any(axis=1)
        steps = [
            self._force(news, possible),
            self._suppose(np.flatnonzero(suppose)),
            *self._reverse(np.flatnonzero(clash), left),
        ]
        going = clash | force | suppose
        if (remaining := going.sum()) < 0.8 * len(going):
            self._keep(np.flatnonzero(going))
        return steps if remaining else []

    def _keep(self, rows: Array) -> None:
        for name in ("who", "fits", "puzzle", "can", "level", "supposed", "depth"):
            setattr(self, name, getattr(self, name)[rows])
        self._number()

    def _number(self) -> None:
        """Where the people of the claims are in `can`, flat."""
        places = np.moveaxis(self.who, 2, 0) + np.arange(0, self.can.size, self.can.shape[1])[:, None]
        self.at = np.ascontiguousarray(places)  # [3, A, n]

    def _force(self, news: Array, possible: Array) -> Steps:
        """Everybody whose role a claim forces, by the first such claim."""
        claims = np.flatnonzero(news)
        bits = news.ravel()[claims]
        news_of = np.flatnonzero(np.stack([bits & 3, bits & 12, bits & 48], axis=1))
        slot = news_of % 3
        row, witness = np.divmod(claims[news_of // 3], self.can.shape[1])
        person = self.who[row, witness, slot]
        first = np.zeros(self.can.size, np.int64)
        key, index = row * self.can.shape[1] + person, np.arange(len(row))
        first[key[::-1]] = index[::-1]  # the last assignment stays
        new = first[key] == index
        row, witness, person, slot = row[new], witness[new], person[new], slot[new]
        knight = possible[row, witness] >> 2 * slot & KNIGHT > 0
        return self._give(row, FORCED, person, knight, witness)

    def _suppose(self, rows: Array) -> Steps:
        person = np.argmax(self.can[rows] == OPEN, axis=1)
        self.depth[rows] += 1
        self.supposed[rows, self.depth[rows]] = person
        return self._give(rows, SUPPOSE, person, np.ones(len(rows), bool), person)

    def _reverse(self, rows: Array, left: Array) -> tuple[Steps, Steps]:
        if not self.depth[rows].all():
            raise ValueError("a puzzle without a solution cannot be reasoned out")
        witness = np.argmax(left[rows] == 0, axis=1)
        false = np.zeros(len(rows), bool)
        clashes = Steps(self.puzzle[rows], np.full(len(rows), CLASH), witness, false, witness)
        person = self.supposed[rows, self.depth[rows]]
        undone = self.level[rows] >= self.depth[rows, None]
        self.can[rows] = np.where(undone, OPEN, self.can[rows])
        self.level[rows] = np.where(undone, 0, self.level[rows])
        self.depth[rows] -= 1
        return clashes, self._give(rows, REVERSE, person, false, person)

    def _give(self, rows: Array, kind: int, person: Array, knight: Array, witness: Array) -> Steps:
        self.can[rows, person] = np.where(knight, KNIGHT, KNAVE)
        self.level[rows, person] = self.depth[rows]
        return Steps(self.puzzle[rows], np.full(len(rows), kind), person, knight, witness)


def reason_many(space: Space, codes: Array) -> Steps:
    """The steps of puzzles [B, n] that have a solution."""
    search = _Search(space, codes)
    empty = np.zeros(0, np.int64)
    turns = [Steps(empty, empty, empty, empty.astype(bool), empty)]
    while steps := search.turn():
        turns += steps
    made = Steps(*map(np.concatenate, zip(*turns)))
    order = np.argsort(made.puzzle, kind="stable")
    return Steps(*(column[order] for column in made))

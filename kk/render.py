"""The JSON lines of many puzzles at a time: what kk.text says, put together from ready-made pieces.

Everything a line can say is a few thousand pieces of text ("Zoey is a knight", " if and only if ", the statement of a
code …), JSON-escaped once. numpy computes which pieces each line has, and one join a line makes the text.
Shapes: B puzzles, n people, E steps of reasoning of all puzzles together.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np

from kk import text
from kk.batch import AND, IF, Array, Space
from kk.batch_reasoning import Steps
from kk.reasoning import CLASH, FORCED
from kk.text import Roles


def _escaped(value: str) -> str:
    return json.dumps(value)[1:-1]


class _Pieces:
    """Pieces of text by number; 0 is empty."""

    def __init__(self) -> None:
        self.pieces: list[str] = [""]

    def add(self, pieces: Sequence[str]) -> int:
        """The number of the first of `pieces`; the others follow."""
        self.pieces += pieces
        return len(self.pieces) - len(pieces)

    def one(self, piece: str) -> int:
        return self.add([piece])


class Renderer:
    """Lines for puzzles of n people with the same names and words for roles."""

    def __init__(self, space: Space, names: Sequence[str], frames: int, roles: Roles) -> None:
        self.space, self.n, n = space, space.n, space.n
        made = _Pieces()
        escaped = [_escaped(name) for name in names]
        words = [roles.a(is_knight) for is_knight in (True, False)]
        clauses = [f"{name} is {word}" for name in escaped for word in words]  # by 2 name + is a knave
        self.clause = made.add(clauses)
        denied = made.add([f"{name} is not {word}" for name in escaped for word in words])
        if_, capital_if = (made.add([word + clause for clause in clauses]) for word in ("if ", "If "))
        # By kind: what a statement begins with (plus `capital` for IF at the beginning of a sentence) and ends with.
        self.first = np.array([self.clause, denied, self.clause, self.clause, if_, self.clause])
        self.capital = capital_if - if_
        operators = (" and ", " or ", " then ", " if and only if ")
        self.second = np.array([0, 0, *(made.add([word + clause for clause in clauses]) for word in operators)])
        cut = [_cut(frame) for frame in text.FRAMES[:frames]]
        self.open = made.add([_escaped(before.format(name=name)) for before, _, _ in cut for name in names])
        self.close = made.add([_escaped(after.format(name=name)) + " " for _, _, after in cut for name in names])
        self.pool = len(names)
        self.capitals = np.array([capital for _, capital, _ in cut])

        def each(items: Sequence[str], separator: str, last: str, end: str) -> Array:
            """[n] what to add to an item's number at each of n places, for the item and what stands after it there."""
            middle, before_last, at_end = (made.add([i + after for i in items]) for after in (separator, last, end))
            return np.array([middle] * (n - 2) + [before_last, at_end])

        told_words = f'"], "knight_knave": {json.dumps(roles.words)}, "solution": ['
        self.begin = made.one('{"quiz": "' + _escaped(text.opening(n, roles)))
        self.listed = each(escaped, ", ", ", and " if n > 2 else " and ", ". ")
        self.names = made.one(_escaped(text.question(roles)) + '", "names": ["')
        self.named = each(escaped, '", "', '", "', told_words)
        self.truth = each(["false", "true"], ", ", ", ", '], "solution_text": "')
        self.told = each(clauses, ", ", ", and ", '.", "solution_text_format": "')
        self.number = made.add([f"{'' if i == 0 else chr(92) + 'n'}({i + 1}) " for i in range(n)])
        self.statements = made.one(', "statements": "(')
        self.stated = each([_escaped(repr(statement)) for statement in space.statements], ", ", ", ", ')", "index": ')
        self._add_steps(made, escaped, clauses)
        self.pieces = np.array(made.pieces, object)

    def _add_steps(self, made: _Pieces, names: Sequence[str], clauses: Sequence[str]) -> None:
        """The pieces of the reasoning: by kind what begins a step, with its subject; a witness; the end."""
        self.subject = np.zeros(len(text.STEPS), int)
        for kind, (before, after) in text.STEPS.items():
            self.subject[kind] = made.add(
                [f'"{before}{subject}{after}' for subject in (names if kind == CLASH else clauses)]
            )
        self.witness = made.add([name + text.SAYS for name in names])
        self.end, self.last_end = made.one('.", '), made.one('."')
        self.cot_head = f'", "cot_head": {json.dumps(text.COT_HEAD)}, "cot_repeat_steps": ['
        self.cot_foot = f'], "cot_foot": {json.dumps(text.COT_FOOT)}'

    def lines(
        self, codes: Array, solution: Array, people: Array, frames: Array, steps: Steps | None = None
    ) -> list[str]:
        """The JSON lines of puzzles up to the value of "index".

        codes [B, n]; solution [B, n] True for a knight; people [B, n] names' numbers; frames [B, n].
        """
        count, n = codes.shape

        def same(piece: int) -> Array:
            return np.full((count, 1), piece)

        claims = self._claims(codes, people)
        frame = frames * self.pool + people
        capital = np.where(self.capitals[frames] & (self.space.kind[codes] == IF), self.capital, 0)
        said = np.stack([self.open + frame, claims[0] + capital, claims[1], self.close + frame], axis=2)
        clauses = 2 * people + ~solution
        numbers = np.broadcast_to(self.number + np.arange(n), clauses.shape)
        numbered = np.stack([numbers, self.clause + clauses], axis=2)
        heads = [
            same(self.begin),
            self.listed + people,
            said.reshape(count, 4 * n),
            same(self.names),
            self.named + people,
            self.truth + solution,
            self.told + clauses,
            numbered.reshape(count, 2 * n),
        ]
        tails = [same(self.statements), self.stated + codes]
        head, tail = self._joined(np.concatenate(heads, axis=1)), self._joined(np.concatenate(tails, axis=1))
        if steps is None:
            return [f'{a}"{b}' for a, b in zip(head, tail)]
        cot = self._reasoning(claims, people, steps)
        return [f"{a}{self.cot_head}{c}{self.cot_foot}{b}" for a, b, c in zip(head, tail, cot)]

    def _joined(self, ids: Array) -> list[str]:
        return ["".join(row) for row in self.pieces[ids].tolist()]

    def _claims(self, codes: Array, people: Array) -> tuple[Array, Array]:
        """[B, n] the two pieces of each statement, as inside a sentence."""
        kind = self.space.kind[codes]
        first, second = (
            2 * np.take_along_axis(people, leaf >> 1, axis=1) + (leaf & 1)
            for leaf in (self.space.first[codes], self.space.second[codes])
        )
        return self.first[kind] + first, np.where(kind >= AND, self.second[kind] + second, 0)

    def _reasoning(self, claims: tuple[Array, Array], people: Array, steps: Steps) -> list[str]:
        """The steps of each puzzle as JSON strings with commas between."""
        ids = np.zeros((len(steps.puzzle), 5), np.int64)
        person = people[steps.puzzle, steps.person]
        forced, clash = steps.kind == FORCED, steps.kind == CLASH
        ids[:, 0] = self.subject[steps.kind] + np.where(clash, person, 2 * person + ~steps.knight)
        ids[:, 1] = np.where(forced, self.witness + people[steps.puzzle, steps.witness], 0)
        for column, piece in enumerate(claims, 2):
            ids[:, column] = np.where(forced | clash, piece[steps.puzzle, steps.witness], 0)
        last = np.append(steps.puzzle[1:] != steps.puzzle[:-1], True)
        ids[:, 4] = np.where(last, self.last_end, self.end)
        pieces = self.pieces[ids.ravel()].tolist()
        stops = (5 * np.cumsum(np.bincount(steps.puzzle, minlength=len(people)))).tolist()
        return ["".join(pieces[start:stop]) for start, stop in zip([0, *stops], stops)]


def _cut(frame: str) -> tuple[str, bool, str]:
    """What stands before and after the claim in a frame, and whether the claim begins a sentence."""
    capital = "{Claim}" in frame
    before, after = frame.split("{Claim}" if capital else "{claim}")
    return before, capital, after

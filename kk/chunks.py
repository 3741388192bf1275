"""Puzzles in chunks: a chunk is a function of (what is asked for, its number), so any process can make any of them."""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from kk import text
from kk.batch import Array, Draws, space
from kk.batch_classes import classes
from kk.batch_reasoning import reason_many
from kk.batch_solver import BATCH_PEOPLE, solve_many
from kk.grammar import PUBLISHED, Grammar, random_statements
from kk.names import NAMES, names
from kk.reasoning import reason
from kk.render import Renderer
from kk.solver import unique_solution
from kk.split import SPLITS, class_of, split_of
from kk.text import FRAMES, KNIGHTS, Roles


@dataclass(frozen=True)
class Spec:
    """Which puzzles to make."""

    n: int  # people
    seed: int
    names: int = len(NAMES)  # draw from the first so many of kk.names
    frames: int = len(FRAMES)  # word statements with the first so many of kk.text.FRAMES
    roles: tuple[Roles, ...] = (KNIGHTS,)  # each puzzle draws one
    grammar: Grammar = PUBLISHED
    cot: bool = True  # with the cot_… fields

    def check(self) -> None:
        """ValueError for what cannot be made."""
        self.grammar.check(self.n)
        if self.names < self.n:
            raise ValueError(f"names={self.names}: {self.n} people need as many names; raise it to at least {self.n}")
        names(self.names)
        if not 1 <= self.frames <= len(FRAMES):
            raise ValueError(f"frames={self.frames}: must be from 1 to {len(FRAMES)}, the number of sentence frames")

    @property
    def candidates(self) -> int:
        """Puzzles drawn a chunk; about a third have one solution."""
        return (8192 if self.n <= 16 else 2048 if self.n <= BATCH_PEOPLE else 64) if self.grammar.flat else 256

    def draws(self, index: int, what: str) -> Draws:
        g = self.grammar
        grammar = f"{g.depth}.{g.width}.{g.constants:d}.{g.repeats:d}"
        return Draws(f"kk/{self.seed}/{self.n}/{grammar}/{index}/{what}")


class Chunk(Protocol):
    """The puzzles with one solution among those drawn for a chunk, P of them."""

    sides: Array  # [P] 0 train, 1 test, -1 neither
    prints: Array  # [P] uint64: different for different statements or names
    classes: Array  # [P] uint64: kk.split.class_of

    def lines(self, rows: Array) -> list[str]:
        """The JSON lines of these puzzles, up to the value of "index"."""
        ...


def make_chunk(spec: Spec, index: int) -> Chunk:
    return _BatchChunk(spec, index) if spec.grammar.flat else _SingleChunk(spec, index)


class _Dress:
    """Names [P, n], sentence frames [P, n] and words for roles [P] of a chunk's puzzles."""

    def __init__(self, spec: Spec, index: int, count: int) -> None:
        draws = spec.draws(index, "text")
        self.people = draws.subsets(spec.names, spec.n, count)
        self.frames = draws.below(spec.frames, (count, spec.n))
        self.roles = draws.below(len(spec.roles), (count,))


def _prints(columns: Array) -> Array:
    """[P] a hash of each row of [P, k] whole numbers."""
    hashed = np.full(len(columns), 0x9E3779B97F4A7C15, np.uint64)
    for column in columns.T.astype(np.uint64):
        hashed = (hashed ^ column) * np.uint64(0xD6E8FEB86659FD93)
        hashed ^= hashed >> np.uint64(32)
    return hashed


class _BatchChunk:
    """Puzzles of a flat grammar, all at a time."""

    def __init__(self, spec: Spec, index: int) -> None:
        self.spec, self.space = spec, space(spec.n, spec.grammar)
        codes = self.space.draw(spec.draws(index, "statements"), spec.candidates)
        count, solution = solve_many(self.space, codes)
        self.codes, self.solution = codes[count == 1], solution[count == 1]
        self.dress = _Dress(spec, index, len(self.codes))
        self.classes, self.sides = classes(self.space, self.codes)
        self.prints = _prints(np.concatenate([self.codes, self.dress.people], axis=1))

    def lines(self, rows: Array) -> list[str]:
        out = [""] * len(rows)
        roles = self.dress.roles[rows]
        steps = reason_many(self.space, self.codes[rows]) if self.spec.cot and len(rows) else None
        for r in range(len(self.spec.roles)):
            places = np.flatnonzero(roles == r)
            at = rows[places]
            made = _renderer(self.spec, r).lines(
                self.codes[at],
                self.solution[at],
                self.dress.people[at],
                self.dress.frames[at],
                steps if steps is None else steps.of(places, len(rows)),
            )
            for place, line in zip(places.tolist(), made):
                out[place] = line
        return out


@functools.lru_cache(maxsize=16)
def _renderer(spec: Spec, roles: int) -> Renderer:
    return Renderer(space(spec.n, spec.grammar), names(spec.names), spec.frames, spec.roles[roles])


class _SingleChunk:
    """Puzzles of any grammar, one by one."""

    def __init__(self, spec: Spec, index: int) -> None:
        self.spec = spec
        rng = spec.draws(index, "statements")
        drawn = (random_statements(rng, spec.n, spec.grammar) for _ in range(spec.candidates))
        self.puzzles = [(s, roles) for s in drawn if (roles := unique_solution(s)) is not None]
        self.dress = _Dress(spec, index, len(self.puzzles))
        self.sides = np.array([[*SPLITS, None].index(split_of(s)) for s, _ in self.puzzles], np.int8)
        self.sides[self.sides == len(SPLITS)] = -1
        self.classes = _numbers([class_of(s) for s, _ in self.puzzles])
        written = _numbers([hashlib.blake2b(repr(s).encode(), digest_size=8).digest() for s, _ in self.puzzles])
        self.prints = _prints(np.concatenate([written[:, None], self.dress.people.astype(np.uint64)], axis=1))

    def lines(self, rows: Array) -> list[str]:
        return [json.dumps({**self._row(row), "index": 0})[: -len("0}")] for row in rows.tolist()]

    def _row(self, row: int) -> dict[str, object]:
        statements, solution = self.puzzles[row]
        roles, pool = self.spec.roles[self.dress.roles[row]], names(self.spec.names)
        people = [pool[i] for i in self.dress.people[row]]
        made: dict[str, object] = {
            "quiz": text.quiz_text(statements, people, [FRAMES[i] for i in self.dress.frames[row]], roles),
            "names": people,
            "knight_knave": roles.words,
            "solution": list(solution),
            "solution_text": text.solution_text(solution, people, roles),
            "solution_text_format": text.solution_text_format(solution, people, roles),
        }
        if self.spec.cot:
            made["cot_head"] = text.COT_HEAD
            made["cot_repeat_steps"] = [text.step_text(s, statements, people, roles) for s in reason(statements)]
            made["cot_foot"] = text.COT_FOOT
        return {**made, "statements": repr(statements)}


def _numbers(digests: list[bytes]) -> Array:
    return np.frombuffer(b"".join(digests), ">u8").astype(np.uint64)

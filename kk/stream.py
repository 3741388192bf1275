"""Streams of distinct puzzles: chunks in order, each puzzle to its side, none twice; the same for any workers."""

from __future__ import annotations

import itertools
import math
import multiprocessing
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np

from kk.batch import Array
from kk.chunks import Chunk, Spec, make_chunk
from kk.split import SPLITS
from kk.supply import count_available, countable

ANY = "any"  # puzzles of either side and of neither
_IDLE = 20  # give up after so many times the puzzles given without a new one
# Puzzles from which on it is worth counting how many exist at all, by number of people; more than that exist otherwise.
_COUNT_FROM = {"puzzle": {2: 0, 3: 150_000}, "class": {2: 0, 3: 500}}


@dataclass
class Counts:
    """What became of the puzzles drawn."""

    given: dict[str, int]  # by side
    drawn: int = 0
    solvable: int = 0  # those with one solution
    neither: int = 0  # on neither side of the split
    surplus: int = 0  # of a side that has enough, or was not asked for
    repeated: int = 0  # given already

    def __str__(self) -> str:
        given = ", ".join(f"{count:,}" if side == ANY else f"{count:,} {side}" for side, count in self.given.items())
        return (
            f"{given} of {self.drawn:,} drawn; rejected: {self.drawn - self.solvable:,} without exactly one solution, "
            f"{self.surplus:,} of a side that has enough, {self.neither:,} on neither side of the split, "
            f"{self.repeated:,} repeated"
        )


class Seen:
    """A set of 64-bit hashes in sorted arrays, 8 bytes each. Two puzzles share a hash with probability 2^-64; the
    second would be left out as repeated."""

    def __init__(self) -> None:
        self.runs: list[Array] = []

    def new(self, hashes: Array) -> Array:
        """[B] which of `hashes` [B] are new, the first of equal ones; adds them."""
        new = np.zeros(len(hashes), bool)
        new[np.unique(hashes, return_index=True)[1]] = True
        for run in self.runs:
            new &= run[np.minimum(np.searchsorted(run, hashes), len(run) - 1)] != hashes
        if new.any():
            self.runs.append(np.sort(hashes[new]))
        while len(self.runs) > 1 and len(self.runs[-2]) < 2 * len(self.runs[-1]):
            last = self.runs.pop()
            self.runs[-1] = np.sort(np.concatenate([self.runs[-1], last]))
        return new


def _rows(chunk: Chunk, side: str) -> Array:
    """The puzzles of a chunk that are on a side."""
    return np.arange(len(chunk.sides)) if side == ANY else np.flatnonzero(chunk.sides == SPLITS.index(side))


class _Made:
    """A chunk from another process, with the lines of some sides."""

    def __init__(self, spec: Spec, index: int, sides: list[str]) -> None:
        chunk = make_chunk(spec, index)
        self.sides, self.prints, self.classes = chunk.sides, chunk.prints, chunk.classes
        rows = np.concatenate([_rows(chunk, side) for side in sides])
        self.made = dict(zip(rows.tolist(), chunk.lines(rows)))

    def lines(self, rows: Array) -> list[str]:
        return [self.made[row] for row in rows.tolist()]


class Workers:
    """Processes that make chunks."""

    def __init__(self, count: int) -> None:
        self.count = count
        # Not forked: a progress bar's thread may run here.
        self._pool = ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"))

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def submit(self, spec: Spec, index: int, sides: list[str]) -> Future[_Made]:
        return self._pool.submit(_Made, spec, index, sides)


class _Chunks:
    """Chunk after chunk; with workers a few are made ahead."""

    def __init__(self, spec: Spec, workers: Workers | None) -> None:
        self.spec, self.workers, self.numbers = spec, workers, itertools.count()
        self.ahead: deque[Future[_Made]] = deque()

    def next(self, sides: list[str]) -> Chunk:
        """The next chunk, with the lines of these sides at least."""
        if self.workers is None:
            return make_chunk(self.spec, next(self.numbers))
        while len(self.ahead) <= self.workers.count:
            self.ahead.append(self.workers.submit(self.spec, next(self.numbers), sides))
        return self.ahead.popleft().result()

    def close(self) -> None:
        for future in self.ahead:
            future.cancel()


class Stream:
    """Distinct puzzles of one size, as (side, JSON line); "index" counts within each side.

    wanted: how many of "train" and of "test", or of "any"; math.inf is allowed. Two and three people's puzzles end when
    there are no more. ValueError from the iteration when no new puzzle is found for a long time.
    """

    def __init__(
        self, spec: Spec, wanted: Mapping[str, float], distinct: str = "puzzle", workers: Workers | None = None
    ) -> None:
        spec.check()
        self.spec, self.wanted, self.distinct, self.workers = spec, dict(wanted), distinct, workers
        self.counts = Counts(dict.fromkeys(wanted, 0))
        self._idle = dict.fromkeys(wanted, 0)  # puzzles since the last new one

    def __iter__(self) -> Iterator[tuple[str, str]]:
        seen, chunks = Seen(), _Chunks(self.spec, self.workers)
        try:
            while open_sides := self._open():
                chunk = chunks.next(open_sides)
                self._count(chunk, open_sides)
                for side in open_sides:
                    yield from self._give(chunk, side, seen)
        finally:
            chunks.close()

    def _count(self, chunk: Chunk, open_sides: list[str]) -> None:
        self.counts.drawn += self.spec.candidates
        self.counts.solvable += len(chunk.sides)
        if ANY not in self.wanted:
            self.counts.neither += int((chunk.sides < 0).sum())
            self.counts.surplus += sum(len(_rows(chunk, side)) for side in SPLITS if side not in open_sides)

    def _give(self, chunk: Chunk, side: str, seen: Seen) -> Iterator[tuple[str, str]]:
        rows, given = _rows(chunk, side), self.counts.given
        new = seen.new((chunk.prints if self.distinct == "puzzle" else chunk.classes)[rows])
        self.counts.repeated += int((~new).sum())
        self._idle[side] = 0 if new.any() else self._idle[side] + len(rows)
        if self._idle[side] > _IDLE * (given[side] + 200):
            raise ValueError(
                f"people={self.spec.n}: {self.wanted[side]} distinct {side} puzzles asked for, but {given[side]} were "
                f"found, none among the last {self._idle[side]}; ask for fewer, or raise --names, --depth or --width"
            )
        room = int(min(self.wanted[side] - given[side], new.sum()))
        self.counts.surplus += int(new.sum()) - room
        rows = rows[new][:room]
        for block in (rows[:64], rows[64:]):  # so that the first few are there at once
            for line in chunk.lines(block):
                yield side, f"{line}{given[side]}}}"
                given[side] += 1

    def _open(self) -> list[str]:
        """The sides that want more puzzles, and have more."""
        return [
            side for side, wanted in self.wanted.items() if self.counts.given[side] < min(wanted, self._limit(side))
        ]

    def _limit(self, side: str) -> float:
        spec = self.spec
        count_from = _COUNT_FROM[self.distinct].get(spec.n, math.inf)
        if self.counts.given[side] < count_from or not countable(spec.n, spec.grammar):
            return math.inf
        return available(spec, side, self.distinct)


def available(spec: Spec, side: str, distinct: str) -> int:
    """How many distinct puzzles of a side there are; for two and three people."""
    return count_available(spec.n, spec.names, None if side == ANY else side, distinct, spec.grammar)


def check_supply(spec: Spec, wanted: Mapping[str, float], distinct: str) -> None:
    """ValueError with the number available when a side of few people has fewer distinct puzzles than wanted."""
    for side, count in wanted.items():
        few = countable(spec.n, spec.grammar) and count > _COUNT_FROM[distinct].get(spec.n, math.inf)
        if few and count > (there_are := available(spec, side, distinct)):
            exist = f"with {spec.names} names only {there_are} distinct ones exist; ask for fewer, or raise --names"
            if distinct == "class":
                exist = f"only {there_are} distinct classes exist; ask for fewer, or use --distinct puzzle"
            raise ValueError(f"people={spec.n}: {count} {side} puzzles asked for, but {exist}")

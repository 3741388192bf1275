"""Many puzzles at a time: statements as numbers, drawn and solved in numpy. Agrees with kk.grammar and kk.solver.

Of a flat grammar (see `kk.grammar.Grammar.flat`) there are few different statements: a puzzle of n people is a row of
n codes, and what depends on a statement alone is looked up by its code.

    leaf       2 p + r                        person p; r = 0 'telling-truth', 1 'lying'; M = 2n leaves
    code       leaf                           the leaf
               M + leaf                       its negation
               2M + (operator M + a) M + b    operator 0..3 of OPERATORS over leaves a and b
Shapes: B puzzles, n people.
"""

from __future__ import annotations

import functools
import hashlib

import numpy as np

from kk.grammar import OPERATORS, Grammar, Statement

Array = np.ndarray
ROLES = ("telling-truth", "lying")
LEAF, NOT, AND, OR, IF, IFF = range(6)  # kinds, in the order of kk.grammar.KINDS


class Draws:
    """Uniform numbers that depend on `key` alone: Philox's raw output, whose stream numpy guarantees for good."""

    def __init__(self, key: str) -> None:
        words = np.frombuffer(hashlib.blake2b(key.encode(), digest_size=16).digest(), "<u8")
        self._bits = np.random.Philox(key=words)

    def below(self, bound: int, shape: tuple[int, ...]) -> Array:
        """Integers in [0, bound), int64, bound <= 2^31."""
        raw = self._bits.random_raw(int(np.prod(shape))).reshape(shape) >> np.uint64(32)
        return (raw * np.uint64(bound) >> np.uint64(32)).astype(np.int64)

    def triples(self, bounds: tuple[int, int, int], count: int) -> list[Array]:
        """Three arrays of integers in [0, bound), int64 [count], bound <= 2^16: one raw number makes each three, and
        the chances of two values differ by at most 2^-21."""
        raw = self._bits.random_raw(count)
        parts = (raw >> np.uint64(shift) & np.uint64((1 << 21) - 1) for shift in (43, 22, 1))
        return [(part * np.uint64(bound) >> np.uint64(21)).astype(np.int64) for part, bound in zip(parts, bounds)]

    def random(self) -> float:
        """Uniform in [0, 1)."""
        return (int(self._bits.random_raw()) >> 11) * 2.0**-53

    def subsets(self, pool: int, k: int, count: int) -> Array:
        """[count, k] different numbers below `pool` in random order."""
        if pool > 8 * k * k:  # few rows repeat a number: draw those again
            chosen = self.below(pool, (count, k))
            while len(again := np.flatnonzero((np.diff(np.sort(chosen, axis=1), axis=1) == 0).any(axis=1))):
                chosen[again] = self.below(pool, (len(again), k))
            return chosen
        order, rows = np.tile(np.arange(pool), (count, 1)), np.arange(count)
        for i in range(k):  # the first steps of a Fisher-Yates shuffle
            j = i + self.below(pool - i, (count,))
            order[rows, j], order[:, i] = order[:, i].copy(), order[rows, j]
        return order[:, :k]


class Space:
    """All statements of n people by code."""

    def __init__(self, n: int, grammar: Grammar) -> None:
        grammar.check(n)
        if not grammar.flat:
            raise ValueError(f"depth={grammar.depth}, width={grammar.width}: codes are for depth 2 and width 2 alone")
        self.n, self.leaves = n, 2 * n
        leaf = np.arange(self.leaves)
        pairs = [np.repeat(leaf, self.leaves), np.tile(leaf, self.leaves)]
        self.kind = np.concatenate([np.repeat([LEAF, NOT], self.leaves), np.repeat([AND, OR, IF, IFF], len(pairs[0]))])
        self.first = np.concatenate([leaf, leaf, np.tile(pairs[0], 4)])  # a leaf
        self.second = np.concatenate([leaf, leaf, np.tile(pairs[1], 4)])  # the same leaf where there is no second one
        same_person = (self.kind >= AND) & (self.first >> 1 == self.second >> 1)
        constant = same_person & (self.kind != IF)
        self.refused = (same_person & (not grammar.repeats)) | (constant & (not grammar.constants))

    def draw(self, draws: Draws, count: int) -> Array:
        """[count, n] codes with the distribution of kk.grammar.random_statements."""
        speakers = np.tile(np.arange(self.n), count)
        codes = self._draw(draws, speakers)
        while len(again := np.flatnonzero(self.refused[codes])):
            codes[again] = self._draw(draws, speakers[again])
        return codes.reshape(count, self.n)

    def _draw(self, draws: Draws, speakers: Array) -> Array:
        own_lie = 2 * speakers + 1
        kind, first, second = draws.triples((6, self.leaves - 1, self.leaves - 2), len(speakers))
        second += second >= first  # distinct and uniform
        first += first >= own_lie  # nobody can say of himself that he lies
        second += second >= own_lie
        operator = 2 * self.leaves + ((kind - AND) * self.leaves + first) * self.leaves + second
        return np.where(kind >= AND, operator, kind * self.leaves + first)

    @functools.cached_property
    def statements(self) -> list[Statement]:
        """The statement of each code, as kk.grammar has it."""
        leaf = [(role, person) for person in range(self.n) for role in ROLES]
        pairs = [(a, b) for a in leaf for b in leaf]
        return [*leaf, *(("not", a) for a in leaf), *((op, *pair) for op in OPERATORS for pair in pairs)]

    def said_by(self, speaker: int) -> Array:
        """The codes of everything that `speaker` can say."""
        own = 2 * speaker + 1
        operator = self.kind >= AND
        wrong = (self.first == own) | (operator & ((self.second == own) | (self.first == self.second)))
        return np.flatnonzero(~wrong & ~self.refused)


@functools.lru_cache(maxsize=8)
def space(n: int, grammar: Grammar) -> Space:
    return Space(n, grammar)

"""Solve many puzzles at a time: 64 assignments a word, and a word goes as soon as a statement empties it.

The assignments of the first six people are the 64 bits of a word; each further person doubles the words (role knave or
knight), and every statement whose people all have roles is ANDed in at once, so that few words are ever alive: at
14 people a puzzle touches about 40 pairs of word and statement instead of 14 tables of 256 words. People go in the
order of how much is said about them, which completes statements early.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

from kk.batch import IF, IFF, NOT, OR, Array, Space
from kk.solver import solve

BATCH_PEOPLE = 40  # beyond, kk.solver's more careful order of people pays
_ROWS = 2048  # puzzles at a time: what they touch stays in a core's cache
_ALL = np.uint64(0xFFFF_FFFF_FFFF_FFFF)
_ONE = np.uint64(1)
# By literal 2 q + negated of the person at place q: the word of "q is a knight" when q < 6; otherwise, as it depends on
# bit q - 6 of the word's number, the word when that bit is 0, and the bit's place (63: a bit that is never set).
_KNIGHT = [sum(1 << a for a in range(64) if a >> q & 1) for q in range(6)] + [0] * (BATCH_PEOPLE - 6)
_WORD = np.array([word ^ (negated * int(_ALL)) for word in _KNIGHT for negated in (0, 1)], np.uint64)
_SHIFT = np.array([q - 6 if q >= 6 else 63 for q in range(BATCH_PEOPLE) for _ in range(2)], np.uint64)


class Literals(NamedTuple):
    """Statements by code as (a AND b) or (a XOR b) of literals 2 p + negated, perhaps negated; a leaf is a AND a."""

    a: Array
    b: Array
    negated: Array  # 0 or 1
    xor: Array  # a word: all ones for XOR


@functools.lru_cache(maxsize=8)
def _literals(space: Space) -> Literals:
    kind, a, b = space.kind, space.first, space.second
    is_or, is_if = kind == OR, kind == IF  # a or b = not (not a and not b); a -> b = not (a and not b)
    a, b = a ^ is_or ^ (kind == NOT), b ^ is_or ^ is_if ^ (kind == NOT)
    return Literals(a, b, (is_or | is_if | (kind == IFF)).astype(int), np.where(kind == IFF, _ALL, np.uint64(0)))


class Plan(NamedTuple):
    """The statements of B puzzles as the solver meets them: per puzzle by `level`, the place of their last person."""

    order: Array  # [B, n] who has each place
    words: tuple[Array, ...]  # [B*n] word, shift of a; of b; of "the speaker lies"; XOR mask
    count: Array  # [n, B] statements of each level
    start: Array  # [n, B] where they begin in `words`


def _plan(space: Space, codes: Array) -> Plan:
    n, rows = space.n, np.arange(len(codes))[:, None] * space.n
    of = _literals(space)
    a, b = of.a[codes], of.b[codes]
    at_a, at_b = (a >> 1) + rows, (b >> 1) + rows
    size = codes.size
    named = np.bincount(at_a.ravel(), minlength=size) + np.bincount(at_b.ravel(), minlength=size)
    by_whom = np.bincount(at_a.ravel(), named, size) + np.bincount(at_b.ravel(), named, size)
    weight = (2 * named + by_whom.astype(np.int64)).reshape(codes.shape)
    order = np.sort((1 << 40) - (weight << 8) + np.arange(n), axis=1) & 255  # ties by number
    place = np.empty(size, np.int64)
    place[order + rows] = 2 * np.arange(n)
    a, b = place[at_a] + (a & 1), place[at_b] + (b & 1)
    liar = place.reshape(codes.shape) + 1 - of.negated[codes]
    level = np.maximum(np.maximum(a, b), liar) >> 1
    by_level = ((np.sort((level << 8) + np.arange(n), axis=1) & 255) + rows).ravel()
    a, b, liar, xor = (x.ravel()[by_level] for x in (a, b, liar, of.xor[codes]))
    count = np.bincount((level + rows).ravel(), minlength=size).reshape(codes.shape)
    start = np.cumsum(count, axis=1) - count + rows
    words = (_WORD[a], _SHIFT[a], _WORD[b], _SHIFT[b], _WORD[liar], _SHIFT[liar], xor)
    return Plan(order, words, count.T.copy(), start.T.copy())


def _solve(space: Space, codes: Array) -> tuple[Array, Array]:
    plan = _plan(space, codes)
    # what is alive: of puzzle `row`, the assignments `bits` of the first six, `number` telling the others' roles
    row, number = np.arange(len(codes)), np.zeros(len(codes), np.uint64)
    bits = np.full(len(codes), (1 << (1 << min(6, space.n))) - 1, np.uint64)
    for level in range(space.n):
        if level >= 6:
            knight = number | np.uint64(1 << (level - 6))
            row, bits, number = np.tile(row, 2), np.tile(bits, 2), np.concatenate([number, knight])
        count, start = plan.count[level][row], plan.start[level][row]
        at, done = np.flatnonzero(count), 0
        while len(at):
            said = start[at] + done
            bits[at] &= _fits(tuple(words[said] for words in plan.words), number[at])
            done += 1
            at = at[count[at] > done]
        alive = np.flatnonzero(bits)
        row, bits, number = row[alive], bits[alive], number[alive]
    several = np.bincount(row, (bits & (bits - _ONE)) != 0, len(codes))
    solutions = np.minimum(np.bincount(row, minlength=len(codes)) + several.astype(np.int64), 2)
    one = np.flatnonzero(solutions[row] == 1)  # these have a single word of a single bit: its logarithm is exact
    place = np.log2(bits[one].astype(np.float64)).astype(np.uint64) | number[one] << np.uint64(6)
    roles = np.zeros(codes.shape, bool)
    roles[row[one, None], plan.order[row[one]]] = place[:, None] >> np.arange(space.n, dtype=np.uint64) & _ONE
    return solutions, roles


def _fits(words: tuple[Array, ...], number: Array) -> Array:
    """The words of (speaker is a knight XNOR statement)."""
    a, shift_a, b, shift_b, liar, shift_liar, xor = words
    a = a ^ -(number >> shift_a & _ONE)
    b = b ^ -(number >> shift_b & _ONE)
    return (a & b) ^ (xor & (a | b)) ^ liar ^ -(number >> shift_liar & _ONE)


def solve_many(space: Space, codes: Array) -> tuple[Array, Array]:
    """Number of solutions [B], 2 for two and more, and the roles [B, n], True a knight, where there is just one."""
    if space.n > BATCH_PEOPLE:
        return _solve_singly(space, codes)
    parts = [_solve(space, codes[i : i + _ROWS]) for i in range(0, len(codes), _ROWS)]
    count, roles = (np.concatenate(column) for column in zip(*parts))
    return count, roles


def _solve_singly(space: Space, codes: Array) -> tuple[Array, Array]:
    count, roles = np.zeros(len(codes), np.int64), np.zeros(codes.shape, bool)
    for b, row in enumerate(codes):
        found = solve([space.statements[code] for code in row])
        count[b] = min(len(found), 2)
        if found:
            roles[b] = found[0]
    return count, roles

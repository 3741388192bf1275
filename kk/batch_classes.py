"""The classes of many puzzles at a time: what kk.split computes of one, in numpy, with the same bytes.

A statement becomes one integer, its key, that compares as kk.canonical's tuples do: the kind, then the operands, each
1 + (role, colour, is it the speaker), 0 where there is none. Shapes: B puzzles, n people, R rows of work.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

from kk.batch import ROLES, Array, Space
from kk.canonical import SYMMETRIC
from kk.grammar import OPERATORS, Statement
from kk.split import FEW_PEOPLE_REMAINDERS, FORM_PEOPLE, SHARES, TEST_REMAINDERS, digest_of_text, meaning

# Kinds in the order of their names, as tuples compare; "not" here is not("A if and only if B").
ORDER = tuple(sorted([*OPERATORS, *ROLES, "not"]))
_RANK = {kind: rank for rank, kind in enumerate(ORDER)}
_REMEMBERED_PEOPLE = 3
_BITS = 16  # of an operand: role, a colour below 2^13, is it the speaker


class Forms(NamedTuple):
    """Statements by code, taken apart."""

    kind: Array  # rank in ORDER
    symmetric: Array  # bool
    role: Array  # [codes, 2] 1 + rank of the operand's role (lying 0, telling-truth 1), 0 for no operand
    person: Array  # [codes, 2]


def _take_apart(statements: list[Statement]) -> Forms:
    kind, symmetric, role, person = [], [], [], []
    for statement in statements:
        kind.append(_RANK[statement[0]])
        inner = statement[1] if statement[0] == "not" else statement
        symmetric.append(inner[0] in SYMMETRIC)
        operands = (inner,) if inner[0] in ROLES else inner[1:]
        padded = [*operands, *[(None, 0)] * (2 - len(operands))]
        role.append([0 if r is None else 1 + ROLES[::-1].index(r) for r, _ in padded])
        person.append([p for _, p in padded])
    return Forms(np.array(kind), np.array(symmetric), np.array(role), np.array(person))


@functools.lru_cache(maxsize=8)
def _forms(space: Space) -> tuple[Forms, Forms]:
    """The statements of a space as they are (negated leaves made leaves), and as they are meant."""
    plain = []
    for statement in space.statements:
        if statement[0] == "not":
            (role, person) = statement[1]
            plain.append((ROLES[1 - ROLES.index(role)], person))
        else:
            plain.append(statement)
    return _take_apart(plain), _take_apart([meaning(statement) for statement in plain])


class _Puzzles:
    """Puzzles whose people get colours: the work of kk.canonical on arrays."""

    def __init__(self, forms: Forms, codes: Array) -> None:
        self.n = codes.shape[1]
        self.kind = forms.kind[codes] << (2 * _BITS)
        self.swaps = forms.symmetric[codes]
        self.role, self.person = forms.role[codes], forms.person[codes]  # [B, n, 2]
        itself = (self.person == np.arange(self.n)[:, None]) & (self.role > 0)
        self.fixed = np.where(self.role > 0, (self.role - 1 << _BITS - 1) + itself + 1, 0)
        self.coloured = (self.role > 0).astype(np.int64)

    def mentions(self) -> Array:
        """[B, n] how often each person is spoken of."""
        rows = np.arange(len(self.kind))[:, None, None] * self.n
        named = np.bincount((rows + self.person).ravel(), self.coloured.ravel(), self.kind.size)
        return named.astype(np.int64).reshape(self.kind.shape)

    def keys(self, rows: Array, colours: Array) -> Array:
        """[R, n] the claims of puzzles `rows` with people replaced by their colours [R, n]."""
        at = np.arange(len(rows))[:, None, None] * self.n + self.person[rows]
        operands = self.fixed[rows] + (colours.ravel()[at] * self.coloured[rows] << 1)
        first, second = operands[..., 0], operands[..., 1]
        low, high = np.minimum(first, second), np.maximum(first, second)
        swaps = self.swaps[rows]
        first, second = np.where(swaps, low, first), np.where(swaps, high, second)
        return self.kind[rows] + (first << _BITS) + second

    def refine(self, rows: Array, colours: Array) -> tuple[Array, Array]:
        """Split colours until stable: colours 0..k-1 [R, n] and k [R]."""
        colours, out, number = colours.copy(), np.empty_like(colours), np.zeros(len(rows), np.int64)
        work, before = np.arange(len(rows)), np.zeros(len(rows), np.int64)
        while len(work):
            dense, count = _ranks((colours[work] << 3 + 2 * _BITS) + self.keys(rows[work], colours[work]))
            out[work], number[work], colours[work] = dense, count, dense
            going = (count != before[work]) & (count != self.n)
            before[work] = count
            work = work[going]
        return out, number

    def canonical(self) -> Array:
        """[B, n] keys of the claims in canonical order, the least of all ways to break ties."""
        rows = np.arange(len(self.kind))
        colours, number = self.refine(rows, self.mentions())
        found_rows, found = [], []
        while len(rows):
            settled = number == self.n
            order, done = np.argsort(colours[settled], axis=1), rows[settled]
            found_rows.append(done)
            found.append(np.take_along_axis(self.keys(done, colours[settled]), order, axis=1))
            rows, colours = self._split_ties(rows[~settled], colours[~settled])
            colours, number = self.refine(rows, colours)
        return _least(np.concatenate(found_rows), np.concatenate(found), len(self.kind))

    def _split_ties(self, rows: Array, colours: Array) -> tuple[Array, Array]:
        """Each row once for every member of its first tie, who gets a colour of his own."""
        ordered = np.sort(colours, axis=1)
        tied = ordered[np.arange(len(rows)), np.argmax(ordered[:, 1:] == ordered[:, :-1], axis=1)]
        which, person = np.nonzero(colours == tied[:, None])
        apart = 2 * colours[which] + 1
        apart[np.arange(len(which)), person] -= 1
        return rows[which], apart


def _ranks(keys: Array) -> tuple[Array, Array]:
    """Each row's keys [R, n] (n < 256) replaced by their dense ranks, and how many different ones there are [R]."""
    ordered = np.sort((keys << 8) + np.arange(keys.shape[1]), axis=1)
    person = ordered & 255
    ordered >>= 8
    rank = np.zeros_like(keys)
    rank[:, 1:] = np.cumsum(ordered[:, 1:] != ordered[:, :-1], axis=1)
    dense = np.empty_like(keys)
    dense[np.arange(len(keys))[:, None], person] = rank
    return dense, rank[:, -1] + 1


def _least(rows: Array, keys: Array, count: int) -> Array:
    """[count, n] the lexicographically least of each row's candidates."""
    order = np.lexsort([*keys.T[::-1], rows])
    first = np.searchsorted(rows[order], np.arange(count))
    return keys[order[first]]


class _Texts(dict):
    """The repr of kk.canonical's tuple by key, made when first asked for."""

    def __missing__(self, key: int) -> str:
        kind, operands = ORDER[key >> 2 * _BITS], [key >> _BITS & 0xFFFF, key & 0xFFFF]
        leaves = [(ROLES[1 - (o - 1 >> 15)], o - 1 >> 1 & 0x3FFF, bool(o - 1 & 1)) for o in operands if o]
        if kind in ROLES:
            form = (kind, *leaves[0][1:])
        else:
            form = ("not", ("<=>", *leaves)) if kind == "not" else (kind, *leaves)
        self[key] = repr(form)
        return self[key]


_TEXTS = _Texts()


def _digest(keys: list[int]) -> bytes:
    """kk.split.digest of a canonical form."""
    return digest_of_text(f"({', '.join([_TEXTS[key] for key in keys])})")


class _Digests(dict):
    """`_digest` by the bytes of a form's keys. Up to three people there are but 15,000 forms."""

    def __missing__(self, form: bytes) -> bytes:
        self[form] = _digest(np.frombuffer(form, np.int64).tolist())
        return self[form]


_DIGESTS = _Digests()


def _digests(forms: Forms, codes: Array) -> Array:
    """[B] kk.split.digest of each puzzle's canonical form, as a big-endian number."""
    keys = _Puzzles(forms, codes).canonical()
    if codes.shape[1] <= _REMEMBERED_PEOPLE:
        raw, width = keys.tobytes(), 8 * codes.shape[1]
        digests = [_DIGESTS[raw[at : at + width]] for at in range(0, len(raw), width)]
    else:
        digests = [_digest(row) for row in keys.tolist()]
    return np.frombuffer(b"".join(digests), ">u8").astype(np.uint64)


def classes(space: Space, codes: Array) -> tuple[Array, Array]:
    """kk.split.class_of each puzzle as a number [B], and its side [B]: 0 train, 1 test, -1 neither."""
    plain, meant = _forms(space)
    digests = _digests(meant, codes)
    if space.n > FORM_PEOPLE:
        return digests, _is_test(digests, TEST_REMAINDERS).astype(np.int8)
    as_said = digests.copy()
    other = (
        (plain.kind != meant.kind) | (plain.role != meant.role).any(axis=1) | (plain.person != meant.person).any(axis=1)
    )
    reworded = np.flatnonzero(other[codes].any(axis=1))
    as_said[reworded] = _digests(plain, codes[reworded])
    tests = _is_test(digests, FEW_PEOPLE_REMAINDERS)
    return digests, np.where(tests == _is_test(as_said, TEST_REMAINDERS), tests, -1).astype(np.int8)


def _is_test(digests: Array, remainders: tuple[int, ...]) -> Array:
    return np.isin(digests % np.uint64(SHARES), remainders)

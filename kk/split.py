"""Which puzzles train and which test: a function of the puzzle alone, so that no run leaks into another.

A puzzle's side is a hash of what it says (`meaning`) in canonical form: one class in five tests. So no test puzzle is a
relabelled training puzzle at any number of people, nor one with the same truth tables in other words, whatever the
seeds and sizes of the two runs.

Up to FORM_PEOPLE people, where classes are few, the class of the form (without regard to meaning) must fall on
the same side; a puzzle whose two classes disagree is on neither. The shipped model, examples/models/kk-tiny, was
trained on one side of the classes of form, of at most five people: this keeps what it has seen out of the test side.
So that enough is left on the test side, two classes of meaning in five test there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from kk.canonical import canonical
from kk.grammar import OPPOSITE, Statement, Statements, evaluate, is_leaf, leaf_tables, people_named

SPLITS = ("train", "test")
FORM_PEOPLE = 5
SHARES = 5
TEST_REMAINDERS = (0,)  # a class tests when its digest has such a remainder by SHARES
FEW_PEOPLE_REMAINDERS = (0, 3)  # of a class of meaning, up to FORM_PEOPLE people


def meaning(statement: Statement) -> Statement:
    """One statement for all that are logically equivalent, when what matters is the roles of at most two people.

    "if A then B" becomes an "or", "A if and only if B" speaks of knights, and what depends on nobody is ('and',) (true)
    or ('or',) (false). Equivalent statements about three people and more may stay different.
    """
    named = tuple(sorted(set(people_named(statement))))
    if is_leaf(statement) or len(named) > 8:  # 2^8 bits: what matters of so many is hardly ever just two
        return statement
    tables, every = leaf_tables(named)
    table = evaluate(statement, tables, every)
    if table in (0, every):
        return ("and",) if table else ("or",)
    matter = [p for j, p in enumerate(named) if _flipped(table, j, tables["lying", p]) != table]
    for simple in _simple(matter):
        if evaluate(simple, tables, every) == table:
            return simple
    return statement


def _flipped(table: int, j: int, knave: int) -> int:
    """The table with the roles of the j-th person exchanged; `knave`: the assignments in which he is a knave."""
    width = 1 << j
    return (table & knave) << width | (table >> width) & knave


def _simple(people: Sequence[int]) -> list[Statement]:
    """The statements that `meaning` gives about one or two people."""
    if len(people) == 1:
        return [(role, people[0]) for role in OPPOSITE]
    if len(people) != 2:
        return []
    both = tuple(("telling-truth", person) for person in people)
    pairs = [((a, people[0]), (b, people[1])) for a in OPPOSITE for b in OPPOSITE]
    return [("<=>", *both), ("not", ("<=>", *both)), *((op, *pair) for op in ("and", "or") for pair in pairs)]


def digest(form: Statements) -> bytes:
    """8 bytes that name a class: the hash of its canonical form."""
    return digest_of_text(repr(form))


def digest_of_text(form: str) -> bytes:
    """`digest` of a form that is written already."""
    return hashlib.blake2b(form.encode(), digest_size=8).digest()


def class_of(statements: Sequence[Statement]) -> bytes:
    """8 bytes, the same for puzzles that say the same about other people (see `meaning` and `canonical`)."""
    return digest(canonical([meaning(statement) for statement in statements]))


def split_of(statements: Sequence[Statement]) -> str | None:
    """ "train", "test", or None: the puzzle is on neither side."""
    few = len(statements) <= FORM_PEOPLE
    tests = _tests(class_of(statements), FEW_PEOPLE_REMAINDERS if few else TEST_REMAINDERS)
    if few and _tests(digest(canonical(statements)), TEST_REMAINDERS) != tests:
        return None
    return SPLITS[tests]


def _tests(digest: bytes, remainders: tuple[int, ...]) -> bool:
    return int.from_bytes(digest, "big") % SHARES in remainders

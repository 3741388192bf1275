"""Which rows of a mixture to take: lengths, duplicates, splits, limits. About 70 bytes a row, whatever its text.

A row is known by the digest of its normalised prompt. All choices are functions of those digests and the seed: they
depend neither on the order of the inputs nor on how often they are read.
"""

from __future__ import annotations

import fnmatch
import hashlib
import unicodedata
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from dataset_mix.inputs import Row

SPLITS = ("train", "test")
UNDECIDED = 2  # beside 0 train, 1 test
TAKEN, TOO_LONG, DUPLICATE, OVER_LIMIT = range(4)  # what becomes of a row


def normalised(messages: Sequence[Mapping[str, str]]) -> str:
    """The users' words as two prompts are compared by: compatibility forms, case and white space do not count."""
    words = " ".join(m["content"] for m in messages if m["role"] == "user")
    return " ".join(unicodedata.normalize("NFKC", words).casefold().split())


def digest(text: str, size: int = 16) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=size).digest()


@dataclass
class Rows:
    """What is kept of all valid rows while they are read once; columns of equal length R."""

    sources: dict[str, int] = field(default_factory=dict)  # name -> number
    file: array = field(default_factory=lambda: array("i"))  # index of the input
    number: array = field(default_factory=lambda: array("q"))  # of the row in its file, as kk.files numbers it
    source: array = field(default_factory=lambda: array("i"))
    given_split: array = field(default_factory=lambda: array("b"))  # index into SPLITS, or UNDECIDED
    to_test: array = field(default_factory=lambda: array("d"))  # below 1 a share, else a count; 0 where it is decided
    length: array = field(default_factory=lambda: array("q"))  # tokens of the prompt, or characters
    prompts: bytearray = field(default_factory=bytearray)  # 16 bytes a row: digest of the normalised prompt
    truths: array = field(default_factory=lambda: array("Q"))  # digest of the ground truth

    def __len__(self) -> int:
        return len(self.source)

    def add(self, file: int, number: int, row: Row, to_test: float, length: int) -> None:
        self.file.append(file)
        self.number.append(number)
        self.source.append(self.sources.setdefault(row.source, len(self.sources)))
        self.given_split.append(SPLITS.index(row.split) if row.split else UNDECIDED)
        self.to_test.append(to_test)
        self.length.append(length)
        self.prompts += digest(normalised(row.messages))
        self.truths.append(int.from_bytes(digest(row.ground_truth, 8), "big"))


@dataclass(frozen=True)
class Rules:
    """What to take."""

    seed: int = 0
    longest: int | None = None  # of a prompt, in the unit of Rows.length
    duplicates: str = "drop"  # or keep, or refuse
    limits: tuple[tuple[str, str, int], ...] = ()  # (pattern of sources, split, rows): the first that matches counts
    totals: Mapping[str, int] = field(default_factory=dict)  # split -> rows


@dataclass(frozen=True)
class Plan:
    """fate and split of every row [R]; `first`: the row that a duplicate repeats (of itself for others)."""

    fate: np.ndarray  # int8, TAKEN, …
    split: np.ndarray  # int8, index into SPLITS
    first: np.ndarray  # int64


def make_plan(rows: Rows, rules: Rules) -> Plan:
    """Decide for all rows: first lengths, then duplicates, splits, limits per source, and totals."""
    source, split = np.array(rows.source, np.int64), np.array(rows.given_split, np.int8)
    prompts = np.frombuffer(bytes(rows.prompts), ">u8").reshape(-1, 2)
    fate = np.full(len(rows), TAKEN, np.int8)
    if rules.longest is not None:
        fate[np.array(rows.length) > rules.longest] = TOO_LONG
    first = first_of_equals(prompts, split, fate == TAKEN)
    if rules.duplicates != "keep":
        fate[first != np.arange(len(rows))] = DUPLICATE
    key = sample_key(prompts, rules.seed)
    share = np.array(rows.to_test)
    for number in range(len(rows.sources)):
        mine = np.flatnonzero((source == number) & (split == UNDECIDED))
        split[mine] = 0
        for part in np.unique(share[mine]):  # a source may come from files with different shares
            some = mine[(share[mine] == part) & (fate[mine] == TAKEN)]
            count = int(part) if part >= 1 else int(np.floor(part * len(some) + 0.5))
            split[some[np.argsort(key[some], kind="stable")[:count]]] = 1
    _limit(rows, rules, fate, split, source, key)
    return Plan(fate, split, first)


def first_of_equals(prompts: np.ndarray, split: np.ndarray, alive: np.ndarray) -> np.ndarray:
    """int64 [R]: for each row the one that stands for all alive rows with its prompt (uint64 [R, 2]); itself if unique.

    A test row stands for training rows, so that what is dropped is never the test set's; else the first one does.
    """
    stands_for = np.arange(len(prompts))
    candidates = np.flatnonzero(alive)
    candidates = candidates[np.lexsort((candidates, split[candidates] != 1, *prompts[candidates].T))]
    if len(candidates):
        sorted_prompts = prompts[candidates]
        begins = np.concatenate([[True], (sorted_prompts[1:] != sorted_prompts[:-1]).any(axis=1)])
        stands_for[candidates] = candidates[np.maximum.accumulate(np.where(begins, np.arange(len(begins)), 0))]
    return stands_for


def sample_key(prompts: np.ndarray, seed: int) -> np.ndarray:
    """uint64 [R]: the lowest keys of a set of rows are a random sample of it, without replacement.

    A multiplication and two shifts mix the prompt's digest (itself uniform) with the seed's (as in SplitMix64).
    """
    mixed = prompts[:, 0].astype(np.uint64) ^ np.uint64(int.from_bytes(digest(f"mix/{seed}", 8), "big"))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))


def _limit(rows: Rows, rules: Rules, fate: np.ndarray, split: np.ndarray, source: np.ndarray, key: np.ndarray) -> None:
    """Mark what is over the limits, in place."""
    for name, number in rows.sources.items():
        for side, label in enumerate(SPLITS):
            limit = next(
                (n for pattern, s, n in rules.limits if s == label and fnmatch.fnmatchcase(name, pattern)), None
            )
            if limit is not None:
                _keep_lowest(fate, key, (source == number) & (split == side), limit)
    for label, limit in rules.totals.items():
        _keep_lowest(fate, key, split == SPLITS.index(label), limit)


def _keep_lowest(fate: np.ndarray, key: np.ndarray, among: np.ndarray, limit: int) -> None:
    some = np.flatnonzero(among & (fate == TAKEN))
    fate[some[np.argsort(key[some], kind="stable")[limit:]]] = OVER_LIMIT

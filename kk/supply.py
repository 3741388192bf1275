"""How many different puzzles there are, where that can be counted: two and three people, the published nesting."""

from __future__ import annotations

import functools
import math

import numpy as np

from kk.batch import Array, space
from kk.batch_classes import classes
from kk.batch_solver import solve_many
from kk.grammar import PUBLISHED, Grammar
from kk.split import SPLITS

_MAX_PEOPLE = 3  # four people make over 10^9 statement tuples
DISTINCT = ("puzzle", "class")  # what must not repeat: statements with names, or what is said by whomever


def countable(n: int, grammar: Grammar) -> bool:
    return n <= _MAX_PEOPLE and grammar.flat


@functools.lru_cache(maxsize=8)
def _solvable(n: int, grammar: Grammar) -> tuple[Array, Array]:
    """Class and side (see kk.batch_classes.classes) of every statement tuple with one solution."""
    made = space(n, grammar)
    axes = np.meshgrid(*(made.said_by(speaker) for speaker in range(n)), indexing="ij")
    codes = np.stack([axis.ravel() for axis in axes], axis=1)
    found = [part[solve_many(made, part)[0] == 1] for part in np.array_split(codes, len(codes) // 8192 + 1)]
    parts = [classes(made, part) for part in found]
    return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])


def count_solvable(n: int, split: str | None = None, distinct: str = "puzzle", grammar: Grammar = PUBLISHED) -> int:
    """Statement tuples (or, distinct="class", classes of them) with one solution on a side (None: all there are).

    By enumeration: at once for two people, a few seconds for three.
    """
    digests, sides = _solvable(n, grammar)
    chosen = digests if split is None else digests[sides == SPLITS.index(split)]
    return len(np.unique(chosen)) if distinct == "class" else len(chosen)


def count_available(
    n: int, names: int, split: str | None = None, distinct: str = "puzzle", grammar: Grammar = PUBLISHED
) -> int:
    """How many distinct puzzles there are: statements with names, or classes."""
    return count_solvable(n, split, distinct, grammar) * (math.perm(names, n) if distinct == "puzzle" else 1)

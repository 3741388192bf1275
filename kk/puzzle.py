"""Knights and Knaves puzzles: the reference for one puzzle at a time.

kk.grammar has the statements, kk.solver their solutions, kk.canonical when two puzzles are the same, kk.split which of
them test. `kk.batch…` compute the same for thousands of puzzles at a time.
"""

from kk.canonical import canonical
from kk.grammar import (
    KINDS,
    OPERATORS,
    PUBLISHED,
    Grammar,
    Statement,
    Statements,
    all_statements,
    depth,
    leaves,
    random_statements,
)
from kk.solver import solve, truth_table, unique_solution
from kk.split import class_of, meaning, split_of

__all__ = [
    "KINDS",
    "OPERATORS",
    "PUBLISHED",
    "Grammar",
    "Statement",
    "Statements",
    "all_statements",
    "canonical",
    "class_of",
    "depth",
    "leaves",
    "meaning",
    "random_statements",
    "solve",
    "split_of",
    "truth_table",
    "unique_solution",
]

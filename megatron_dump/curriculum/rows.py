"""Which rows of the data set each source has."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np


class SourceRows:
    """K sources in sorted order over R rows, as flat arrays: no Python loop over rows or sources at draw time.

    names   [K], sorted: a set's order depends on the hash seed
    of_row  int32 [R], the source of every row
    order   int64 [R], rows sorted by source, inside a source in the data set's order
    starts  int64 [K+1], source k's rows are order[starts[k] : starts[k + 1]]
    sizes   int64 [K]
    """

    def __init__(self, source_of_rows: Sequence[str]):
        """source_of_rows: the name of every row's source."""
        seen: dict[str, int] = {}  # a dict, because sorting a million strings takes seconds
        first_seen = np.fromiter((seen.setdefault(name, len(seen)) for name in source_of_rows), np.int32)
        self.names: list[str] = sorted(map(str, seen))
        place = {name: k for k, name in enumerate(self.names)}
        self.of_row = np.array([place[str(name)] for name in seen], np.int32)[first_seen]
        small = self.of_row.astype(np.uint16) if len(self.names) <= 1 << 16 else self.of_row  # 16 bits: a radix sort
        self.order = np.argsort(small, kind="stable").astype(np.int64)
        self.sizes = np.bincount(self.of_row, minlength=len(self.names)).astype(np.int64)
        self.starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.sizes)])

    def __len__(self) -> int:
        """R."""
        return len(self.of_row)

    def rows(self, source: int) -> np.ndarray:
        """int64 [rows of the source], in the data set's order; a view."""
        return self.order[self.starts[source] : self.starts[source + 1]]

    def runs(self) -> np.ndarray:
        """int64 [n, 2]: source and length of each run of rows of one source, in the data set's order."""
        changes = np.flatnonzero(np.diff(self.of_row, prepend=-1))
        return np.stack([self.of_row[changes], np.diff(changes, append=len(self))], axis=1)

    @functools.cached_property
    def local(self) -> np.ndarray:
        """int32 [R]: every row's place among the rows of its source; rows(of_row[r])[local[r]] == r."""
        local = np.empty(len(self), np.int32)
        local[self.order] = np.arange(len(self)) - np.repeat(self.starts[:-1], self.sizes)
        return local


def ranks(sorted_ids: np.ndarray) -> np.ndarray:
    """int64 [n]: 0, 1, ... inside every run of equal values; `sorted_ids` is sorted."""
    return np.arange(len(sorted_ids)) - np.searchsorted(sorted_ids, sorted_ids)


def ranks_within(ids: np.ndarray) -> np.ndarray:
    """int64 [n]: how many earlier values are equal; `ids` in any order."""
    order = np.argsort(ids, kind="stable")
    rank = np.empty(len(order), np.int64)
    rank[order] = ranks(ids[order])
    return rank

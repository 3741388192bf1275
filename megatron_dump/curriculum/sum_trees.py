"""Weighted draws from many sets at once, with weights that change one by one."""

from __future__ import annotations

import numpy as np

FAN = 16  # children of a node: three levels for a thousand leaves, five for a million


class SumTrees:
    """K trees, tree k with sizes[k] leaves, each leaf with C non-negative numbers; every node has its children's sums.

    A draw takes time in proportion to the depth, not to the number of leaves, and so does a change. Sums are always
    made anew from the children, never by adding differences: they depend on the leaves alone, to the last bit.
    """

    def __init__(self, sizes: np.ndarray, columns: int):
        """sizes: int64 [K], at least 1; columns: C. All numbers are 0."""
        self._levels: list[np.ndarray] = []  # float64 [C, blocks, FAN] each; leaves first
        self._offsets: list[np.ndarray] = []  # int64 [K]: tree k's first block of the level
        counts = np.asarray(sizes, np.int64)
        while not self._levels or counts.max() > 1:
            counts = -(-counts // FAN)
            self._offsets.append(np.cumsum(counts) - counts)
            self._levels.append(np.zeros((columns, int(counts.sum()), FAN)))
        self.totals = np.zeros((len(counts), columns))  # float64 [K, C]

    def assign(self, tree: np.ndarray, leaf: np.ndarray, values: np.ndarray) -> None:
        """Set leaves: tree int64 [n], leaf int64 [n] (0.. in its tree), values float64 [n, C]; fastest in order."""
        values = values.T
        for level, offset in zip(self._levels, self._offsets, strict=True):
            parent = leaf // FAN
            block = offset[tree] + parent
            level[:, block, leaf - parent * FAN] = values
            first = np.flatnonzero(np.diff(block, prepend=-1))  # of a run of leaves in one block
            tree, leaf = tree[first], parent[first]
            values = np.einsum("cnf->cn", level.take(block[first], axis=1))  # a third of the time of sum
        self.totals[tree] = values.T

    def find(self, tree: np.ndarray, target: np.ndarray, mix: np.ndarray) -> np.ndarray:
        """int64 [n]: in each tree (int64 [n]), the leaf at which the cumulative weight exceeds target (float64 [n]).

        A leaf's weight is its C numbers times mix, float64 [n, C]. Targets are in [0, the tree's weight); the weight
        must be above 0, and a leaf of weight 0 is never found.
        """
        leaf, target, each = np.zeros(len(tree), np.int64), target.copy(), np.arange(len(tree))
        for level, offset in zip(reversed(self._levels), reversed(self._offsets), strict=True):
            weights = np.einsum("cnf,nc->nf", level.take(offset[tree] + leaf, axis=1), mix)
            cumulative = np.cumsum(weights, axis=1)
            target = np.minimum(target, np.nextafter(cumulative[:, -1], 0.0))  # rounding may take it to the very end
            child = np.argmax(cumulative > target[:, None], axis=1)
            target -= np.where(child > 0, cumulative[each, child - 1], 0.0)
            leaf = leaf * FAN + child
        return leaf

"""Sum trees: a leaf is found by its share of the sum, whatever was assigned before."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dump.curriculum.sum_trees import SumTrees


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([1, 2, 31, 32, 33, 100, 1025]), min_size=1, max_size=4), st.data())
def test_a_leaf_is_found_by_its_share_of_the_sum(sizes, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    trees, leaves = SumTrees(np.array(sizes), 2), [np.zeros((n, 2)) for n in sizes]
    for _ in range(3):
        tree = rng.integers(0, len(sizes), 40)
        leaf = (rng.random(40) * np.array(sizes)[tree]).astype(np.int64)
        leaf[:2], tree[:2] = leaf[2:4], tree[2:4]  # the same leaf twice
        places = Counter(zip(tree.tolist(), leaf.tolist(), strict=True))
        values = np.array(
            [[k % 3, (k * 7 + i) % 5] for k, i in zip(tree, leaf, strict=True)], float
        )  # whole: sums exact
        trees.assign(tree, leaf, values)
        for k, i in places:
            leaves[k][i] = (k % 3, (k * 7 + i) % 5)
    mix = np.array([0.25, 2.0])
    for k, own in enumerate(leaves):
        weights = own @ mix
        assert trees.totals[k].tolist() == own.sum(axis=0).tolist()
        if weights.sum() == 0:
            continue
        targets = np.concatenate([[0.0, weights.sum(), np.nextafter(weights.sum(), 0)], rng.random(50) * weights.sum()])
        found = trees.find(np.full(53, k), targets, np.tile(mix, (53, 1)))
        expected = np.searchsorted(np.cumsum(weights), np.minimum(targets, np.nextafter(weights.sum(), 0)), "right")
        assert found.tolist() == expected.tolist() and np.all(weights[found] > 0)


def test_sums_depend_on_the_leaves_alone():
    """To the last bit: changed one by one or made at once, also where the numbers differ by orders of magnitude."""
    rng = np.random.default_rng(0)
    values = np.exp(rng.uniform(-50, 0, (5000, 3)))
    order, tree = np.arange(5000), np.zeros(5000, np.int64)
    at_once, gradually = SumTrees(np.array([5000]), 3), SumTrees(np.array([5000]), 3)
    at_once.assign(tree, order, values)
    gradually.assign(tree, order, rng.random((5000, 3)))
    for part in [*np.split(rng.permutation(5000), 100), np.array([7]), np.arange(5, 4000)]:
        gradually.assign(tree[part], part, values[part])
    assert np.array_equal(at_once.totals, gradually.totals)
    target, mix = rng.random(500) * at_once.totals.sum(), np.ones((500, 3))
    assert np.array_equal(at_once.find(tree[:500], target, mix), gradually.find(tree[:500], target, mix))

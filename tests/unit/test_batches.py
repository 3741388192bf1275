"""Who generates and trains what: partitions that do not depend on the number of ranks."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dump import grpo
from megatron_dump.batches import balanced, share_of_draw, split, update_shares
from megatron_dump.types import Draw
from tests.unit.curricula import outcomes

SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=12)


def draw_of(sizes: list[int]) -> Draw:
    n = len(sizes)
    return Draw(0, np.arange(n), np.zeros(n, np.int64), np.array(sizes), np.ones(1), first_group=5)


@settings(deadline=None)
@given(st.integers(0, 60), st.integers(1, 5), st.integers(1, 7))
def test_split_deals_everything_out_in_order_and_evenly(n, updates, ranks):
    parts = split(n, updates, ranks)
    assert [len(p) for p in parts] == [ranks] * updates
    assert np.concatenate([np.concatenate(p) for p in parts]).tolist() == list(range(n))
    for update in parts:
        sizes = [len(share) for share in update]
        assert max(sizes) - min(sizes) <= 1
    whole = split(n, updates, 1)
    for update, (alone,) in zip(parts, whole, strict=True):
        assert np.array_equal(np.concatenate(update), alone)  # an update's rollouts do not depend on the ranks


@settings(deadline=None)
@given(SIZES, st.integers(1, 4), st.integers(1, 5))
def test_ranks_generate_every_sample_of_ragged_groups_once_and_what_they_train(sizes, updates, ranks):
    draw, everything = draw_of(sizes), []
    positions = {(g, s): i for i, (g, s) in enumerate((g, s) for g, n in enumerate(sizes) for s in range(n))}
    shares = split(sum(sizes), updates, ranks)
    for rank in range(ranks):
        mine = [(p, s) for p, first, n in share_of_draw(draw, updates, ranks, rank) for s in range(first, first + n)]
        everything += mine
        trained = np.concatenate([update[rank] for update in shares])
        assert [positions[key] for key in mine] == trained.tolist()  # so nothing need be exchanged
    assert sorted(everything) == sorted(positions)


@settings(deadline=None)
@given(SIZES, st.integers(1, 3), st.integers(1, 4), st.sampled_from(grpo.LOSS_AGG_MODES), st.data())
def test_every_rollout_that_is_left_trains_once_and_the_loss_is_the_mode_s_mean(sizes, updates, ranks, mode, data):
    groups = np.repeat(np.arange(len(sizes)), sizes)
    n = len(groups)
    lengths = 1 + np.arange(n) % 7
    rejected = np.array([g for g in range(len(sizes)) if data.draw(st.booleans())], np.int64)
    finite = np.arange(n) % 5 != 3
    advantages, rewards = np.where(finite, np.sin(np.arange(n)), np.nan), np.where(finite, 1.0, np.nan)
    kept = finite & ~np.isin(groups, rejected)
    results = outcomes(0, np.zeros(n, int), advantages, rewards, groups, lengths=lengths, kept=kept)
    shares = [update_shares(results, rejected, updates, ranks, r, mode, 8) for r in range(ranks)]
    alone = update_shares(results, rejected, updates, 1, 0, mode, 8)
    trained = []
    for u, whole in enumerate(alone):
        parts = [of_rank[u] for of_rank in shares]
        assert np.array_equal(np.concatenate([p.rows for p in parts]), whole.rows)
        assert {p.global_tokens for p in parts} == {whole.global_tokens}
        assert all(len(p.rows) <= p.n_rows == parts[0].n_rows for p in parts)
        weights = np.concatenate([p.weights for p in parts])
        assert np.array_equal(weights, whole.weights)
        assert np.isfinite(np.concatenate([p.advantages for p in parts])).all()
        assert np.array_equal(weights > 0, results.kept[whole.rows])
        total = (weights * lengths[whole.rows]).sum()
        if mode == "seq-mean-token-sum-norm":  # divides by 8 tokens a rollout, however many there are
            total *= 8 * (weights > 0).sum() / whole.global_tokens
        np.testing.assert_allclose(total, whole.global_tokens)
        trained += whole.rows[whole.weights > 0].tolist()
    assert trained == np.flatnonzero(results.kept).tolist()


@given(st.lists(st.integers(1, 400), max_size=60), st.integers(1, 6))
def test_every_position_goes_to_one_rank_and_sums_are_balanced(costs, ranks):
    costs = np.array(costs, np.int64)
    parts = balanced(costs, ranks)
    assert len(parts) == ranks and all((np.diff(part) > 0).all() for part in parts)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(costs)))
    sums, largest = [int(costs[part].sum()) for part in parts], int(costs.max(initial=0))
    assert max(sums) - min(sums) <= largest
    if len(costs) <= 7:
        assert 3 * ranks * max(sums) <= (4 * ranks - 1) * _best(costs.tolist(), ranks)


def _best(costs: list[int], ranks: int) -> int:
    """The least possible largest sum, by trying everything."""
    sums = {(0,) * ranks}
    for cost in costs:
        sums = {tuple(sorted((*s[:r], s[r] + cost, *s[r + 1 :]))) for s in sums for r in range(ranks)}
    return min(max(s) for s in sums)


@given(SIZES, st.integers(1, 3), st.integers(1, 4), st.sampled_from(grpo.LOSS_AGG_MODES), st.data())
def test_a_balanced_update_has_the_rollouts_and_weights_of_any_other(sizes, updates, ranks, mode, data):
    groups = np.repeat(np.arange(len(sizes)), sizes)
    n = len(groups)
    lengths, prompts = 1 + np.arange(n) ** 2 % 17, 3 + groups % 5
    kept = np.array([data.draw(st.booleans()) for _ in range(n)])
    results = outcomes(0, np.zeros(n, int), np.sin(np.arange(n)), np.ones(n), groups, lengths=lengths, kept=kept)
    rejected = np.array([g for g in range(len(sizes)) if not kept[groups == g].any()], np.int64)
    ordinary = update_shares(results, rejected, updates, 1, 0, mode, 8)
    shares = [update_shares(results, rejected, updates, ranks, r, mode, 8, prompts) for r in range(ranks)]
    for u, whole in enumerate(ordinary):
        parts = [of_rank[u] for of_rank in shares]
        rows = np.concatenate([p.rows for p in parts])
        order = np.argsort(rows)
        counts = whole.weights > 0
        assert np.array_equal(rows[order], whole.rows[counts])
        assert np.array_equal(np.concatenate([p.weights for p in parts])[order], whole.weights[counts])
        assert np.array_equal(np.concatenate([p.advantages for p in parts])[order], whole.advantages[counts])
        assert {p.global_tokens for p in parts} == {whole.global_tokens}
        tokens = [(lengths + prompts)[p.rows].sum() for p in parts]
        assert max(tokens) - min(tokens) <= (lengths + prompts)[rows].max()

"""Prompts computed once: which rows begin alike, their micro-batches, their one sequence, and attention over it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dump.actor.shared_attention import attend
from megatron_dump.actor.shared_prompts import beginnings, share

CPU = torch.device("cpu")
# Of each row: which of four prompts, and how many tokens were sampled (0: it counts nowhere).
ROWS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), min_size=1, max_size=14)
PROMPTS = ([5, 6, 7], [5, 6, 8], [5], [4, 4, 4, 4, 4, 4])  # two as long as each other, one that begins others


def _arrays(rows: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """tokens [N, T] and sampled [N, T]; every completion token is another number."""
    tokens, sampled = np.zeros((len(rows), 16), np.int64), np.zeros((len(rows), 16), bool)
    for i, (prompt, n) in enumerate(rows):
        start = len(PROMPTS[prompt])
        tokens[i, :start] = PROMPTS[prompt]
        tokens[i, start : start + n] = 100 * (i + 1) + np.arange(n)
        sampled[i, start : start + n] = True
    return tokens, sampled


def _needed(rows: list[tuple[int, int]]) -> int:
    """Tokens to compute, counted by hand."""
    some = [(prompt, n) for prompt, n in rows if n]
    return sum(len(PROMPTS[p]) for p in {p for p, _ in some}) + sum(n - 1 for _, n in some)


@given(ROWS, st.sampled_from([1, 4, 8]), st.booleans())
def test_the_sequence_has_every_token_once_at_its_position_and_no_other(rows, unit, holes):
    tokens, sampled = _arrays(rows)
    if holes:  # tokens between sampled ones that were not
        sampled[:, 1:-1] &= ~(sampled[:, :-2] & sampled[:, 2:])
    shared = share(tokens, sampled, unit, CPU)
    length = shared.tokens.size(1)
    assert length % unit == 0 and _needed(rows) < length <= _needed(rows) + unit
    found = sorted(zip(shared.positions.tolist(), shared.tokens[0].tolist(), strict=True))
    expected = {
        (t, PROMPTS[p][t]) if t < len(PROMPTS[p]) else (t, int(tokens[i, t]))
        for i, (p, n) in enumerate(rows)
        if n
        for t in range(len(PROMPTS[p]) + n - 1)
    }
    assert {pair for pair in found if pair != (0, 0)} == expected  # (0, 0): padding
    before = shared.before.tolist()
    assert len(before) == sampled.sum()
    for (i, t), place in zip(np.argwhere(sampled), before, strict=True):
        assert shared.positions[place] == t - 1 and shared.tokens[0, place] == tokens[i, t - 1]


def test_no_rows_are_padding_alone():
    shared = share(np.zeros((0, 8), np.int64), np.zeros((0, 8), bool), 4, CPU)
    assert shared.tokens.tolist() == [[0, 0, 0, 0]] and len(shared.before) == 0
    query = torch.randn(4, 1, 2, 8)
    assert not attend(shared, query, query, query, scale=1.0)[:-1].any()


@given(ROWS, st.integers(16, 60), st.sampled_from([1, 8]))
def test_micro_batches_have_every_row_once_under_the_budget_and_cut_no_group_that_fits(rows, budget, unit):
    tokens, sampled = _arrays(rows)
    alike = beginnings(tokens, sampled)
    parts = alike.under_budget(budget, unit)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(rows)))
    for part in parts:
        assert share(tokens[part], sampled[part], unit, CPU).tokens.size(1) <= budget
    for group in range(alike.group.max() + 1):
        members = np.flatnonzero(alike.group == group)
        if _needed([rows[i] for i in members]) + 1 <= budget // unit * unit:
            assert sum(bool(np.isin(members, part).any()) for part in parts) == 1
    assert sorted(alike.order.tolist()) == list(range(len(rows)))
    ordered = alike.group[np.argsort(alike.order)]
    assert (np.diff(ordered) != 0).sum() == len(set(ordered)) - 1  # groups stand together


def test_a_rollout_over_the_budget_is_refused():
    with pytest.raises(ValueError, match="a rollout of 12 tokens exceeds the budget of 11 of a micro-batch"):
        beginnings(*_arrays([(3, 6), (0, 1)])).under_budget(11, 1)


def test_sharing_pays_only_where_a_fifth_is_saved():
    alike = beginnings(*_arrays([(3, 5), (3, 5), (0, 2), (1, 2)]))  # 10 + 10 + 4 + 4 tokens, 6 of them twice
    assert alike.pays([np.arange(4)])  # 22 of 28
    assert not alike.pays([np.array([0, 2]), np.array([1, 3])])
    assert not alike.pays([np.array([2, 3]), np.array([0]), np.array([1])])


@settings(deadline=None)
@given(ROWS, st.integers(0, 9))
def test_attention_and_its_gradients_are_those_of_rows_by_themselves(rows, seed):
    """Against softmax(q k^T) v written out in float64, every row with its own copy of the prompt."""
    tokens, sampled = _arrays(rows)
    shared = share(tokens, sampled, 4, CPU)
    generator = torch.Generator().manual_seed(seed)
    q, k, v, weight = (
        torch.randn(shared.tokens.size(1), 1, heads, 8, generator=generator, dtype=torch.float64)
        for heads in (4, 2, 2, 4)
    )
    inputs = [t.requires_grad_() for t in (q, k, v)]
    out = attend(shared, *inputs, scale=0.3).view_as(weight)
    expected, real = torch.zeros_like(out), torch.zeros(len(q), dtype=torch.bool)
    for i, (prompt, n) in enumerate(rows):
        if n:
            own = shared.before.tolist()[int(sampled[:i].sum()) : int(sampled[: i + 1].sum())]
            start = own[0] - len(PROMPTS[prompt]) + 1
            at = torch.tensor([*range(start, own[0] + 1), *own[1:]])
            keys, values = (t[at, 0].repeat_interleave(2, 1) for t in (k, v))
            scores = torch.einsum("qhd,khd->hqk", q[at, 0], keys) * 0.3
            scores = scores.masked_fill(torch.ones(len(at), len(at), dtype=torch.bool).triu(1), -torch.inf)
            rows_out = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)
            fresh = ~real[at]
            expected = expected.index_add(0, at[fresh], rows_out[fresh][:, None])
            real[at] = True
    weight[~real] = 0  # nothing reads padding
    torch.testing.assert_close(out[real], expected[real])
    ours, theirs = (
        torch.autograd.grad((o * weight).sum(), inputs, retain_graph=True, allow_unused=True, materialize_grads=True)
        for o in (out, expected + 0 * q)
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
        assert not a[~real].any()

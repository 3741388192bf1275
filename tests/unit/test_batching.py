"""Micro-batches: every row once, under the budget, and with what the loss needs of it."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_dump.actor import batching
from tests.distributed.tiny import random_rollouts

LENGTHS = st.lists(st.integers(1, 60), max_size=24).map(lambda values: np.array(values, np.int64))


def padded(rows: np.ndarray, lengths: np.ndarray, unit: int) -> int:
    """Tokens of a micro-batch, written out."""
    longest = max(lengths[row] for row in rows)
    while longest % unit:
        longest += 1
    return int(longest) * len(rows)


@given(LENGTHS, st.integers(64, 300), st.sampled_from([1, 8, 12]), st.integers(0, 9))
def test_every_row_once_under_the_budget_in_as_many_micro_batches_as_asked(lengths, budget, unit, more):
    parts = batching.under_budget(lengths, budget, unit)
    wanted = batching.split_into(parts, lengths, len(parts) + more)
    assert len(wanted) == len(parts) + more
    for cut in (parts, wanted):
        assert sorted(np.concatenate([*cut, np.empty(0, np.int64)]).tolist()) == list(range(len(lengths)))
        assert all(padded(rows, lengths, unit) <= budget for rows in cut if len(rows))
    if len(wanted) <= len(lengths):
        assert all(len(rows) for rows in wanted)  # none stays empty while another could be halved


@given(LENGTHS, st.integers(64, 300))
def test_no_cut_of_the_sorted_rows_has_fewer_micro_batches(lengths, budget):
    ordered = sorted(lengths.tolist(), reverse=True)

    @functools.cache
    def fewest(start: int) -> int:
        if start == len(ordered):
            return 0
        return 1 + min(
            fewest(end)
            for end in range(start + 1, len(ordered) + 1)
            if padded(np.arange(start, end), np.array(ordered), 8) <= budget
        )

    assert len(batching.under_budget(lengths, budget, 8)) == fewest(0)


def test_a_row_over_the_budget_is_refused():
    with pytest.raises(ValueError, match="a rollout of 72 tokens, padded, exceeds the budget of 71"):
        batching.under_budget(np.array([3, 65]), 71)


def _batch(pad_to: int = 8):
    prompts, completions, advantages = random_rollouts(6)
    weights = np.array([1.0, 0.0, 1.0, 2.0, 1.0, 1.0])
    batch = batching.pad_rollouts(prompts, completions, advantages, 50.0, weights, 8, pad_to)
    batch.ref_logprobs = np.ones_like(batch.rollout_logprobs)
    return prompts, completions, batch


@pytest.mark.parametrize("pad_to", [4, 8, 12])
def test_a_micro_batch_has_its_rows_and_the_places_of_their_sampled_tokens(pad_to):
    prompts, completions, batch = _batch(pad_to)
    assert batch.tokens.shape[1] % pad_to == 0
    rows = np.array([2, 1, 0, 7])  # row 1 has weight 0, row 7 fills up
    micro = batching.cut(batch, rows, torch.device("cpu"), pad_to)
    longest = max(len(prompts[i]) + len(completions[i].token_ids) for i in (0, 2))
    assert micro.tokens.shape == (4, -(-longest // pad_to) * pad_to)
    tokens, places = [], []
    for b, i in ((0, 2), (2, 0)):
        tokens += completions[i].token_ids.tolist()
        places += [b * micro.tokens.shape[1] + len(prompts[i]) + t for t in range(len(completions[i].token_ids))]
    assert micro.sampled.tolist() == places
    assert micro.tokens.flatten()[micro.sampled].tolist() == tokens
    assert micro.mask.flatten().nonzero()[:, 0].tolist() == places
    assert micro.old_logprobs is None and micro.ref_logprobs.shape == micro.tokens.shape
    assert micro.weights.tolist() == [1.0, 0.0, 1.0, 0.0]


def test_a_micro_batch_of_no_rows_is_one_row_without_a_sampled_token():
    micro = batching.cut(_batch()[2], np.empty(0, np.int64), torch.device("cpu"))
    assert micro.tokens.shape == micro.mask.shape == micro.ref_logprobs.shape == (1, 8)
    assert micro.advantages.shape == micro.weights.shape == (1,)
    assert not micro.mask.any() and len(micro.sampled) == 0


def test_equal_rows_are_sorted_and_whole():
    parts = batching.equal_rows(np.array([5, 1, 4, 2]), 2)
    assert [part.tolist() for part in parts] == [[1, 3], [2, 0]]
    with pytest.raises(ValueError, match="micro-batch size 3 does not divide the 4 rollouts"):
        batching.equal_rows(np.array([5, 1, 4, 2]), 3)

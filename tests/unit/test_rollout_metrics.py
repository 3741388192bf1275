"""Loops at the end of completions, against a definition spelled out; shares and speed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_dump.rollout_metrics import count_loops, loops, rollout_metrics
from megatron_dump.types import Completion


def _spelled_out(tokens: list[int], longest: int, least: int) -> bool:
    """Some n-gram, repeated to the end: three times and more, the whole of it at least `least` tokens long."""
    for n in range(1, longest + 1):
        gram, length = tokens[-n:], 0
        if len(tokens) < n:
            break
        while length < len(tokens) and tokens[-1 - length] == gram[-1 - length % n]:
            length += 1
        if length >= max(3 * n, least):
            return True
    return False


@given(
    head=st.lists(st.integers(0, 2), max_size=20),
    gram=st.lists(st.integers(0, 2), min_size=1, max_size=7),
    times=st.integers(0, 6),
    tail=st.integers(0, 6),
    least=st.integers(1, 14),
)
def test_a_loop_is_what_the_definition_says(head, gram, times, tail, least):
    tokens = head + gram * times + gram[:tail]
    assert loops(np.array(tokens, np.int64), 5, least) == _spelled_out(tokens, 5, least)


@pytest.mark.parametrize(
    ("tokens", "looped"),
    [
        ([], False),
        ([5] * 12, True),
        ([5] * 11, False),
        ([1, 2, 3, 4] * 3, True),
        ([9, 9, 1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3], False),  # fewer than three times
        ([*range(30)], False),
        ([*range(30), *range(64), *range(64), *range(64)], True),
        ([*range(65)] * 3, False),  # a longer n-gram
        ([7] * 40 + [8], False),  # it got out
    ],
)
def test_examples(tokens, looped):
    assert loops(np.array(tokens, np.int64)) == looped


def _completion(tokens: list[int], finished: bool) -> Completion:
    return Completion(0, 0, np.array(tokens), np.zeros(len(tokens), np.float32), finished, 0)


def test_counts_and_shares():
    found = [_completion([5] * 12 + [0], True), _completion([5] * 12, False), _completion([1, 2, 0], True)]
    counts = count_loops(found)
    assert counts.tolist() == [2, 3]
    assert rollout_metrics(counts + count_loops(found[2:]), 600, 3.0, 4) == {
        "rollout/repetition": 0.5,
        "perf/gen_tokens_per_s": 200.0,
        "perf/gen_tokens_per_s_per_rank": 50.0,
    }
    assert rollout_metrics(count_loops([]), 0, 0.0, 1) == {}


def test_the_stop_token_is_no_part_of_a_loop():
    assert count_loops([_completion([5] * 12, True)])[0] == 0
    assert count_loops([_completion([5] * 13, True)])[0] == 1

"""Which checkpoints are kept: small histories by hand, and what holds for any."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_dump.actor import retention
from megatron_dump.config import CheckpointCallbackParams

VALUES = st.dictionaries(st.integers(0, 50), st.none() | st.floats(allow_infinity=False), max_size=12)


@pytest.mark.parametrize(
    ("values", "options", "deleted"),
    [
        ({1: 0.1, 2: 0.3, 3: 0.2}, {}, []),
        ({1: 0.1, 2: 0.3, 3: 0.2}, {"save_top_k": 1, "monitor": "x"}, [1]),
        ({1: 0.1, 2: 0.3, 3: 0.2}, {"save_top_k": 1, "monitor": "x", "save_last": False}, [1, 3]),
        ({1: 0.1, 2: 0.3, 3: 0.2}, {"save_top_k": 1, "monitor": "x", "mode": "min"}, [2]),
        ({1: 0.3, 2: 0.3, 3: 0.1}, {"save_top_k": 1, "monitor": "x"}, [1]),
        ({1: None, 2: math.nan, 3: 0.1, 4: None}, {"save_top_k": 1, "monitor": "x"}, [1, 2]),
        ({1: None, 2: None, 3: None}, {"save_top_k": 2}, [1]),
        ({}, {"save_top_k": 2}, []),
    ],
)
def test_by_hand(values, options, deleted):
    assert retention.surplus(values, CheckpointCallbackParams(**options)) == deleted


@given(VALUES, st.integers(1, 5), st.sampled_from(["max", "min"]), st.booleans())
def test_the_best_stay_and_one_at_least(values, k, mode, last):
    keep = CheckpointCallbackParams(save_top_k=k, monitor="x", mode=mode, save_last=last)
    deleted = retention.surplus(values, keep)
    kept = values.keys() - set(deleted)
    assert kept if values else not deleted
    assert len(kept) <= k + last
    if last and values:
        assert max(values) in kept
    better = max if mode == "max" else min
    measured = {s: v for s, v in values.items() if v is not None and math.isfinite(v)}
    if measured:
        best = better(measured.values())
        assert any(measured.get(s) == best for s in kept)

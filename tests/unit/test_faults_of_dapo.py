"""What DAPO's dynamic sampling gets wrong; here it must not happen."""

from __future__ import annotations

import numpy as np
import pytest

from tests.unit.guessing import observed, read, trainer


@pytest.mark.parametrize("chances", [{"a": 0.0, "b": 0.0}, {"a": 0.0, "b": 0.5}])
def test_dynamic_sampling_aborts_at_the_cap(tmp_path, chances):
    """Fault: if too few groups vary after the last refill, the run is aborted instead of training on what it has."""
    blocks = {"filter": {"name": "zero_variance", "max_refills": 2}}
    run_of = trainer(tmp_path, 3, chances=chances, size=60, name="uniform", blocks=blocks)
    run_of.fit()
    assert run_of.step == 3
    short = [e for e in read(tmp_path, "events.jsonl") if e["kind"] == "short_batch"]
    assert [e["step"] for e in short] == [1, 2, 3]  # and it says so
    for step, event, told in zip(read(tmp_path), short, observed(tmp_path), strict=True):
        _, first, index = np.unique(told.group_ids, return_index=True, return_inverse=True)
        right = np.bincount(index, told.rewards)
        varies = (right > 0) & (right < 4)
        assert step["train/n_kept"] == 4 * varies.sum() < 32
        assert event["message"].startswith(f"trains on {4 * varies.sum()} of 32 rollouts after 2 refills")
        sources = told.source_ids[first]
        assert not varies[sources == 0].any()
        assert np.sum(sources == 0) == 3 * np.sum(sources[:8] == 0)  # refilled from its own source each time
        assert step["curriculum/a/n_rollouts"] == 4 * np.sum(sources == 0)  # what was rejected is observed
    assert run_of.actor.version == (3 if chances["b"] else 0)  # a step with nothing to learn from makes no update

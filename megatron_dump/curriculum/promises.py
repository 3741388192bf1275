"""What policies return, checked before anything is drawn from it: a wrong answer would train on unseen."""

from __future__ import annotations

from typing import Any

import numpy as np

from megatron_dump.curriculum.registry import ROOT


def check_weights(policy: Any, weights: Any, n_sources: int) -> None:
    fine = _is(weights, np.float64, n_sources) and bool(np.all(weights >= 0)) and abs(float(weights.sum()) - 1) < 1e-9
    _require(fine, "sources", policy, "weights", weights, f"float64 [{n_sources}], finite, at least 0, of sum 1")


def check_slots(policy: Any, slots: Any, n: int, n_sources: int) -> None:
    fine = _is(slots, np.int64, n) and bool(np.all((slots >= 0) & (slots < n_sources)))
    _require(fine, "sources", policy, "slots", slots, f"int64 [{n}], sources in 0 .. {n_sources - 1}")


def check_rows(policy: Any, rows: Any, slots: np.ndarray, of_row: np.ndarray) -> None:
    """of_row: int [R], the source of every row of the data set."""
    fine = _is(rows, np.int64, len(slots)) and bool(np.all((rows >= 0) & (rows < len(of_row))))
    fine = fine and np.array_equal(of_row[rows], slots)
    _require(fine, "prompts", policy, "draw", rows, f"int64 [{len(slots)}], rows of the sources asked for")


def check_rollouts(budget: Any, rollouts: Any, n: int, total: int) -> None:
    fine = _is(rollouts, np.int64, n) and bool(np.all(rollouts >= 1)) and int(rollouts.sum()) == total
    _require(fine, "budget", budget, "allot", rollouts, f"int64 [{n}], at least 1, of sum {total}")


def _is(values: Any, dtype: type, n: int) -> bool:
    return isinstance(values, np.ndarray) and values.dtype == dtype and values.shape == (n,)


def _require(fine: bool, section: str, policy: Any, method: str, returned: Any, promised: str) -> None:
    if not fine:
        kind = (
            f"{returned.dtype} {list(returned.shape)}" if isinstance(returned, np.ndarray) else type(returned).__name__
        )
        text = np.array2string(np.asarray(returned), threshold=8, edgeitems=4).replace("\n", "")
        raise ValueError(
            f"{ROOT}.{section}.name: {type(policy).__qualname__}.{method} returned {kind}: {text}; "
            f"it must return {promised}"
        )

"""What a step's draws and outcomes looked like, per source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from megatron_dump.curriculum.filters import constant_groups
from megatron_dump.curriculum.ledger import Ledger
from megatron_dump.types import Outcomes


def step_arrays(ledger: Ledger, n_sources: int) -> dict[str, np.ndarray]:
    """Name -> float64 [K], NaN where a source has no value; see Curriculum.metrics for what the names mean."""
    first = ledger.training[0]
    drawn = np.concatenate([draw.source_ids for draw in ledger.training])
    allotted = np.concatenate([draw.rollouts for draw in ledger.training])
    arrays = {
        "weight": first.weights,
        "n_prompts": _count(drawn, n_sources),
        "quota": np.bincount(drawn, allotted, n_sources),
        "n_refilled": _count(drawn[len(first.source_ids) :], n_sources),
        "n_pre_rollouts": _pre_rollouts(ledger, n_sources),
    }
    parts = [_of_outcomes(outcomes, n_sources) for outcomes in ledger.outcomes]
    totals = {name: np.sum([part[name] for part in parts], axis=0) for name in parts[0]} if parts else {}
    if totals:
        n_groups, n_rollouts = totals.pop("n_groups"), totals["n_rollouts"]
        arrays["frac_zero_std"] = _ratio(totals.pop("constant"), n_groups)
        arrays["format_failure"] = _ratio(totals.pop("unreadable"), n_rollouts)
        arrays["mean_abs_adv"] = _ratio(totals.pop("abs_adv"), n_rollouts - totals["n_dropped"])
    return {**arrays, **totals}


def _of_outcomes(outcomes: Outcomes, n_sources: int) -> dict[str, np.ndarray]:
    ids, constant = constant_groups(outcomes)
    source_of_group = outcomes.source_ids[np.searchsorted(outcomes.group_ids, ids)]  # outcomes are sorted by group
    source_ids, finite = outcomes.source_ids, np.isfinite(outcomes.advantages)
    return {
        "abs_adv": np.bincount(source_ids[finite], np.abs(outcomes.advantages[finite]), n_sources),
        "n_rollouts": _count(source_ids, n_sources),
        "n_kept": _count(source_ids[outcomes.kept], n_sources),
        "n_dropped": _count(source_ids[~np.isfinite(outcomes.rewards)], n_sources),
        "unreadable": _count(source_ids[~outcomes.well_formed], n_sources),
        "n_groups": _count(source_of_group, n_sources),
        "constant": _count(source_of_group[constant], n_sources),
    }


def _pre_rollouts(ledger: Ledger, n_sources: int) -> np.ndarray:
    count = np.zeros(n_sources)
    for draw in ledger.draws:
        if not draw.train:
            count += np.bincount(draw.source_ids, draw.rollouts, n_sources)
    return count


def _count(source_ids: np.ndarray, n_sources: int) -> np.ndarray:
    return np.bincount(source_ids, minlength=n_sources).astype(np.float64)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.full(len(whole), np.nan), where=whole > 0)


def flatten(arrays: Mapping[str, np.ndarray], sources: Sequence[str]) -> dict[str, float]:
    """`curriculum/<source>/<name>`, without the values that are not there (NaN)."""
    return {
        f"curriculum/{source}/{name}": float(value)
        for name, array in arrays.items()
        for source, value in zip(sources, array, strict=True)
        if not np.isnan(value)
    }

"""Draws and outcomes as JSON: every number survives exactly, NaN and infinities too, for which JSON has no form.

A column [N] is a list, or its one value where all are the same; floats are written so that they read back bit for bit,
NaN as null, infinities as "inf" and "-inf"; a bool column is a string such as "0110".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megatron_dump.types import OUTCOME_COLUMNS, Draw, Outcomes

_ZERO = np.uint8(ord("0"))


def draw_to_json(draw: Draw) -> dict[str, Any]:
    """`step` counts from 0, as in the Draw."""
    return {
        "step": int(draw.step),
        "first_group": int(draw.first_group),
        "train": bool(draw.train),
        "prompt_ids": np.asarray(draw.prompt_ids, np.int64).tolist(),
        "source_ids": np.asarray(draw.source_ids, np.int64).tolist(),
        "rollouts": _pack(draw.rollouts, np.int64),
        "weights": floats_to_json(draw.weights),
    }


def draw_from_json(row: Mapping[str, Any]) -> Draw:
    """The Draw that `draw_to_json` was given. ValueError for columns of different lengths."""
    n = len(row["prompt_ids"])
    prompt_ids, source_ids, rollouts = (
        _unpack(row, name, np.int64, n) for name in ("prompt_ids", "source_ids", "rollouts")
    )
    weights = floats_from_json(row["weights"])
    return Draw(row["step"], prompt_ids, source_ids, rollouts, weights, row["first_group"], row["train"])


def outcomes_to_json(outcomes: Outcomes) -> dict[str, Any]:
    """`step` counts from 0, as in the Outcomes; `ages` only where some rollout is older than 0."""
    columns = {name: _pack(getattr(outcomes, name), kind) for name, kind in OUTCOME_COLUMNS.items()}
    columns["group_ids"] = np.asarray(outcomes.group_ids, np.int64).tolist()  # its length is the number of rollouts
    if not np.any(outcomes.ages):
        del columns["ages"]
    return {"step": int(outcomes.step), **columns}


def outcomes_from_json(row: Mapping[str, Any]) -> Outcomes:
    """The Outcomes that `outcomes_to_json` was given. ValueError for columns of different lengths."""
    n, row = len(row["group_ids"]), {"ages": 0, **row}
    return Outcomes(row["step"], **{name: _unpack(row, name, kind, n) for name, kind in OUTCOME_COLUMNS.items()})


def floats_to_json(values: np.ndarray | Sequence[float]) -> list[float | str | None]:
    """float64 [N] -> N numbers; null for NaN, "inf" and "-inf"."""
    array = np.asarray(values, np.float64)
    if np.all(np.isfinite(array)):
        return array.tolist()
    return [v if math.isfinite(v) else None if math.isnan(v) else str(v) for v in array.tolist()]


def floats_from_json(values: Sequence[float | str | None]) -> np.ndarray:
    """The float64 [N] that `floats_to_json` was given."""
    return np.array([math.nan if v is None else float(v) for v in values], np.float64)


def _pack(column: np.ndarray, kind: type[np.generic]) -> Any:
    array = np.asarray(column, kind)
    bits = array.view(np.int64) if kind is np.float64 else array  # bits: 0.0 equals -0.0, and NaN not itself
    constant = array.size > 0 and bool(np.all(bits == bits[0]))
    if kind is np.bool_:
        return bool(array[0]) if constant else (array + _ZERO).tobytes().decode()
    values = floats_to_json(array[:1] if constant else array) if kind is np.float64 else array.tolist()
    return values[0] if constant else values


def _unpack(row: Mapping[str, Any], name: str, kind: type[np.generic], n: int) -> np.ndarray:
    packed = row[name]
    if kind is np.bool_:
        values = np.frombuffer(packed.encode(), np.uint8) > _ZERO if isinstance(packed, str) else np.full(n, packed)
    else:
        values = packed if isinstance(packed, list) else [packed] * n
        values = floats_from_json(values) if kind is np.float64 else np.array(values, np.int64)
    if len(values) != n:
        raise ValueError(f"{name} has {len(values)} values for {n} rows")
    return values

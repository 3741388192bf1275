"""Which checkpoints a run keeps: Lightning's and NeMo's `save_top_k`, `monitor`, `mode`, `save_last`."""

from __future__ import annotations

import math
from collections.abc import Mapping

from megatron_dump.config import CheckpointCallbackParams


def surplus(values: Mapping[int, float | None], keep: CheckpointCallbackParams) -> list[int]:
    """The steps to delete, ascending; `values`: step of every complete checkpoint -> its monitored metric.

    The best `save_top_k` are kept (without `monitor`: the newest), the newest too with `save_last`; -1 keeps all.
    Among equals the newer is better; a checkpoint without a value is worse than any with one. One is always left.
    """
    if keep.save_top_k < 0:
        return []
    kept = set(_ranked(values, keep)[: keep.save_top_k])
    if keep.save_last or not kept:
        kept |= {max(values)} if values else set()
    return sorted(values.keys() - kept)


def best(values: Mapping[int, float | None], keep: CheckpointCallbackParams) -> int | None:
    """The step of the best checkpoint; None without `monitor`, and where none of them has been measured."""
    measured = {step: value for step, value in values.items() if value is not None and math.isfinite(value)}
    return _ranked(measured, keep)[0] if keep.monitor and measured else None


def _ranked(values: Mapping[int, float | None], keep: CheckpointCallbackParams) -> list[int]:
    """Steps, the best first."""
    sign = -1.0 if keep.mode == "min" else 1.0

    def rank(step: int) -> tuple[float, int]:
        value = values[step] if keep.monitor else 0.0
        return (-math.inf if value is None or not math.isfinite(value) else sign * value, step)

    return sorted(values, key=rank, reverse=True)

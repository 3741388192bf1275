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
    sign = -1.0 if keep.mode == "min" else 1.0

    def rank(step: int) -> tuple[float, int]:
        value = values[step] if keep.monitor else 0.0
        return (-math.inf if value is None or not math.isfinite(value) else sign * value, step)

    kept = set(sorted(values, key=rank, reverse=True)[: keep.save_top_k])
    if keep.save_last or not kept:
        kept |= {max(values)} if values else set()
    return sorted(values.keys() - kept)

"""What may be set of an engine pool."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class PoolOptions:
    """`inference_backend.pool`."""

    max_restarts: int = 3  # of each engine over the whole run
    call_timeout_s: float = 600.0  # for one chunk of requests or one load of weights; longer means hung
    start_timeout_s: float = 600.0  # for an engine to come up again and get its weights
    health_interval_s: float = 1.0  # between looks at engines that have nothing to do
    min_chunk_tokens: int = 2048  # prompt and expected completion tokens that are worth a message of their own

    def __post_init__(self) -> None:
        for key, value in vars(self).items():
            least = 0 if key in ("max_restarts", "min_chunk_tokens") else 1e-3
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value < float("inf"):
                raise ValueError(f"{key}: {value!r} must be a number of at least {least:g}")

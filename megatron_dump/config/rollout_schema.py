"""The schema of `trainer.grpo.inference_backend`: what generates, and the engines outside the training processes."""

from __future__ import annotations

import dataclasses
from typing import Any

from megatron_dump.engine_options import PoolOptions, RayOptions, WeightSyncOptions


@dataclasses.dataclass
class InferenceBackendConfig:
    type: str = "megatron"
    reshard: Any = "auto"  # true, false, auto or pipeline
    path: str | None = None
    record: str | None = None
    vllm: dict[str, Any] = dataclasses.field(default_factory=dict)
    engines: int = 1
    pool: PoolOptions = dataclasses.field(default_factory=PoolOptions)
    ray: RayOptions = dataclasses.field(default_factory=RayOptions)
    weight_sync: WeightSyncOptions = dataclasses.field(default_factory=WeightSyncOptions)

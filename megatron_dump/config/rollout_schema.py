"""The schema of `trainer.grpo.inference_backend`: what generates, and the engines outside the training processes."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass
class WeightSyncConfig:
    transport: str = "auto"
    bucket_mb: float = 256.0
    checksum: bool = False
    dtype: str | None = None
    backend: str = "auto"
    timeout_s: float = 300.0


@dataclasses.dataclass
class PoolConfig:
    max_restarts: int = 3
    call_timeout_s: float = 600.0
    start_timeout_s: float = 600.0
    health_interval_s: float = 1.0
    min_chunk_tokens: int = 2048


@dataclasses.dataclass
class RayConfig:
    enabled: bool = False
    address: str | None = None
    num_cpus: int | None = None
    object_store_memory_mb: int = 200
    temp_dir: str | None = None
    cpus_per_engine: float = 1.0
    gpus_per_engine: float | None = None
    strategy: str = "SPREAD"
    start_timeout_s: float = 300.0


@dataclasses.dataclass
class InferenceBackendConfig:
    type: str = "megatron"
    reshard: Any = "auto"  # true, false, auto or pipeline
    path: str | None = None
    record: str | None = None
    vllm: dict[str, Any] = dataclasses.field(default_factory=dict)
    engines: int = 1
    pool: PoolConfig = dataclasses.field(default_factory=PoolConfig)
    ray: RayConfig = dataclasses.field(default_factory=RayConfig)
    weight_sync: WeightSyncConfig = dataclasses.field(default_factory=WeightSyncConfig)

"""Options of engines outside the training processes: blocks of `trainer.grpo.inference_backend`.

The configuration's schema and the code that reads the options share these classes. The module imports nothing but the
standard library: vLLM's environment need not have more. The classes are not frozen: OmegaConf cannot fill frozen ones.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

STRATEGIES = ("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD")
TRANSPORTS = ("auto", "shared_memory", "broadcast")


@dataclasses.dataclass
class PoolOptions:
    """`pool`: several engines behind one."""

    max_restarts: int = 3  # of each engine over the whole run
    call_timeout_s: float = 600.0  # for one chunk of requests or one load of weights; longer means hung
    start_timeout_s: float = 600.0  # for an engine to come up again and get its weights
    health_interval_s: float = 1.0  # between looks at engines that have nothing to do
    min_chunk_tokens: int = 2048  # prompt and expected completion tokens that are worth a message of their own

    def __post_init__(self) -> None:
        for key, value in vars(self).items():
            least = 0 if key in ("max_restarts", "min_chunk_tokens") else 1e-3
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not is_number or not least <= value < math.inf:
                raise _error("pool", key, value, f"must be a number of at least {least:g}")


@dataclasses.dataclass
class RayOptions:
    """`ray`: the run's connection to Ray, and what engines reserve there."""

    enabled: bool = False  # engines run on Ray, shared by all replicas
    address: str | None = None  # of a running cluster, or auto; None: RAY_ADDRESS, or else one of this run's own
    num_cpus: int | None = None  # of a cluster of this run's own; None: the machine's
    object_store_memory_mb: int = 200  # of such a cluster
    temp_dir: str | None = None  # of such a cluster: its sessions' sockets and logs; None: Ray's, /tmp/ray
    cpus_per_engine: float = 1.0
    gpus_per_engine: float | None = None  # None: vLLM's tensor_parallel_size where there are GPUs, else 0
    strategy: str = "SPREAD"  # of engines over nodes; each engine is on one node
    start_timeout_s: float = 300.0  # for a reservation, and for an engine to come up

    def __post_init__(self) -> None:
        _check(self, "ray", {"strategy": STRATEGIES}, ("cpus_per_engine", "start_timeout_s", "object_store_memory_mb"))


@dataclasses.dataclass
class WeightSyncOptions:
    """`weight_sync`: how weights travel."""

    transport: str = "auto"  # auto: shared_memory when all engines of a rank run on its machine, else broadcast
    bucket_mb: float = 256.0  # at most; a larger tensor gets a bucket of its own size
    checksum: bool = False  # compare every tensor's SHA-256 on both ends; for debugging, it outlasts the transfer
    dtype: str | None = None  # torch's name of what the engine wants, as "bfloat16"; None: the weights' own
    backend: str = "auto"  # of broadcast's process group: gloo or nccl; auto: nccl where the weights are on CUDA
    timeout_s: float = 300.0  # without any progress; at most half of the trainer's collective_timeout_s

    def __post_init__(self) -> None:
        known = {"transport": TRANSPORTS, "backend": ("auto", "gloo", "nccl")}
        _check(self, "weight_sync", known, ("bucket_mb", "timeout_s"))


def _check(options: object, block: str, known: dict[str, tuple[str, ...]], above_0: Sequence[str]) -> None:
    for key, values in known.items():
        if getattr(options, key) not in values:
            raise _error(block, key, getattr(options, key), f"one of {', '.join(values)}")
    for key in above_0:
        if getattr(options, key) <= 0:
            raise _error(block, key, getattr(options, key), "must be above 0")


def _error(block: str, key: str, value: object, remedy: str) -> ValueError:
    return ValueError(f"trainer.grpo.inference_backend.{block}.{key}={value}: {remedy}")

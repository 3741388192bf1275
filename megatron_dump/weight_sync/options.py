"""How weights travel: `trainer.grpo.inference_backend.weight_sync`."""

from __future__ import annotations

import dataclasses

from megatron_dump.weight_sync.contents import dtype_of

TRANSPORTS = ("auto", "shared_memory", "broadcast")


@dataclasses.dataclass(frozen=True)
class WeightSyncOptions:
    transport: str = "auto"  # auto: shared_memory when all engines of a rank run on its machine, else broadcast
    bucket_mb: float = 256  # at most; a larger tensor gets a bucket of its own size
    checksum: bool = (
        False  # compare every tensor's SHA-256 on both ends: for debugging, it costs more than the transfer
    )
    dtype: str | None = None  # torch's name of what the engine wants, as "bfloat16"; None: the weights' own
    backend: str = "auto"  # of broadcast's process group: gloo or nccl; auto: nccl where the weights are on CUDA
    timeout_s: float = 300.0  # without any progress; at most half of the trainer's collective_timeout_s

    def __post_init__(self) -> None:
        for key, known in (("transport", TRANSPORTS), ("backend", ("auto", "gloo", "nccl"))):
            if getattr(self, key) not in known:
                raise ValueError(f"weight_sync.{key}={getattr(self, key)}: one of {', '.join(known)}")
        for key in ("bucket_mb", "timeout_s"):
            if getattr(self, key) <= 0:
                raise ValueError(f"weight_sync.{key}={getattr(self, key)}: must be positive")
        if self.dtype is not None:
            dtype_of(self.dtype)

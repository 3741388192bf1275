"""What the trainer asks of a policy that is trained, and of a place for checkpoints."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from megatron_dump.types import Completion, TrainBatch


class Actor(Protocol):
    """The policy that is trained."""

    version: int

    def make_batch(self, prompts: Sequence[np.ndarray], completions: Sequence[Completion], advantages: np.ndarray,
                   global_tokens: float, weights: np.ndarray | None = None,
                   n_rows: int | None = None) -> TrainBatch: ...  # fmt: skip

    def compute_logprobs(self, batch: TrainBatch, reference: bool = False) -> np.ndarray | None: ...

    def train_step(self, batch: TrainBatch) -> dict[str, float]: ...

    def generating(self) -> contextlib.AbstractContextManager[None]: ...

    def memory_usage(self) -> dict[str, float]: ...

    def memory_report(self) -> str: ...


class Engines(Protocol):
    """Generators outside the training processes; its methods are collectives of all ranks."""

    def push(self, version: int) -> None: ...

    def rest(self) -> None: ...

    def close(self) -> None: ...


class Store(Protocol):
    """Where checkpoints are kept."""

    def latest(self) -> int | None: ...

    def save(self, step: int, state: dict[str, Any]) -> Any: ...

    def poll(self) -> bool: ...

    def wait(self) -> None: ...

    def state(self, step: int) -> dict[str, Any]: ...

    def load(self, step: int) -> dict[str, Any]: ...

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

    def make_batch(
        self,
        prompts: Sequence[np.ndarray],
        completions: Sequence[Completion],
        advantages: np.ndarray,
        global_tokens: float,
        weights: np.ndarray | None = None,
        n_rows: int | None = None,
    ) -> TrainBatch: ...

    def compute_logprobs(self, batch: TrainBatch, reference: bool = False) -> np.ndarray | None: ...

    def train_step(self, batch: TrainBatch) -> dict[str, float]: ...

    def generating(self) -> contextlib.AbstractContextManager[None]: ...

    def memory_usage(self) -> dict[str, float]: ...

    def memory_report(self) -> str: ...


class Engines(Protocol):
    """Generators outside the training processes. push and rest are collectives of all ranks."""

    def push(self, version: int) -> None:
        """Completions that begin from now on are the policy's of now, its `version`."""
        ...

    def rest(self) -> None:
        """Nothing is to be generated until the next push: memory that generation holds may go to training."""
        ...

    def close(self) -> None:
        """End them. No collective: a failing rank calls it too."""
        ...


class Closing(Protocol):
    """What ends with the run."""

    def close(self) -> None: ...


class Store(Protocol):
    """Where checkpoints are kept."""

    longest_save_s: float  # from the call to the rename, of those complete so far; 0: none

    def latest(self) -> int | None: ...

    def save(self, step: int, state: dict[str, Any]) -> Any: ...

    def poll(self) -> bool: ...

    def wait(self) -> None: ...

    def state(self, step: int) -> dict[str, Any]: ...

    def load(self, step: int) -> dict[str, Any]: ...

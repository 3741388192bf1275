"""Generation outside the training processes: what an engine is, and how a rank drives one.

An Engine (vLLM's, in vllm_engine.py) runs in a process or Ray actor of its own, which imports no Megatron. A trainer's
rank drives it through an EngineHandle; pool.py spreads requests over several.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:  # an engine's process may start without it
    from torch import Tensor


@dataclasses.dataclass(frozen=True)
class EngineRequest:
    """One prompt and the random seeds of the completions it gets, one each."""

    prompt: np.ndarray  # int64 [T]
    seeds: tuple[int, ...]  # in 0 .. 2**63 - 1: what is sampled depends on seed, prompt and weights alone


@dataclasses.dataclass(frozen=True)
class EngineOutput:
    """One completion."""

    token_ids: np.ndarray  # int64 [T], the stop token included
    logprobs: np.ndarray  # float32 [T], under softmax(logits / temperature), before top-k and top-p cut it
    finished: bool  # ended by a stop token
    policy_version: int  # of the weights it began with


class Engine(Protocol):
    """What runs in the other process. A failed call leaves it unusable: it is restarted. (EngineRefused does not.)"""

    def generate(self, requests: Sequence[EngineRequest]) -> list[list[EngineOutput]]:
        """For each request one output per seed, in order."""
        ...

    def load_weights(self, version: int, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Replace all weights, under their Hugging Face names; `weights` is consumed once, lazily, to its end."""
        ...

    def sleep(self) -> None:
        """Free the device memory of weights and cache until `wake`; weights are pushed again after it."""
        ...

    def wake(self) -> None: ...

    def close(self) -> None:
        """Give back what outlives the process; the last call."""
        ...


class EngineHandle(Protocol):
    """An engine seen from the rank that drives it. Calls are answered in the order they are made.

    A dead or hung engine makes the futures raise EngineDied; `restart` brings a fresh one up, without weights.
    """

    def generate(self, requests: Sequence[EngineRequest]) -> Future[list[list[EngineOutput]]]: ...

    def load_weights(self, version: int, link: dict[str, Any]) -> Future[None]:
        """The engine opens `link` (JSON-able; weight_sync.receive understands it) and loads what comes through."""
        ...

    def sleep(self) -> Future[None]: ...

    def wake(self) -> Future[None]: ...

    def alive(self) -> bool: ...

    def restart(self) -> None: ...

    def close(self) -> None: ...


class EngineDied(RuntimeError):
    """The engine ended, hung or lost its connection; the message says what its last words were."""


class EngineRefused(ValueError):
    """Options or requests that no engine could serve; it would fail again. The message says which and why."""

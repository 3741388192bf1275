"""What a source's rollouts cost: generated tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from megatron_dump.curriculum.estimators import LearnabilityEstimator

LARGEST_RATIO = 4.0  # of costs: beyond it one source with short answers would take nearly every draw
_NAMES = {"window_values": "length_values", "window_times": "length_times", "window_ranks": "length_ranks"}


class RolloutCosts:
    """Mean length of each source's rollouts over its last `window` prompts, in tokens."""

    def __init__(self, n_sources: int, window: int):
        self._lengths = LearnabilityEstimator(n_sources, window)  # any value may be in its windows

    def observe(self, sources: np.ndarray, lengths: np.ndarray, ages: np.ndarray, now: int, places: np.ndarray) -> None:
        """A group each, [groups]: source, mean length, and as LearnabilityEstimator.observe has it."""
        self._lengths.observe(sources, lengths, ages, now, places)

    def cheapness(self, exponent: float) -> np.ndarray:
        """float64 [K]: (mean cost of the sources seen / a source's cost, within 1/4 and 4)^exponent; 1 if not seen."""
        cost = self._lengths.mean()
        seen = cost > 0
        if not seen.any():
            return np.ones(len(cost))
        ratio = np.where(seen, cost[seen].mean() / np.where(seen, cost, 1.0), 1.0)
        return np.clip(ratio, 1.0 / LARGEST_RATIO, LARGEST_RATIO) ** exponent

    def state_dict(self) -> dict[str, np.ndarray]:
        state = self._lengths.state_dict()
        return {ours: state[name] for name, ours in _NAMES.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        none = np.zeros(len(state["length_ranks"]), np.int64)
        self._lengths.load_state_dict({name: state[ours] for name, ours in _NAMES.items()} | {"n_dropped": none})

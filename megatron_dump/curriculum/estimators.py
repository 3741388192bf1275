"""What the curriculum knows about each source: how much it can still teach, and how much of it is solved."""

from __future__ import annotations

from typing import Any

import numpy as np


class LearnabilityEstimator:
    """Mean |advantage| of each source over a sliding window: L_d of DUMP (arXiv 2504.09710, Algorithm 1).

    n_rollouts  int64 [K], rollouts ever drawn from each source (the bandit's n_d); non-finite ones count too, or a
                source that yields only NaN would keep the largest exploration bonus for ever
    n_dropped   int64 [K], non-finite advantages that were kept out of the window
    """

    def __init__(self, n_sources: int, window: int = 300):
        self.window = window  # rollouts, not prompts
        self.n_rollouts = np.zeros(n_sources, np.int64)
        self.n_dropped = np.zeros(n_sources, np.int64)
        self._values = [np.empty(0) for _ in range(n_sources)]  # float64, at most `window` each, oldest first

    def observe(self, source_ids: np.ndarray, advantages: np.ndarray) -> None:
        """Add one step's rollouts, in global order: source_ids int64 [N], advantages float64 [N]."""
        magnitudes = np.abs(np.asarray(advantages, np.float64))
        for source in np.unique(source_ids):
            new = magnitudes[source_ids == source]
            kept = new[np.isfinite(new)]
            self.n_rollouts[source] += new.size
            self.n_dropped[source] += new.size - kept.size
            self._values[source] = np.concatenate([self._values[source], kept])[-self.window :]

    def mean(self) -> np.ndarray:
        """float64 [K]: mean |A| of each window; 0 for a source not seen yet. Always finite."""
        return np.array([np.sum(v / v.size) if v.size else 0.0 for v in self._values])  # dividing first cannot overflow

    def state_dict(self) -> dict[str, Any]:
        return {
            "n_rollouts": self.n_rollouts.tolist(),
            "n_dropped": self.n_dropped.tolist(),
            "values": [v.tolist() for v in self._values],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.n_rollouts = np.array(state["n_rollouts"], np.int64)
        self.n_dropped = np.array(state["n_dropped"], np.int64)
        self._values = [np.array(v, np.float64) for v in state["values"]]


class PassRateEstimator:
    """Discounted Beta posterior of each source's pass rate (MoPPS, arXiv 2507.04632, with its lambda = `discount`).

    Per observed step: alpha <- discount * alpha + (1 - discount) * 1 + successes, beta likewise with failures; the
    prior is Beta(1, 1). Reported only; no weight depends on it.
    """

    def __init__(self, n_sources: int, discount: float = 0.5):
        self.discount = discount
        self._counts = np.ones((2, n_sources))  # float64 [2, K]: alpha, beta

    def observe(self, source_ids: np.ndarray, correct: np.ndarray) -> None:
        """Add one step's rollouts: source_ids int64 [N], correct bool [N]. Sources without rollouts keep theirs."""
        n_sources = self._counts.shape[1]
        successes = np.bincount(source_ids[correct], minlength=n_sources)
        failures = np.bincount(source_ids[~correct], minlength=n_sources)
        seen = successes + failures > 0
        decayed = self.discount * self._counts + (1.0 - self.discount)
        self._counts = np.where(seen, decayed + [successes, failures], self._counts)

    def mean(self) -> np.ndarray:
        """float64 [K]: posterior mean, in (0, 1)."""
        return self._counts[0] / self._counts.sum(axis=0)

    def state_dict(self) -> dict[str, Any]:
        return {"counts": self._counts.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._counts = np.array(state["counts"], np.float64)

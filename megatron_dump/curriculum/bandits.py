"""Source policies that learn which sources teach the most, as their papers have them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from megatron_dump.curriculum.estimators import LARGEST, LearnabilityEstimator
from megatron_dump.curriculum.registry import check_number
from megatron_dump.curriculum.source_policy import IndependentSlots, SourceSetting, softmax
from megatron_dump.types import Outcomes, pack_places


class Learner(IndependentSlots):
    """Knows the latest step of which outcomes came: the `now` that their ages count back from."""

    def __init__(self, setting: SourceSetting):
        super().__init__(setting)
        self._latest_step = -1

    def _advance(self, step: int) -> int:
        """How many steps later than all before these outcomes are: 0 for the same step and for late ones."""
        passed = max(step - self._latest_step, 0) if self._latest_step >= 0 else 1  # a run may start at any step
        self._latest_step = max(step, self._latest_step)
        return passed

    def state_dict(self) -> dict[str, np.ndarray]:
        return {"latest_step": np.full(self.n_sources, self._latest_step, np.int64)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._latest_step = int(np.max(state["latest_step"]))  # a source that the saved run did not have says -1


class SEC(Learner):
    """SEC (arXiv 2505.14970): Q <- alpha r + (1 - alpha) Q (Eq. 1), r the source's mean |A| in a step (Eq. 3).

    Weights are softmax(Q / temperature), Q = 0 at first; a source without outcomes keeps its Q. The paper has
    alpha = 0.5, temperatures 1.0, 0.4 and 0.2 by task, and no `floor` (that much of the uniform distribution).
    Outcomes of a step may come in several calls: r is their mean over all of them. Those that come after a later
    step's count with the latest step.
    """

    def __init__(self, setting: SourceSetting, *, alpha: float = 0.5, temperature: float = 0.4, floor: float = 0.0):
        check_number("sources.alpha", alpha, 0, 1)
        check_number("sources.temperature", temperature, 1e-6)
        check_number("sources.floor", floor, 0, 1)
        super().__init__(setting)
        self._alpha, self._temperature, self._floor = alpha, temperature, floor
        self._before = np.zeros(self.n_sources)  # Q before the latest step
        self._mean = np.zeros(self.n_sources)  # mean |A| in the latest step
        self._count = np.zeros(self.n_sources, np.int64)  # finite advantages in the latest step
        self._n_dropped = np.zeros(self.n_sources, np.int64)

    def _q(self) -> np.ndarray:
        updated = self._alpha * self._mean + (1.0 - self._alpha) * self._before
        return np.minimum(np.where(self._count > 0, updated, self._before), LARGEST)  # rounding may pass it

    def weights(self, step: int) -> np.ndarray:
        return (1.0 - self._floor) * softmax(self._q(), self._temperature) + self._floor / self.n_sources

    def observe(self, outcomes: Outcomes) -> None:
        if self._advance(outcomes.step):
            self._before = self._q()
            self._mean, self._count = np.zeros(self.n_sources), np.zeros(self.n_sources, np.int64)
        finite = np.isfinite(outcomes.advantages)
        self._n_dropped += np.bincount(outcomes.source_ids[~finite], minlength=self.n_sources)
        sources, magnitudes = outcomes.source_ids[finite], np.abs(outcomes.advantages[finite])
        new = np.bincount(sources, minlength=self.n_sources)
        total = np.maximum(self._count + new, 1)
        with np.errstate(over="ignore"):  # shares are divided before they are added up: past LARGEST by rounding alone
            added = np.bincount(sources, magnitudes / total[sources], minlength=self.n_sources)
            self._mean = np.minimum(self._mean * (self._count / total) + added, LARGEST)
        self._count = self._count + new

    def state_dict(self) -> dict[str, np.ndarray]:
        arrays = {"q": self._before, "step_mean": self._mean, "step_count": self._count, "n_dropped": self._n_dropped}
        return {**super().state_dict(), **{name: array.copy() for name, array in arrays.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._before, self._mean = np.array(state["q"], np.float64), np.array(state["step_mean"], np.float64)
        self._count = np.array(state["step_count"], np.int64)
        self._n_dropped = np.array(state["n_dropped"], np.int64)

    def metrics(self) -> dict[str, np.ndarray]:
        return {"q": self._q(), "n_dropped": self._n_dropped.astype(np.float64)}


def confidence_bounds(mean: np.ndarray, n: np.ndarray, exploration: float) -> tuple[np.ndarray, np.ndarray]:
    """UCB = mean + bonus, bonus = exploration * sqrt(2 ln(n_total + 1) / (n_d + 1)): float64 [K] each, finite."""
    with np.errstate(over="ignore"):
        bonus = np.minimum(exploration * np.sqrt(2.0 * np.log(n.sum() + 1.0) / (n + 1.0)), LARGEST)
        return np.minimum(mean + bonus, LARGEST), bonus


class DumpUCB(Learner):
    """DUMP (arXiv 2504.09710, Algorithm 1): softmax over upper confidence bounds of the sources' learnability.

    UCB_d = L_d + exploration * sqrt(2 ln(n_total + 1) / (n_d + 1)), L_d the mean |A| over the source's last `window`
    rollouts, n_d its rollouts so far; the paper has exploration = 1, window = 300 and temperature = 0.1. `floor` (0 in
    the paper) mixes in that much of the uniform distribution. n_d counts rollouts when they are drawn, and so those
    that turn out not to be finite: a source that yields only NaN would keep the largest bonus for ever.
    """

    def __init__(
        self,
        setting: SourceSetting,
        *,
        window: int = 300,
        exploration: float = 1.0,
        temperature: float = 0.1,
        floor: float = 0.0,
    ):
        check_number("sources.window", window, 1, whole=True)
        check_number("sources.exploration", exploration, 0)
        check_number("sources.temperature", temperature, 1e-6)
        check_number("sources.floor", floor, 0, 1)
        super().__init__(setting)
        self._exploration, self._temperature, self._floor = exploration, temperature, floor
        self._estimator = LearnabilityEstimator(self.n_sources, window)
        self._n_rollouts = np.zeros(self.n_sources, np.int64)

    def weights(self, step: int) -> np.ndarray:
        ucb, _ = confidence_bounds(self._estimator.mean(), self._n_rollouts, self._exploration)
        return (1.0 - self._floor) * softmax(ucb, self._temperature) + self._floor / self.n_sources

    def drawn(self, source_ids: np.ndarray, rollouts: np.ndarray) -> None:
        self._n_rollouts += np.bincount(source_ids, rollouts, minlength=self.n_sources).astype(np.int64)

    def observe(self, outcomes: Outcomes) -> None:
        self._advance(outcomes.step)
        places = pack_places(outcomes.group_ids, outcomes.samples)  # the step's own order, however its outcomes arrive
        self._estimator.observe(outcomes.source_ids, outcomes.advantages, outcomes.ages, self._latest_step, places)

    def state_dict(self) -> dict[str, np.ndarray]:
        return {**super().state_dict(), **self._estimator.state_dict(), "n_rollouts": self._n_rollouts.copy()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._estimator.load_state_dict(state)
        self._n_rollouts = np.array(state["n_rollouts"], np.int64)

    def metrics(self) -> dict[str, np.ndarray]:
        mean = self._estimator.mean()
        ucb, bonus = confidence_bounds(mean, self._n_rollouts, self._exploration)
        n_dropped = self._estimator.n_dropped.astype(np.float64)
        return {"ucb": ucb, "mean_abs_adv": mean, "bonus": bonus, "n_dropped": n_dropped}

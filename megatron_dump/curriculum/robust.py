"""The source policy that learns which sources teach the most, without the known faults of the published ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from megatron_dump.curriculum.bandits import Learner, confidence_bounds
from megatron_dump.curriculum.costs import RolloutCosts
from megatron_dump.curriculum.estimators import (
    LARGEST,
    LearnabilityEstimator,
    PassRateEstimator,
    expected_learnability,
)
from megatron_dump.curriculum.registry import check_number
from megatron_dump.curriculum.source_policy import SourceSetting, check_choice, softmax
from megatron_dump.types import Outcomes


class DumpUCBRobust(Learner):
    """DUMP with the faults of its Algorithm 1 taken out; ours, not the paper's.

    - L_d is the mean over the source's last `window` prompts, not rollouts: 300 rollouts are 19 prompts at G = 16.
    - What a prompt contributes: `posterior`, its expected learnability given how many of its rollouts are correct
      (see `expected_learnability`; the prior mean is the source's pass rate), or `advantage`, its group's mean |A|.
      `auto` takes the posterior where rewards are right or wrong: while a source has shown two values at the most.
    - n_d counts prompts, and each step multiplies it by `discount`: exploration does not die, and a source that was
      dull long ago is tried again. UCB_d = L_d + exploration * sqrt(2 ln(n_total + 1) / (n_d + 1)).
    - UCB_d is multiplied by (mean length of all sources' rollouts / its own, within 1/4 and 4)^cost_exponent: at 1
      what counts is what a generated token teaches; at 0, the default, what a rollout does.
    - P = (1 - epsilon) softmax(UCB / temperature) + epsilon base, base being uniform or proportional to size.
    """

    def __init__(
        self,
        setting: SourceSetting,
        *,
        window: int = 64,
        discount: float = 0.95,
        exploration: float = 0.25,
        temperature: float = 0.05,
        epsilon: float = 0.05,
        base: str = "uniform",
        learnability: str = "auto",
        cost_exponent: float = 0.0,
    ):
        check_number("sources.window", window, 1, whole=True)
        check_number("sources.discount", discount, 0, 1)
        check_number("sources.exploration", exploration, 0)
        check_number("sources.temperature", temperature, 1e-6)
        check_number("sources.epsilon", epsilon, 0, 1)
        check_number("sources.cost_exponent", cost_exponent, 0)
        check_choice("sources.base", base, ("uniform", "proportional"))
        check_choice("sources.learnability", learnability, ("auto", "advantage", "posterior"))
        super().__init__(setting)
        sizes = np.array(setting.sizes, np.float64) if base == "proportional" else np.ones(self.n_sources)
        self._base, self._epsilon, self._learnability = sizes / sizes.sum(), epsilon, learnability
        self._discount, self._exploration, self._temperature = discount, exploration, temperature
        self._estimator = LearnabilityEstimator(self.n_sources, window)
        self._pass_rate = PassRateEstimator(self.n_sources)
        self._cost_exponent, self._costs = cost_exponent, RolloutCosts(self.n_sources, window)
        self._n_prompts = np.zeros(self.n_sources)  # discounted
        self._n_dropped = np.zeros(self.n_sources, np.int64)  # rollouts without a finite reward and advantage
        self._low, self._high = np.zeros(self.n_sources), np.zeros(self.n_sources)  # of the rewards, where _rewarded
        self._rewarded = np.zeros(self.n_sources, bool)
        self._graded = np.zeros(self.n_sources, bool)  # more than two different rewards seen

    def weights(self, step: int) -> np.ndarray:
        ucb, _ = self._bounds()
        return (1.0 - self._epsilon) * softmax(ucb, self._temperature) + self._epsilon * self._base

    def _bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """UCB and the bonus in it, float64 [K] each."""
        ucb, bonus = confidence_bounds(self._estimator.mean(), self._n_prompts, self._exploration)
        if self._cost_exponent == 0:
            return ucb, bonus
        cheapness = self._costs.cheapness(self._cost_exponent)
        with np.errstate(over="ignore"):
            return np.minimum(ucb * cheapness, LARGEST), np.minimum(bonus * cheapness, LARGEST)

    def drawn(self, source_ids: np.ndarray, rollouts: np.ndarray) -> None:
        self._n_prompts += np.bincount(source_ids, minlength=self.n_sources)

    def observe(self, outcomes: Outcomes) -> None:
        self._n_prompts *= self._discount ** self._advance(outcomes.step)
        usable = np.isfinite(outcomes.rewards) & np.isfinite(outcomes.advantages)
        self._n_dropped += np.bincount(outcomes.source_ids[~usable], minlength=self.n_sources)
        if not usable.any():
            return
        sources, correct = outcomes.source_ids[usable], outcomes.correct[usable]
        self._see_rewards(sources, outcomes.rewards[usable])
        # Groups, numbered 0.. by id, with what each needs to be judged.
        ids, group, size = _groups(outcomes.group_ids[usable])
        source, age = np.empty(size.size, np.int64), np.full(size.size, np.iinfo(np.int64).min)
        source[group] = sources
        np.maximum.at(age, group, outcomes.ages[usable])  # as old as its oldest rollout
        value = self._judge(source, group, size, correct, np.abs(outcomes.advantages[usable]))
        self._estimator.observe(source, value, age, self._latest_step, ids)
        if self._cost_exponent > 0:
            lengths = np.bincount(group, outcomes.lengths[usable]) / size
            self._costs.observe(source, lengths, age, self._latest_step, ids)
        self._pass_rate.observe(sources, correct, step=outcomes.step)

    def _see_rewards(self, sources: np.ndarray, rewards: np.ndarray) -> None:
        """Find sources whose rewards take more than two values, and so say more than `correct` does."""
        low, high = np.where(self._rewarded, self._low, np.inf), np.where(self._rewarded, self._high, -np.inf)
        np.minimum.at(low, sources, rewards)
        np.maximum.at(high, sources, rewards)
        between = (rewards != low[sources]) & (rewards != high[sources])
        self._graded[sources[between]] = True
        for old in (self._low, self._high):
            self._graded |= self._rewarded & (old != low) & (old != high)
        self._rewarded[sources] = True
        self._low, self._high = np.where(self._rewarded, low, 0.0), np.where(self._rewarded, high, 0.0)

    def _judge(
        self,
        source: np.ndarray,  # int64 [groups]
        group: np.ndarray,  # int64 [n], the group of every rollout
        size: np.ndarray,  # int64 [groups]
        correct: np.ndarray,  # bool [n]
        magnitudes: np.ndarray,  # float64 [n], |A|
    ) -> np.ndarray:
        """float64 [groups]: the learnability of each group."""
        with np.errstate(over="ignore"):
            advantage = np.minimum(np.bincount(group, magnitudes / size[group]), LARGEST)
        binary = {"auto": ~self._graded[source], "posterior": np.ones(size.size, bool)}.get(self._learnability)
        if binary is None:
            return advantage
        right = np.bincount(group[correct], minlength=size.size)[binary]
        advantage[binary] = expected_learnability(right, size[binary], self._pass_rate.mean()[source[binary]])
        return advantage

    def state_dict(self) -> dict[str, np.ndarray]:
        return {
            **super().state_dict(),
            **self._estimator.state_dict(),
            **self._pass_rate.state_dict(),
            **(self._costs.state_dict() if self._cost_exponent > 0 else {}),
            **{name: getattr(self, f"_{name}").copy() for name in _ROBUST_STATE},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._estimator.load_state_dict(state)
        self._pass_rate.load_state_dict(state)
        if self._cost_exponent > 0:
            self._costs.load_state_dict(state)
        for name in _ROBUST_STATE:
            setattr(self, f"_{name}", np.array(state[name], getattr(self, f"_{name}").dtype))

    def metrics(self) -> dict[str, np.ndarray]:
        mean, (ucb, bonus) = self._estimator.mean(), self._bounds()
        n_dropped = self._n_dropped.astype(np.float64)
        return {"ucb": ucb, "learnability": mean, "bonus": bonus, "n_dropped": n_dropped}


_ROBUST_STATE = ("n_prompts", "n_dropped", "low", "high", "rewarded", "graded")


def _groups(group_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids int64 [n] -> the different ones, sorted; the group of every rollout, 0.. in that order [n]; group sizes."""
    first = group_ids.min()
    sizes = np.bincount(group_ids - first)
    present = np.flatnonzero(sizes)
    return first + present, (np.cumsum(sizes > 0) - 1)[group_ids - first], sizes[present]

"""From completions to rewards, advantages and Outcomes, on one rank's share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from megatron_dump.rewards import RewardFn, reward_for_source
from megatron_dump.types import Completion, Outcomes, Prompt, Score


class Scorer:
    """Judges completions by the reward function of their source."""

    def __init__(self, mapping: Mapping[str, str], sources: Sequence[str]) -> None:
        """mapping: `model.data.rewards`, patterns of sources to reward names. ValueError if a source has none."""
        self.functions: dict[str, RewardFn] = {s: reward_for_source(s, mapping) for s in sources}

    def score(self, completions: Sequence[Completion], prompts: Mapping[int, Prompt]) -> list[Score]:
        """One Score a completion; `prompts` by group id."""
        return [self._score(c, prompts[c.group_id]) for c in completions]

    def _score(self, completion: Completion, prompt: Prompt) -> Score:
        return self.functions[prompt.source](completion.text, prompt.ground_truth)


def local_outcomes(
    step: int,
    completions: Sequence[Completion],
    prompts: Mapping[int, Prompt],
    scores: Sequence[Score],
    sources: Sequence[str],
    ages: Sequence[int] = (),
) -> Outcomes:
    """This rank's rollouts as Outcomes, in the order given, their advantages still unknown (NaN).

    prompts by group id; sources: sorted names; ages: training steps since each was generated, default 0.
    """
    place = {name: k for k, name in enumerate(sources)}
    mine = [prompts[c.group_id] for c in completions]
    rewards = np.array([s.reward for s in scores], np.float64)
    return Outcomes(
        step=step,
        group_ids=np.array([c.group_id for c in completions], np.int64),
        samples=np.array([c.sample for c in completions], np.int64),
        prompt_ids=np.array([p.index for p in mine], np.int64),
        source_ids=np.array([place[p.source] for p in mine], np.int64),
        rewards=rewards,
        advantages=np.full(len(rewards), np.nan),
        correct=np.array([s.correct for s in scores], bool),
        well_formed=np.array([s.well_formed for s in scores], bool),
        lengths=np.array([len(c.token_ids) for c in completions], np.int64),
        finished=np.array([c.finished for c in completions], bool),
        kept=np.isfinite(rewards),
        ages=np.array(ages or [0] * len(mine), np.int64),
    )


def step_metrics(outcomes: Outcomes, sources: Sequence[str], max_length: int) -> dict[str, float]:
    """What a step's rollouts looked like; keys follow verl where it has one."""
    lengths, kept = outcomes.lengths, outcomes.kept
    metrics = {
        "critic/score/mean": _finite_mean(outcomes.rewards),
        "critic/rewards/mean": _finite_mean(outcomes.rewards),
        "critic/advantages/mean": _finite_mean(outcomes.advantages[kept]),
        "train/n_rollouts": len(kept),
        "train/n_kept": kept.sum(),
        "train/accuracy": outcomes.correct.mean(),
        "train/well_formed": outcomes.well_formed.mean(),
        "response_length/mean": lengths.mean(),
        "response_length/max": lengths.max(),
        "response_length/clip_ratio": ((lengths >= max_length) & ~outcomes.finished).mean(),
    }
    for k, source in enumerate(sources):
        of_source = outcomes.source_ids == k
        if of_source.any():
            metrics[f"train/{source}/reward/mean"] = _finite_mean(outcomes.rewards[of_source])
            metrics[f"train/{source}/accuracy"] = outcomes.correct[of_source].mean()
    return {k: float(v) for k, v in metrics.items()}


def _finite_mean(values: np.ndarray) -> float:
    """NaN if no value is finite."""
    values = values[np.isfinite(values)]
    return float(values.mean()) if values.size else float("nan")

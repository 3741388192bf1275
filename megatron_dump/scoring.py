"""From completions to rewards, advantages and Outcomes, on one rank's share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megatron_dump.distributed import Replica, all_gather_array, broadcast_array, fail_together
from megatron_dump.rewards.workers import Job, RewardPool
from megatron_dump.types import Completion, Outcomes, Prompt, Score

ALONE = Replica(0, 1, None, "cpu")  # type: ignore[arg-type]


class Scorer:
    """Judges completions by the reward function of their source: once a replica, by its first rank.

    A verdict may depend on the clock, so ranks that judged the same completion by themselves could disagree.
    """

    def __init__(
        self, mapping: Mapping[str, Any], sources: Sequence[str], replica: Replica = ALONE, **pool_options: Any
    ) -> None:
        """mapping: `model.data.rewards`; sources: every source there may be; pool_options: RewardPool's.

        ValueError on every rank for a source without a reward function and for options that cannot be used.
        """
        self.replica, self.sources = replica, list(sources)
        options = pool_options if replica.is_lead else {**pool_options, "workers": 0}
        self.pool = RewardPool(mapping, sources, **options)
        self._faults = np.zeros((len(self.sources), 2), np.int64)  # time-outs, crashes

    def score(self, what: str, completions: Sequence[Completion], prompts: Mapping[int, Prompt]) -> list[Score]:
        """One Score a completion, `prompts` by group id. A collective; RuntimeError on every rank if one fails."""
        scores, table = [], None
        with fail_together(what, device=self.replica.device):
            if self.replica.is_lead:
                jobs = [Job((p := prompts[c.group_id]).source, c.text, p.ground_truth) for c in completions]
                scores, faults = self.pool.score_all(jobs)
                self._faults += [(faults[s].timeouts, faults[s].crashes) for s in self.sources]
                rows = [(s.reward, s.correct, s.well_formed) for s in scores]
                table = np.array(rows, np.float64).reshape(-1, 3)
        if self.replica.ranks is None:
            return scores
        shape, device = (len(completions), 3), self.replica.device
        table = broadcast_array(table, shape, np.float64, group=self.replica.ranks, device=device)
        return scores or [Score(float(r), bool(right), bool(read)) for r, right, read in table]

    def take_faults(self) -> dict[str, tuple[int, int]]:
        """Source -> (time-outs, crashes) of all replicas since the last call, where there were any. A collective."""
        total = all_gather_array(self._faults, self.replica.group, self.replica.device).sum(axis=0)
        self._faults[:] = 0
        return {s: (int(t), int(c)) for s, (t, c) in zip(self.sources, total, strict=True) if t or c}

    def close(self) -> None:
        """End the reward processes."""
        self.pool.close()


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
    return Outcomes.of(
        step=step,
        group_ids=[c.group_id for c in completions],
        samples=[c.sample for c in completions],
        prompt_ids=[p.index for p in mine],
        source_ids=[place[p.source] for p in mine],
        rewards=rewards,
        advantages=np.full(len(rewards), np.nan),
        correct=[s.correct for s in scores],
        well_formed=[s.well_formed for s in scores],
        lengths=[len(c.token_ids) for c in completions],
        finished=[c.finished for c in completions],
        kept=np.isfinite(rewards),
        ages=ages or [0] * len(mine),
    )


def step_metrics(outcomes: Outcomes, sources: Sequence[str], max_length: int) -> dict[str, float]:
    """What a step's rollouts looked like; keys follow verl where it has one."""
    lengths, kept = outcomes.lengths, outcomes.kept
    metrics = {
        "critic/score/mean": finite_mean(outcomes.rewards),
        "critic/rewards/mean": finite_mean(outcomes.rewards),
        "critic/advantages/mean": finite_mean(outcomes.advantages[kept]),
        "train/n_rollouts": len(kept),
        "train/n_kept": kept.sum(),
        "train/accuracy": outcomes.correct.mean(),
        "train/well_formed": outcomes.well_formed.mean(),
        "response_length/mean": lengths.mean(),
        "response_length/max": lengths.max(),
        "response_length/clip_ratio": ((lengths >= max_length) & ~outcomes.finished).mean(),
        "rollout/age_mean": outcomes.ages.mean(),
        "rollout/age_max": outcomes.ages.max(),
    }
    for k, source in enumerate(sources):
        of_source = outcomes.source_ids == k
        if of_source.any():
            metrics[f"train/{source}/reward/mean"] = finite_mean(outcomes.rewards[of_source])
            metrics[f"train/{source}/accuracy"] = outcomes.correct[of_source].mean()
    return {k: float(v) for k, v in metrics.items()}


def finite_mean(values: np.ndarray) -> float:
    """NaN if no value is finite."""
    values = values[np.isfinite(values)]
    return float(values.mean()) if values.size else float("nan")

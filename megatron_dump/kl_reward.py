"""The KL to the reference policy as a part of the reward, instead of a term of the loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from megatron_dump.batches import UpdateShare
from megatron_dump.collect import with_advantages
from megatron_dump.distributed import Replica, all_gather_array, broadcast_array
from megatron_dump.grpo import kl_estimate
from megatron_dump.types import Outcomes, TrainBatch


@dataclasses.dataclass(frozen=True)
class KLInReward:
    """reward - kl_penalty × the sum of the KL estimates at a rollout's tokens (InstructGPT, 2203.02155, eq. 2).

    Only what is trained on: the curriculum has observed, and the filter has judged, the rewards without it.
    """

    kl_penalty: float
    kl_penalty_type: str  # of grpo.KL_PENALTY_TYPES
    normalize_rewards: bool
    advantage_estimator: str

    def apply(
        self, outcomes: Outcomes, shares: Sequence[UpdateShare], batches: Sequence[TrainBatch], replica: Replica
    ) -> dict[str, float]:
        """Replace the advantages of `batches`, this rank's share of every update, which have old and ref_logprobs.

        A collective, for groups may be cut over ranks and later pipeline stages alone know log-probabilities. Returns
        metrics of the rollouts that are trained on, the same on every rank; `actor/reward_kl_penalty` is verl's mean
        over rollouts of the mean over tokens.
        """
        kl = gather_kl(shares, batches, len(outcomes.rewards), self.kl_penalty_type, replica)
        told = self.penalized(outcomes, kl)
        for share, batch in zip(shares, batches, strict=True):
            batch.advantages[: len(share.rows)] = np.where(share.weights != 0, told.advantages[share.rows], 0.0)
        kept = outcomes.kept
        return {
            "actor/reward_kl_penalty": float((kl / np.maximum(outcomes.lengths, 1))[kept].mean()),
            "critic/rewards/mean": float(told.rewards[kept].mean()),
            "critic/advantages/mean": float(told.advantages[kept].mean()),
        }

    def penalized(self, outcomes: Outcomes, kl: np.ndarray) -> Outcomes:
        """`outcomes` with rewards less the penalty and the advantages of those; kl float64 [N], nats."""
        told = dataclasses.replace(outcomes, rewards=outcomes.rewards - self.kl_penalty * kl)
        return with_advantages(told, self.normalize_rewards, self.advantage_estimator)


def gather_kl(
    shares: Sequence[UpdateShare], batches: Sequence[TrainBatch], n: int, kind: str, replica: Replica
) -> np.ndarray:
    """float64 [n]: the KL estimates of each of a step's rollouts summed over its tokens; 0 for those not trained on.

    The same on every rank. A collective.
    """
    own, known = np.zeros(n), 1
    for share, batch in zip(shares, batches, strict=True):
        if batch.old_logprobs is None or batch.ref_logprobs is None:
            known = 0  # not the last pipeline stage
            break
        own[share.rows] = sequence_kl(batch, kind)[: len(share.rows)]
    total = all_gather_array(own, replica.group, replica.device).sum(axis=0)  # a rollout is one rank's: the rest are 0
    if replica.ranks is None:
        return total
    knows = all_gather_array(np.array([known]), replica.ranks, replica.device)[:, 0]
    return broadcast_array(total, (n,), np.float64, int(knows.argmax()), replica.ranks, replica.device)


def sequence_kl(batch: TrainBatch, kind: str) -> np.ndarray:
    """float64 [rows], nats: the estimates at a row's sampled tokens, summed."""
    assert batch.old_logprobs is not None and batch.ref_logprobs is not None
    outside = torch.from_numpy(batch.loss_mask == 0)
    policy, reference = (
        torch.from_numpy(values).double().masked_fill(outside, 0.0)
        for values in (batch.old_logprobs, batch.ref_logprobs)
    )
    return kl_estimate(policy, reference, kind).sum(dim=1).numpy()

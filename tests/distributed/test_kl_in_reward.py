"""The KL in the reward: groups cut over ranks, log-probabilities known to the last stage alone, whole runs."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
import torch.distributed as dist

from megatron_dump.batches import update_shares
from megatron_dump.curriculum.codec import outcomes_from_json
from megatron_dump.distributed import Replica
from megatron_dump.kl_reward import KLInReward
from megatron_dump.types import Outcomes, TrainBatch
from tests.distributed.launch import run_ranks
from tests.distributed.runs import draws, make_data, rows, train
from tests.unit.curricula import outcomes

SIZES, LENGTHS = (3, 4, 2, 5), (3, 1, 4, 2, 5, 2, 1, 3, 4, 2, 3, 1, 5, 2)
UPDATES, BETA = 2, 0.5


def _told() -> Outcomes:
    """Four ragged groups; rollout 5 could not be judged, group 2 is rejected."""
    rng = np.random.default_rng(0)
    rewards, groups = rng.normal(size=14), np.repeat(np.arange(4), SIZES)
    rewards[5] = np.nan
    kept = np.isfinite(rewards) & (groups != 2)
    return outcomes(0, np.zeros(14, int), np.sin(np.arange(14)), rewards, groups, lengths=np.array(LENGTHS), kept=kept)


def _logprobs(reference: bool) -> np.ndarray:
    """float32 [14, 7], infinite outside the completions, which begin at column 1."""
    values = -1 - np.random.default_rng(1 + reference).random((14, 7)).astype(np.float32)
    inside = (np.arange(7) >= 1) & (np.arange(7) < 1 + np.array(LENGTHS)[:, None])
    return np.where(inside, values, np.float32(np.inf if reference else -np.inf))


def _advantages_by_hand(kind: str) -> tuple[dict[int, float], float]:
    """Of the rollouts that train, and the mean over them of the KL per token."""
    told, estimates = _told(), {"k1": lambda d: -d, "k3": lambda d: math.exp(d) - d - 1}
    kl, rewards = {}, {}
    for i in np.flatnonzero(told.kept):
        pairs = zip(_logprobs(False)[i], _logprobs(True)[i], strict=True)
        kl[i] = math.fsum(estimates[kind](float(r) - float(p)) for p, r in pairs if math.isfinite(p))
        rewards[i] = told.rewards[i] - BETA * kl[i]
    groups = {i: [r for j, r in rewards.items() if told.group_ids[j] == told.group_ids[i]] for i in rewards}
    advantages = {
        i: (r - statistics.fmean(groups[i])) / (statistics.stdev(groups[i]) + 1e-6) for i, r in rewards.items()
    }
    return advantages, statistics.fmean(kl[i] / LENGTHS[i] for i in kl)


def _batches(rank: int, ranks: int, last_stage: bool):
    """This rank's shares and batches, filled up to even sizes as the actor fills them."""
    shares, batches = update_shares(_told(), np.array([2]), UPDATES, ranks, rank, "token-mean", 6), []
    for share in shares:
        n = share.n_rows + 1
        policy, reference = (np.zeros((n, 7), np.float32) for _ in range(2))
        policy[: len(share.rows)], reference[: len(share.rows)] = (_logprobs(r)[share.rows] for r in (False, True))
        mask = np.zeros((n, 7), np.float32)
        mask[: len(share.rows)] = np.isfinite(_logprobs(False)[share.rows]) & (share.weights != 0)[:, None]
        batch = TrainBatch(np.zeros((n, 7), int), mask, np.zeros(n, np.float32), np.zeros((n, 7), np.float32), 1.0)
        if last_stage:
            batch.old_logprobs, batch.ref_logprobs = policy, reference
        batches.append(batch)
    return shares, batches


@pytest.mark.parametrize("kind", ["k1", "k3"])
@pytest.mark.parametrize(("stages", "replicas"), [(1, 1), (1, 2), (1, 3), (2, 2)])
def test_advantages_are_those_of_rewards_less_the_kl(kind, stages, replicas):
    """In every layout, on every rank; the outcomes that the curriculum has seen stay as they are."""

    def rank():
        place = dist.get_rank()  # stage-major, as Megatron numbers ranks
        across = [dist.new_group([s * replicas + r for r in range(replicas)]) for s in range(stages)]
        within = [dist.new_group([s * replicas + r for s in range(stages)]) for r in range(replicas)]
        stage, mine = divmod(place, replicas)
        replica = Replica(mine, replicas, across[stage], "cpu", within[mine] if stages > 1 else None)
        shares, batches = _batches(mine, replicas, stage == stages - 1)
        told = _told()
        metrics = KLInReward(BETA, kind, True, "grpo").apply(told, shares, batches, replica)
        assert np.array_equal(told.advantages, _told().advantages)
        given = {}
        for share, batch in zip(shares, batches, strict=True):
            assert not batch.advantages[len(share.rows) :].any()
            given |= dict(zip(share.rows.tolist(), batch.advantages.tolist(), strict=False))
        return stage, given, metrics

    results = run_ranks(rank, stages * replicas)
    expected, kl = _advantages_by_hand(kind)
    for stage in range(stages):
        given = {k: v for s, of_rank, _ in results if s == stage for k, v in of_rank.items()}
        assert {k: given.pop(k) for k in expected} == pytest.approx(expected, rel=1e-5, abs=1e-6)
        assert given == {5: 0.0}  # the rollout that could not be judged
    assert all(metrics == results[0][2] for *_, metrics in results)
    assert results[0][2]["actor/reward_kl_penalty"] == pytest.approx(kl, rel=1e-6)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


def test_runs_train_alike_on_any_layout_and_the_curriculum_sees_the_plain_rewards(data, tmp_path):
    """TP = 2 x PP = 2 x DP = 2, where groups of eight are cut by shares of twelve; then one rank on its completions."""
    settings = {
        "trainer.grpo.kl_in_reward": "true",
        "trainer.grpo.kl_penalty_type": "k1",
        "trainer.grpo.initial_policy_kl_penalty": 50,  # so that the little that 3 steps move the policy is seen
        "model.optim.lr": 2e-5,
        "trainer.grpo.advantage_estimator": "rloo",
        "trainer.grpo.normalize_rewards": "false",  # true: where rewards are alike, rounding in the KL becomes ±1
        "trainer.grpo.samples_per_prompt": 8,  # two updates of 24 rollouts, 12 a rank: groups are cut
        "trainer.grpo.num_prompts_per_grpo_step": 6,
        "model.global_batch_size": 24,
        "model.grpo.loss_mode": "gspo",
        "model.grpo.importance_sampling_cap": 2.0,
        "model.grpo.loss_agg_mode": "seq-mean-token-sum-norm",
    }
    eight, one = tmp_path / "eight", tmp_path / "one"
    inference = "trainer.grpo.inference_backend"
    train(8, data, eight, 2, 2, **settings, **{f"{inference}.record": eight / "rollouts"})
    train(1, data, one, **settings, **{f"{inference}.type": "recorded", f"{inference}.path": eight / "rollouts"})
    assert draws(one) == draws(eight)
    for ours, theirs in zip(rows(eight), rows(one), strict=True):
        assert ours.keys() == theirs.keys() and "actor/kl_loss" not in ours
        for key in ours:
            if not key.startswith(("timing_s/", "perf/")):
                assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-4), (ours["step"], key)
    assert max(abs(row["critic/rewards/mean"] - row["critic/score/mean"]) for row in rows(eight)) > 1e-2
    for event in rows(eight, "curriculum.jsonl"):
        if "outcomes" in event:
            told = outcomes_from_json(event["outcomes"])
            for group in set(told.group_ids.tolist()):
                rewards, advantages = (v[told.group_ids == group] for v in (told.rewards, told.advantages))
                np.testing.assert_allclose(advantages, rewards - (rewards.sum() - rewards) / 7, atol=1e-12)

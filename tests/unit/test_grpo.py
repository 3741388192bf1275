"""Advantages and loss against independent computations."""

from __future__ import annotations

import itertools
import math
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dump import config, grpo


@settings(deadline=None)
@given(st.lists(st.lists(st.floats(-5, 5), min_size=1, max_size=6), min_size=1, max_size=5), st.randoms())
def test_advantages_equal_the_textbook(groups, random):
    pairs = [(label, reward) for label, rewards in enumerate(groups) for reward in rewards]
    random.shuffle(pairs)
    rewards = torch.tensor([r for _, r in pairs], dtype=torch.float64)
    ours = grpo.group_advantages(rewards, torch.tensor([label * 7 for label, _ in pairs]))
    for (label, reward), advantage in zip(pairs, ours.tolist(), strict=True):
        group = groups[label]
        if len(group) == 1:
            assert advantage == 0
        else:
            expected = (reward - statistics.fmean(group)) / (statistics.stdev(group) + 1e-6)
            assert advantage == pytest.approx(expected, rel=1e-6, abs=1e-6)


REWARDS = st.lists(st.lists(st.integers(-30, 30), min_size=1, max_size=6), min_size=1, max_size=5)
ESTIMATES = st.tuples(st.booleans(), st.sampled_from(grpo.ADVANTAGE_ESTIMATORS))


def _advantages(groups: list[list[float]], normalize: bool, estimator: str, eps: float = 1e-6) -> torch.Tensor:
    labels = [label for label, rewards in enumerate(groups) for _ in rewards]
    rewards = torch.tensor([r for rewards in groups for r in rewards], dtype=torch.float64)
    return grpo.group_advantages(rewards, torch.tensor(labels), normalize, eps, estimator)


@settings(deadline=None)
@given(REWARDS)
def test_rloo_leaves_each_rollout_out_of_its_own_baseline(groups):
    """Its definition, sample by sample; and with the std, grpo's times n / (n - 1)."""
    ours = iter(_advantages(groups, False, "rloo").tolist())
    for group in groups:
        for i, reward in enumerate(group):
            others = group[:i] + group[i + 1 :]
            expected = reward - statistics.fmean(others) if others else 0.0
            assert next(ours) == pytest.approx(expected, rel=1e-12, abs=1e-12)
    factor = torch.tensor([len(g) / max(len(g) - 1, 1) for g in groups for _ in g], dtype=torch.float64)
    torch.testing.assert_close(_advantages(groups, True, "rloo"), _advantages(groups, True, "grpo") * factor)


@settings(deadline=None)
@given(REWARDS, ESTIMATES, st.integers(-50, 50), st.randoms())
def test_advantages_sum_to_zero_forget_a_shift_and_follow_an_order(groups, estimate, shift, random):
    ours = _advantages(groups, *estimate)
    for part in ours.split([len(group) for group in groups]):
        assert part.sum().abs() < 1e-7
    shifted = [[reward + shift * label for reward in group] for label, group in enumerate(groups)]  # each its own
    torch.testing.assert_close(_advantages(shifted, *estimate), ours, rtol=1e-7, atol=1e-7)
    order = list(range(len(ours)))
    random.shuffle(order)
    rewards = torch.tensor([r for group in groups for r in group], dtype=torch.float64)[order]
    labels = torch.tensor([label for label, group in enumerate(groups) for _ in group])[order]
    shuffled = grpo.group_advantages(rewards, labels, estimate[0], estimator=estimate[1])
    torch.testing.assert_close(shuffled, ours[order], rtol=1e-7, atol=1e-7)


@settings(deadline=None)
@given(REWARDS, st.sampled_from(grpo.ADVANTAGE_ESTIMATORS), st.floats(0.1, 10))
def test_only_the_std_forgets_the_scale_of_rewards(groups, estimator, scale):
    scaled = [[reward * scale for reward in group] for group in groups]
    plain = _advantages(groups, False, estimator)
    torch.testing.assert_close(_advantages(scaled, False, estimator), plain * scale, rtol=1e-9, atol=1e-9)
    varied = torch.tensor([len(set(group)) > 1 for group in groups for _ in group])
    ours, theirs = (_advantages(rewards, True, estimator, eps=0.0)[varied] for rewards in (scaled, groups))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_a_two_valued_reward_has_the_learnability_of_the_paper():
    """E|A| = 2 sqrt(p (1 - p)) sqrt((G - 1) / G), whatever the reward's scale."""
    for size, right, (low, high) in itertools.product((4, 16), (1, 3), ((0.0, 1.0), (-3.0, 3.0))):
        rewards = torch.tensor([high] * right + [low] * (size - right), dtype=torch.float64)
        mean = grpo.group_advantages(rewards, torch.zeros(size, dtype=torch.int64), eps=0.0).abs().mean().item()
        p = right / size
        assert mean == pytest.approx(2 * math.sqrt(p * (1 - p)) * math.sqrt((size - 1) / size), rel=1e-9)


def _loss_by_hand(logprobs, old, ref, advantages, mask, low, high, beta) -> float:
    total = 0.0
    for b, t in itertools.product(range(len(mask)), range(len(mask[0]))):
        if mask[b][t]:
            ratio = math.exp(logprobs[b][t] - old[b][t])
            clipped = min(max(ratio, 1 - low), 1 + high)
            d = ref[b][t] - logprobs[b][t]
            total += -min(ratio * advantages[b], clipped * advantages[b]) + beta * (math.exp(d) - d - 1)
    return total


def test_policy_loss_equals_the_formula_and_does_not_depend_on_the_split():
    torch.manual_seed(0)
    logprobs, old, ref = (torch.randn(6, 5, dtype=torch.float64) * 0.4 - 2 for _ in range(3))
    advantages, mask = torch.randn(6, dtype=torch.float64), (torch.rand(6, 5) < 0.7).double()
    n = mask.sum()

    def loss(rows):
        options = grpo.LossOptions(ratio_eps_low=0.2, ratio_eps_high=0.28, kl_penalty=0.3)
        return grpo.policy_loss(
            logprobs[rows], old[rows], advantages[rows], mask[rows], n, options, ref_logprobs=ref[rows]
        )

    whole, metrics = loss(slice(None))
    arrays = (x.tolist() for x in (logprobs, old, ref, advantages, mask))
    assert whole.item() == pytest.approx(_loss_by_hand(*arrays, 0.2, 0.28, 0.3) / n.item(), rel=1e-12)
    parts = sum(loss(slice(i, i + 2))[0].item() for i in (0, 2, 4))
    assert parts == pytest.approx(whole.item(), rel=1e-12)
    assert 0 < metrics["actor/pg_clipfrac"] < n


def test_tokens_outside_the_mask_never_reach_loss_or_gradient():
    logprobs = torch.tensor([[-120.0, -1.0]], requires_grad=True)
    mask, reference = torch.tensor([[0.0, 1.0]]), torch.tensor([[-1.0, -1.5]])
    old = torch.tensor([[0.0, -1.0]])
    options = grpo.LossOptions(kl_penalty=1.0)
    loss, _ = grpo.policy_loss(logprobs, old, torch.ones(1), mask, 1.0, options, ref_logprobs=reference)
    loss.backward()
    assert loss.isfinite() and logprobs.grad[0, 0] == 0 and logprobs.grad[0, 1] != 0


def test_clipping_stops_the_gradient_only_where_it_should():
    old = torch.zeros(4, 1)
    logprobs = torch.log(torch.tensor([[1.5], [0.5], [1.5], [0.5]])).requires_grad_()
    loss, metrics = grpo.policy_loss(logprobs, old, torch.tensor([1.0, 1.0, -1.0, -1.0]), torch.ones(4, 1), 1.0)
    loss.backward()
    assert (logprobs.grad[:, 0] != 0).tolist() == [False, True, True, False]
    assert metrics["actor/pg_clipfrac"] == 2


ROLLOUTS = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 30)), min_size=1, max_size=12)


@settings(deadline=None)
@given(ROLLOUTS, st.sampled_from(grpo.LOSS_AGG_MODES))
def test_loss_weights_are_the_means_they_are_called(rollouts, mode):
    """The weighted token sum over the number of tokens equals the nested means, written out."""
    groups, lengths = np.array(rollouts).T
    sizes = np.bincount(groups)[groups]
    per_token = np.sin(np.arange(len(groups)))  # what each token of a rollout adds to the loss
    weighted = (grpo.loss_weights(mode, groups, lengths, sizes, 32) * per_token * lengths).sum() / lengths.sum()
    of_group = {g: [per_token[i] for i in np.flatnonzero(groups == g)] for g in set(groups.tolist())}
    expected = {
        "token-mean": sum(x * n for x, n in zip(per_token, lengths, strict=True)) / lengths.sum(),
        "seq-mean-token-mean": statistics.fmean(per_token),
        "prompt-mean": statistics.fmean([statistics.fmean(values) for values in of_group.values()]),
        "seq-mean-token-sum-norm": statistics.fmean(x * n / 32 for x, n in zip(per_token, lengths, strict=True)),
    }[mode]
    assert weighted == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_the_loss_counts_a_row_as_often_as_its_weight_says():
    torch.manual_seed(2)
    logprobs, old = torch.randn(2, 3), torch.randn(2, 3)
    advantages, mask = torch.tensor([1.0, -2.0]), torch.ones(2, 3)
    weighted, _ = grpo.policy_loss(logprobs, old, advantages, mask, 1.0, weights=torch.tensor([2.0, 0.0]))
    first, _ = grpo.policy_loss(logprobs[:1], old[:1], advantages[:1], mask[:1], 1.0)
    assert weighted.item() == pytest.approx(2 * first.item())


@settings(deadline=None)
@given(ROLLOUTS, st.sampled_from(grpo.LOSS_AGG_MODES))
def test_empty_rollouts_count_nowhere_and_change_no_other_weight_s_share(rollouts, mode):
    groups, lengths = np.array(rollouts).T
    sizes = np.ones_like(groups)
    alone = grpo.loss_weights(mode, groups, lengths, sizes, 32)
    with_empty = [np.append(values, value) for values, value in ((groups, 7), (lengths, 0), (sizes, 1))]
    weights = grpo.loss_weights(mode, *with_empty, 32)
    np.testing.assert_array_equal(weights[:-1], alone)
    assert mode == "token-mean" or weights[-1] == 0


def test_the_names_of_the_configuration_are_those_of_the_functions():
    for name in ("LOSS_AGG_MODES", "LOSS_MODES", "ADVANTAGE_ESTIMATORS", "KL_PENALTY_TYPES"):
        assert getattr(config, name) == getattr(grpo, name)
    with pytest.raises(ValueError, match="loss_agg_mode 'mean' is unknown; known: token-mean"):
        grpo.loss_weights("mean", np.zeros(1, int), np.ones(1, int), np.ones(1, int), 1)
    with pytest.raises(ValueError, match="advantage_estimator 'gae' is unknown; known: grpo, rloo"):
        grpo.group_advantages(torch.zeros(2), torch.zeros(2), estimator="gae")
    with pytest.raises(ValueError, match="kl_penalty_type 'k4' is unknown; known: k1, k2, k3"):
        grpo.kl_estimate(torch.zeros(2), torch.zeros(2), "k4")

"""Loss modes where they meet each other, or a formula written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_dump import grpo
from megatron_dump.grpo import LossOptions
from tests.unit.losses import EVERYTHING, LENGTHS, QUICK, loss_of, make_batch, with_gradients

WIDE = {"ratio_eps_low": 1.0, "ratio_eps_high": 1e9}  # no ratio is clipped


@QUICK
@given(
    st.lists(st.integers(0, 1), min_size=1, max_size=6).filter(any), st.integers(0, 99), st.sampled_from([None, 1.5])
)
def test_gspo_of_single_tokens_is_vanilla(lengths, seed, clip_c):
    batch = make_batch(lengths, seed)
    for ours, theirs in zip(
        with_gradients(batch, LossOptions("gspo", 0.2, 0.28, clip_c, **EVERYTHING), 3.0),
        with_gradients(batch, LossOptions("vanilla", 0.2, 0.28, clip_c, **EVERYTHING), 3.0),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)


@QUICK
@given(LENGTHS, st.integers(0, 99))
def test_gspo_is_the_sequence_ratio_of_the_paper(lengths, seed):
    """Row by row in plain Python, with tokens sharing a row's weight: 2507.18071, eqs. 5 and 7."""
    batch = make_batch(lengths, seed)
    counts = batch["mask"].sum(1)
    rows = counts > 0
    weights = rows / counts.clamp(min=1) / rows.sum()
    loss, _ = loss_of(batch, LossOptions("gspo", 0.2, 0.28), 1.0, weights=weights)
    terms = []
    for b in np.flatnonzero(rows):
        mine = batch["mask"][b].bool()
        new, old = batch["logprobs"][b][mine].tolist(), batch["old_logprobs"][b][mine].tolist()
        ratio = math.exp((math.fsum(new) - math.fsum(old)) / len(new))
        a = batch["advantages"][b].item()
        terms.append(min(ratio * a, min(max(ratio, 0.8), 1.28) * a))
    assert loss.item() == pytest.approx(-math.fsum(terms) / len(terms), rel=1e-12, abs=1e-14)


@QUICK
@given(LENGTHS, st.integers(0, 99), st.sampled_from(["vanilla", "gspo"]))
def test_a_dual_clip_that_no_ratio_reaches_is_none(lengths, seed, mode):
    batch = make_batch(lengths, seed)
    bounded, plain = LossOptions(mode, ratio_clip_c=math.inf), LossOptions(mode)
    for a, b in zip(with_gradients(batch, bounded, 3.0)[:3], with_gradients(batch, plain, 3.0)[:3], strict=True):
        assert torch.equal(a, b)


def test_the_dual_clip_bounds_only_what_negative_advantages_lose():
    batch = {"mask": torch.ones(4, 1), "old_logprobs": torch.zeros(4, 1), "advantages": torch.tensor([1.0, 1, -1, -1])}
    batch["logprobs"] = torch.log(torch.tensor([[5.0], [1.1], [5.0], [1.1]])).requires_grad_()
    loss, sums = grpo.policy_loss(
        *(batch[k] for k in ("logprobs", "old_logprobs", "advantages", "mask")), 1.0, LossOptions(ratio_clip_c=3.0)
    )
    loss.backward()
    assert loss.item() == pytest.approx(-1.2 - 1.1 + 3.0 + 1.1)
    assert (batch["logprobs"].grad[:, 0] != 0).tolist() == [False, True, False, True]
    assert (sums["actor/pg_clipfrac"], sums["actor/pg_clipfrac_lower"]) == (1, 1)


@QUICK
@given(LENGTHS, st.integers(0, 99))
def test_cispo_without_clipping_has_the_gradient_of_the_unclipped_ratio(lengths, seed):
    """∇ r = r ∇ log π; and where vanilla stops the gradient of a clipped token, cispo does not."""
    batch = make_batch(lengths, seed)
    cispo, vanilla = (with_gradients(batch, LossOptions(mode, **WIDE), 3.0)[1] for mode in ("cispo", "vanilla"))
    torch.testing.assert_close(cispo, vanilla, rtol=1e-12, atol=1e-15)
    clipped = with_gradients(batch, LossOptions("cispo", 0.01, 0.01), 3.0)[1]
    assert torch.equal(clipped != 0, batch["mask"].bool())


@QUICK
@given(LENGTHS, st.integers(0, 99), st.sampled_from(grpo.LOSS_MODES))
def test_on_policy_every_mode_has_the_policy_gradient(lengths, seed, mode):
    """Ratio 1: -A ∇ log π at every token."""
    batch = make_batch(lengths, seed)
    batch["old_logprobs"] = batch["logprobs"].clone()
    gradient = with_gradients(batch, LossOptions(mode), 1.0)[1]
    expected = -(batch["advantages"] * batch["weights"])[:, None] * batch["mask"]
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-15)


@QUICK
@given(LENGTHS, st.integers(0, 99), st.sampled_from(grpo.LOSS_MODES))
def test_a_generator_that_agrees_needs_no_correction_and_weights_stay_below_the_cap(lengths, seed, mode):
    batch = make_batch(lengths, seed)
    plain = with_gradients(batch, LossOptions(mode), 3.0)
    same = with_gradients(
        {**batch, "rollout_logprobs": batch["old_logprobs"]}, LossOptions(mode, importance_sampling_cap=2.0), 3.0
    )
    assert same[0] == plain[0] and torch.equal(same[1], plain[1])
    assert same[3]["rollout_corr/rollout_is_mean"] == batch["mask"].sum()
    sums = loss_of(batch, LossOptions(mode, importance_sampling_cap=0.9), 3.0)[1]
    ratio = (batch["old_logprobs"] - batch["rollout_logprobs"]).exp()[batch["mask"] > 0]
    assert sums["rollout_corr/rollout_is_mean"].item() == pytest.approx(ratio.clamp(max=0.9).sum().item(), rel=1e-12)
    assert sums["rollout_corr/rollout_is_ratio_fraction_high"] == (ratio > 0.9).sum()

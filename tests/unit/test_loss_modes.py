"""Every loss mode: equal over splits, with the gradient of its value, finite whatever is masked."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_dump import grpo
from megatron_dump.batches import update_shares
from megatron_dump.grpo import LossOptions
from tests.unit.curricula import outcomes
from tests.unit.losses import LENGTHS, MODES, PER_TOKEN, QUICK, loss_of, make_batch, with_gradients


@QUICK
@given(LENGTHS, st.sampled_from(sorted(MODES)), st.integers(0, 99), st.lists(st.integers(1, 4), min_size=9, max_size=9))
def test_loss_gradients_and_metrics_are_the_sums_over_any_split(lengths, mode, seed, sizes):
    """Into micro-batches of any sizes, each cut to its own longest row."""
    options, batch = MODES[mode], make_batch(lengths, seed)
    n = float(batch["mask"].sum())
    whole, d_logprobs, d_entropy, sums = with_gradients(batch, options, n)
    assert tuple(sorted(sums)) == tuple(sorted(options.metrics))
    ends = np.minimum(np.cumsum(sizes), len(lengths))
    parts = [slice(start, end) for start, end in itertools.pairwise([0, *ends.tolist()]) if start < end]
    total, of_parts = torch.zeros(()).double(), {name: torch.zeros(()).double() for name in sums}
    for rows in parts:
        width = max(1, int(batch["mask"][rows].nonzero()[:, 1].max() + 1)) if batch["mask"][rows].any() else 1
        part = {k: v[rows, :width] if v.dim() == 2 else v[rows] for k, v in batch.items()}
        loss, by_logprobs, by_entropy, metrics = with_gradients(part, options, n)
        total += loss
        torch.testing.assert_close(by_logprobs, d_logprobs[rows, :width], rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(by_entropy, d_entropy[rows, :width], rtol=1e-12, atol=1e-15)
        of_parts = {name: value + metrics[name] for name, value in of_parts.items()}
    torch.testing.assert_close(total, whole, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(of_parts, sums, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", sorted(MODES))
@pytest.mark.parametrize("loss_agg_mode", grpo.LOSS_AGG_MODES)
def test_shares_of_data_parallel_ranks_add_up_to_the_loss_of_one(mode, loss_agg_mode):
    """As the loop deals the rollouts of ragged groups out: weights, denominators and rows of `update_shares`."""
    lengths = [3, 5, 1, 2, 6, 4, 2, 3, 5, 1, 4]
    batch, groups = make_batch(lengths, 3), [0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3]
    zeros = np.zeros(11)
    told = outcomes(0, zeros.astype(int), batch["advantages"].numpy(), zeros, groups, lengths=np.array(lengths))

    def update(ranks: int) -> tuple[float, Tensor]:
        total, gradient = 0.0, torch.zeros_like(batch["logprobs"])
        for rank in range(ranks):
            (share,) = update_shares(told, np.empty(0, int), 1, ranks, rank, loss_agg_mode, 6)
            part = {k: v[share.rows] for k, v in batch.items()} | {"weights": torch.from_numpy(share.weights)}
            loss, by_logprobs, _, _ = with_gradients(part, MODES[mode], share.global_tokens)
            total, gradient[share.rows] = total + loss.item(), by_logprobs
        return total, gradient

    (one, by_one), (three, by_three) = update(1), update(3)
    assert three == pytest.approx(one, rel=1e-12, abs=1e-14)
    torch.testing.assert_close(by_three, by_one, rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize("mode", sorted(MODES))
def test_gradients_are_those_of_the_values(mode):
    """gradcheck away from the kinks. In cispo the ratio is a constant: its value's derivative is another one."""
    options = MODES[mode]
    batch = make_batch([4, 1, 0, 3], 5, spread=0.3)
    batch["advantages"] = torch.tensor([1.0, -1.0, 0.5, -0.5], dtype=torch.float64)

    def value(logprobs: Tensor, entropy: Tensor) -> Tensor:
        given: dict[str, Any] = {"logprobs": logprobs, "entropy": entropy}
        if options.loss_mode == "cispo":
            constant = (batch["logprobs"] - batch["old_logprobs"]).clamp(max=math.log(1 + options.ratio_eps_high))
            constant = constant.clamp(min=math.log(1 - options.ratio_eps_low))
            given["old_logprobs"] = logprobs.detach() - constant
            given["rollout_logprobs"] = given["old_logprobs"] - batch["old_logprobs"] + batch["rollout_logprobs"]
        return loss_of(batch, options, **given)[0]

    arguments = tuple(batch[name].clone().requires_grad_() for name in ("logprobs", "entropy"))
    assert torch.autograd.gradcheck(value, arguments, eps=1e-7, atol=1e-6)


@pytest.mark.parametrize("mode", sorted(MODES))
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_masked_may_be_anything(mode, value):
    """Prompt, padding and empty rows; an empty row's advantage and weight as well."""
    options, batch = MODES[mode], make_batch([3, 0, 4], 7)
    spoilt = {k: v.masked_fill(batch["mask"] == 0, value) if k in PER_TOKEN else v.clone() for k, v in batch.items()}
    spoilt["advantages"][1] = spoilt["weights"][1] = value
    for ours, theirs in zip(with_gradients(spoilt, options, 7.0), with_gradients(batch, options, 7.0), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("mode", sorted(MODES))
@pytest.mark.parametrize("distance", [-200.0, 200.0])
def test_huge_ratios_leave_loss_and_gradient_finite_in_float32(mode, distance):
    batch = {k: v.float() for k, v in make_batch([3, 2, 4, 1], 9).items()}
    batch["advantages"] = torch.tensor([1.0, -1.0, 1.0, -1.0])
    for name in ("old_logprobs", "ref_logprobs", "rollout_logprobs"):
        batch[name] = batch["logprobs"] - distance
    loss, by_logprobs, by_entropy, _ = with_gradients(batch, MODES[mode], 10.0)
    assert loss.isfinite() and by_logprobs.isfinite().all() and by_entropy.isfinite().all()


def test_a_batch_of_empty_rows_has_the_loss_0():
    batch = make_batch([1, 1], 1)
    batch["mask"] = torch.zeros_like(batch["mask"])
    for options in MODES.values():
        loss, by_logprobs, _, sums = with_gradients(batch, options, 5.0)
        assert loss == 0 and not by_logprobs.any() and not any(sums.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_mode": "grpo"}, "loss_mode 'grpo' is unknown; known: vanilla, gspo, cispo"),
        ({"kl_penalty_type": "k4"}, "kl_penalty_type 'k4' is unknown; known: k1, k2, k3"),
        ({"ratio_eps_low": 1.1}, r"ratio_eps_low=1.1: must be in \[0, 1\]"),
        ({"ratio_clip_c": 1.0}, "ratio_clip_c=1.0: must be above 1"),
        ({"ratio_clip_c": 3.0, "loss_mode": "cispo"}, "ratio_clip_c=3.0: cispo knows no dual clip"),
        ({"importance_sampling_cap": 0.0}, "importance_sampling_cap=0.0: must be above 0"),
        ({"entropy_bonus": math.nan}, "entropy_bonus=nan: must not be negative"),
    ],
)
def test_options_without_meaning_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LossOptions(**options)


@pytest.mark.parametrize("missing", ["kl_penalty", "entropy_bonus", "importance_sampling_cap"])
def test_an_option_whose_input_is_missing_says_so(missing):
    batch = make_batch([2])
    source = {"kl_penalty": "ref_logprobs", "entropy_bonus": "entropy", "importance_sampling_cap": "rollout_logprobs"}
    with pytest.raises(ValueError, match=f"{missing} is set, but there are no {source[missing]}"):
        loss_of(batch, LossOptions(**{missing: 1.0}), **{source[missing]: None})


def test_an_entropy_without_gradient_is_refused():
    batch = make_batch([2])
    with pytest.raises(ValueError, match="entropy_bonus is set, but the entropy carries no gradient"):
        loss_of(batch, LossOptions(entropy_bonus=0.1), logprobs=batch["logprobs"].requires_grad_())

"""The options of the loss through the Megatron actor: what they report, and that no layout changes them."""

from __future__ import annotations

import numpy as np
import pytest

from tests.distributed.launch import run_ranks
from tests.distributed.tiny import make_actor, share_of, write_model

OPTIONS = {
    "gspo": {"loss_mode": "gspo", "ratio_eps_low": 0.05, "ratio_eps_high": 0.08, "ratio_clip_c": 1.1},
    "cispo": {"loss_mode": "cispo", "ratio_eps_low": 1.0, "importance_sampling_cap": 1.05},
    "vanilla": {"ratio_clip_c": 1.2, "importance_sampling_cap": 1.05},
    "entropy": {"entropy_bonus": 0.3},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("model"))
    write_model(path)
    return path


def _train(path: str, tensor: int, pipeline: int, micro: int, options: dict, **trainer) -> list[dict[str, float]]:
    model = {"micro_batch_size": micro, "grpo": options}
    actor = make_actor(path, tensor, pipeline, trainer={"grpo": trainer}, model=model)
    steps = []
    for seed in range(2):
        batch = share_of(actor, seed)
        policy = actor.compute_logprobs(batch)
        if policy is not None:  # as if policy and generator had moved apart: exercises every bound
            place = np.arange(policy.shape[1], dtype=np.float32)
            batch.old_logprobs = policy + 0.3 * np.sin(place)
            batch.rollout_logprobs = (batch.old_logprobs - 0.2 * np.cos(place)) * batch.loss_mask
        batch.ref_logprobs = actor.compute_logprobs(batch, reference=True)
        steps.append(actor.train_step(batch))
    return steps


@pytest.mark.parametrize("name", OPTIONS)
def test_no_layout_and_no_micro_batch_size_changes_a_loss(model, name):
    options, kl = OPTIONS[name], {"kl_penalty_type": "k2"}
    (alone,) = run_ranks(lambda: _train(model, 1, 1, 4, options, **kl), 1)
    for tensor, pipeline, world, micro in ((1, 1, 2, 2), (2, 2, 8, 1)):  # DP = 2 in both
        for steps in run_ranks(lambda: _train(model, tensor, pipeline, micro, options, **kl), world):  # noqa: B023
            for ours, theirs in zip(steps, alone, strict=True):
                assert ours.keys() == theirs.keys()
                for key in ours:
                    assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-5), key
    first = alone[0]
    assert 0 < first["actor/pg_clipfrac"] < 1
    assert ("actor/pg_clipfrac_lower" in first) == ("ratio_clip_c" in options)
    if "entropy_bonus" in options:
        terms = first["actor/pg_loss"] + 0.1 * first["actor/kl_loss"] - 0.3 * first["actor/entropy"]
        assert first["actor/loss"] == pytest.approx(terms)
        (without,) = run_ranks(lambda: _train(model, 1, 1, 4, {}, **kl), 1)
        assert alone[1]["actor/entropy"] > without[1]["actor/entropy"]  # one update has raised it
    if "importance_sampling_cap" in options:
        assert 0 < first["rollout_corr/rollout_is_ratio_fraction_high"] < 1
        assert 0.8 < first["rollout_corr/rollout_is_mean"] < 1.05


def test_a_kl_in_the_reward_is_not_in_the_loss(model):
    """But its reference is kept."""
    (steps,) = run_ranks(lambda: _train(model, 1, 1, 4, {}, kl_in_reward=True), 1)
    for metrics in steps:
        assert "actor/kl_loss" not in metrics
        assert metrics["actor/loss"] == metrics["actor/pg_loss"]

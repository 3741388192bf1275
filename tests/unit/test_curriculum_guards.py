"""The curriculum's metrics, audits and alarms, and rewards that are missing."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dump.types import Draw, Outcomes
from tests.unit.curricula import EVERYTHING, answer, full, make, run


def test_metrics_say_what_the_step_was_drawn_with():
    curriculum = make()
    run(curriculum, 1)
    draw = curriculum.draw(1)
    results = answer(draw)
    curriculum.observe(results)
    metrics = curriculum.metrics()
    for k, source in enumerate(curriculum.sources):
        assert metrics[f"curriculum/{source}/weight"] == draw.weights[k]
        assert metrics[f"curriculum/{source}/n_prompts"] == np.sum(draw.source_ids == k)
        assert metrics[f"curriculum/{source}/n_rollouts"] == 4 * np.sum(draw.source_ids == k)
        parts = metrics[f"curriculum/{source}/mean_abs_adv"] + metrics[f"curriculum/{source}/bonus"]
        assert metrics[f"curriculum/{source}/ucb"] == parts
        assert 0 < metrics[f"curriculum/{source}/pass_rate"] < 1
        groups = [results.rewards[results.group_ids == g] for g in np.flatnonzero(draw.source_ids == k)]
        if groups:
            assert metrics[f"curriculum/{source}/frac_zero_std"] == np.mean([np.std(g) == 0 for g in groups])
    assert not np.array_equal(curriculum.weights, draw.weights)
    assert "curriculum/a/ucb" not in make("uniform").metrics()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(2, 6), st.integers(1, 4))
def test_audits_reach_every_source_in_every_window(seed, every, prompts):
    """Even if the policy wants one source only."""
    blocks = {"audit": {"every": every, "prompts": prompts}}
    rows = [f"s{k}" for k in range(4) for _ in range(50)]
    weights = {"s0": 1, "s1": 0, "s2": 0, "s3": 0}
    curriculum = make("static", rows=rows, seed=seed, blocks=blocks, weights=weights)
    draws = run(curriculum, 3 * every)
    for window in range(3):
        drawn = np.concatenate([d.source_ids for d in draws[window * every : (window + 1) * every]])
        counts = np.bincount(drawn, minlength=4)
        assert counts[1:].tolist() == [prompts] * 3  # the minimum, and no more than that is taken away


def test_an_audit_that_cannot_be_is_refused():
    blocks = {"audit": {"every": 2, "prompts": 6}}
    with pytest.raises(ValueError, match=r"audit\.every: 2 steps of 8 prompts cannot hold 6 of each of 3 sources; set"):
        make(blocks=blocks)


def test_the_alarm_tells_a_broken_verifier_from_a_hard_source():
    """Both score 0 for ever and look alike to a bandit; only unreadable answers mean that something is broken."""
    curriculum = make("uniform", n_prompts=24, blocks={"alarm": {"after": 40}})
    a, b = 0, 1  # a: nothing can be read; b: hard but read; c: fine

    def broken(draw: Draw) -> Outcomes:
        results = answer(draw)
        hopeless = (results.source_ids == a) | (results.source_ids == b)
        rewards = np.where(hopeless, 0.0, results.rewards)
        return dataclasses.replace(results, rewards=rewards, correct=rewards > 0, well_formed=results.source_ids != a)

    run(curriculum, 4, broken)
    assert list(curriculum.alarms()) == ["a"]
    assert "verifier or prompt format broken?" in curriculum.alarms()["a"]
    assert [curriculum.metrics()[f"curriculum/{s}/alarm"] for s in "abc"] == [1, 0, 0]
    assert curriculum.metrics()["curriculum/a/format_failure"] == 1
    run(curriculum, 1)  # repaired
    assert curriculum.alarms() == {}


def test_the_alarm_looks_at_the_latest_rollouts_and_ends_with_the_fault():
    """A source with a long readable past breaks, and is repaired: both are noticed within some `after` rollouts."""
    curriculum = make("uniform", rows=["x"] * 40, blocks={"alarm": {"after": 64}})
    readable, nothing = np.ones(32, bool), np.zeros(32)
    run(curriculum, 20, lambda draw: answer(draw, nothing, well_formed=readable))  # hard: never right
    assert curriculum.alarms() == {}
    run(curriculum, 3, lambda draw: answer(draw, nothing, well_formed=~readable))
    assert list(curriculum.alarms()) == ["x"]
    lucky = np.arange(32) == 5  # 3 % right, the rest unreadable: no reason to calm down
    run(curriculum, 5, lambda draw: answer(draw, lucky, well_formed=lucky))
    assert list(curriculum.alarms()) == ["x"]
    run(curriculum, 3, lambda draw: answer(draw, nothing, well_formed=readable))
    assert curriculum.alarms() == {}


def test_rewards_that_are_missing_count_as_unreadable():
    curriculum = make("uniform", rows=["x"] * 40)
    run(curriculum, 3, lambda draw: answer(draw, np.full(32, np.nan)))
    assert list(curriculum.alarms()) == ["x"]


def test_an_alarm_about_cut_answers_names_the_length_limit():
    curriculum = make("uniform", blocks={"alarm": {"after": 8}})
    zeros = np.zeros(32)
    run(curriculum, 2, lambda draw: answer(draw, zeros, well_formed=zeros > 0, finished=zeros > 0))
    assert "max_length too small?" in next(iter(curriculum.alarms().values()))


@pytest.mark.parametrize(("sources", "prompts", "budget"), EVERYTHING)
def test_missing_rewards_teach_nothing_and_are_counted(sources, prompts, budget):
    """NaN and infinite rewards: the draws that follow are finite, and the count names the source."""

    def damaged(draw: Draw) -> Outcomes:
        results = answer(draw)
        rewards = np.where(results.samples == 0, np.nan, np.where(results.samples == 1, np.inf, results.rewards))
        rewards = np.where(results.source_ids == 0, np.nan, rewards)
        clean = answer(draw, rewards)
        return dataclasses.replace(clean, correct=results.correct)

    curriculum = full(sources, prompts, budget)
    for draw in run(curriculum, 5, damaged):
        assert np.all(np.isfinite(draw.weights)) and abs(draw.weights.sum() - 1) < 1e-12
    metrics = curriculum.metrics()
    assert all(np.isfinite(v) for v in metrics.values())
    for source in "abc":
        if metrics[f"curriculum/{source}/n_rollouts"]:
            assert metrics[f"curriculum/{source}/n_dropped"] > 0

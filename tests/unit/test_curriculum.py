"""The curriculum: Algorithm 1 of DUMP by hand, and the promises about draws and state."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dump.curriculum import Curriculum, streams
from megatron_dump.curriculum.estimators import LearnabilityEstimator, PassRateEstimator
from megatron_dump.curriculum.prompts import Epoch
from megatron_dump.curriculum.sources import make_source_policy
from megatron_dump.types import Draw, Outcomes

REPO = Path(__file__).resolve().parents[2]
ROWS = ["b"] * 50 + ["a"] * 20 + ["c"] * 30


def config(name="dump_ucb", **options):
    return {"sources": {"name": name, **options}, "prompts": {"name": "epoch"}, "budget": {"name": "fixed"}}


def make(name="dump_ucb", rows=ROWS, prompts=8, group=4, seed=7, fingerprint="data", **options) -> Curriculum:
    return Curriculum(rows, prompts, group, seed, config(name, **options), fingerprint)


def outcomes(step, source_ids, advantages, rewards=None, group_ids=None) -> Outcomes:
    n = len(source_ids)
    rewards = np.zeros(n) if rewards is None else np.asarray(rewards, float)
    return Outcomes(
        step=step,
        group_ids=np.arange(n) if group_ids is None else group_ids,
        source_ids=np.asarray(source_ids, np.int64),
        rewards=rewards,
        advantages=np.asarray(advantages, float),
        correct=rewards > 0,
        well_formed=np.ones(n, bool),
        lengths=np.ones(n, np.int64),
        finished=np.ones(n, bool),
    )


def answer(draw: Draw) -> Outcomes:
    """Made-up results of a draw: a function of (row, sample) only."""
    group_ids = np.repeat(np.arange(len(draw.prompt_ids)), draw.rollouts)
    samples = np.concatenate([np.arange(n) for n in draw.rollouts])
    noise = np.sin(draw.prompt_ids[group_ids] * 12.9898 + samples * 78.233 + draw.step)
    return outcomes(draw.step, draw.source_ids[group_ids], noise, noise > 0.3, group_ids)


def run(curriculum: Curriculum, steps: int) -> list[Draw]:
    draws = []
    for step in range(curriculum.step, curriculum.step + steps):
        draws.append(curriculum.draw(step))
        curriculum.observe(answer(draws[-1]))
    return draws


def assert_same(left: list[Draw], right: list[Draw]) -> None:
    for a, b in zip(left, right, strict=True):
        for field in ("prompt_ids", "source_ids", "rollouts", "weights"):
            assert np.array_equal(getattr(a, field), getattr(b, field))


# ------------------------------------------------------------------------------------------------ DUMP, Algorithm 1
def softmax(values, temperature):
    top = max(values)
    scaled = [math.exp((v - top) / temperature) for v in values]
    return [s / sum(scaled) for s in scaled]


def test_dump_ucb_follows_algorithm_1_by_hand():
    """Three sources, three steps, a window of 4: the same numbers from plain Python arithmetic."""
    policy = make_source_policy({"name": "dump_ucb", "window": 4}, [5, 5, 5])
    np.testing.assert_allclose(policy.weights(0), [1 / 3] * 3, atol=1e-15)

    policy.observe(outcomes(0, [0, 0, 1, 1], [1.0, -1.0, 0.5, -0.5]))
    # n = (2, 2, 0), L = (1, .5, 0)
    ucb = [
        1.0 + math.sqrt(2 * math.log(5) / 3),
        0.5 + math.sqrt(2 * math.log(5) / 3),
        0.0 + math.sqrt(2 * math.log(5) / 1),
    ]
    np.testing.assert_allclose(policy.metrics()["ucb"], ucb, atol=1e-12)
    np.testing.assert_allclose(policy.weights(1), softmax(ucb, 0.1), atol=1e-12)

    policy.observe(outcomes(1, [2, 2, 2, 0], [0.25, -0.75, 1.25, 0.0]))
    # n = (3, 2, 3), L = (2/3, .5, .75)
    ucb = [
        2 / 3 + math.sqrt(2 * math.log(9) / 4),
        0.5 + math.sqrt(2 * math.log(9) / 3),
        0.75 + math.sqrt(2 * math.log(9) / 4),
    ]
    np.testing.assert_allclose(policy.weights(2), softmax(ucb, 0.1), atol=1e-12)

    policy.observe(outcomes(2, [0, 0, 1, 1], [0.5, -0.5, 0.0, 0.1]))
    # the window of source 0 is (-1), 0, .5, -.5: its first value has left; n = (5, 4, 3)
    ucb = [
        (1.0 + 0.0 + 0.5 + 0.5) / 4 + math.sqrt(2 * math.log(13) / 6),
        (0.5 + 0.5 + 0.0 + 0.1) / 4 + math.sqrt(2 * math.log(13) / 5),
        0.75 + math.sqrt(2 * math.log(13) / 4),
    ]
    np.testing.assert_allclose(policy.weights(3), softmax(ucb, 0.1), atol=1e-12)


def test_constants_of_the_paper_are_the_defaults_and_floor_mixes_in_uniform():
    plain, floored = (make_source_policy({"name": "dump_ucb", **o}, [5, 5]) for o in ({}, {"floor": 0.2}))
    explicit = make_source_policy({"name": "dump_ucb", "window": 300, "exploration": 1.0, "temperature": 0.1}, [5, 5])
    for policy in (plain, floored, explicit):
        policy.observe(outcomes(0, [0] * 400 + [1] * 400, [2.0] * 100 + [1.0] * 300 + [0.0] * 400))
    np.testing.assert_allclose(plain.metrics()["mean_abs_adv"], [1.0, 0.0], atol=1e-12)
    assert np.array_equal(plain.weights(1), explicit.weights(1))
    np.testing.assert_allclose(floored.weights(1), 0.8 * plain.weights(1) + 0.1, atol=1e-15)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.floats(allow_nan=True, allow_infinity=True)), max_size=40))
def test_weights_are_finite_and_sum_to_one_whatever_the_advantages(rollouts):
    policy = make_source_policy({"name": "dump_ucb"}, [5] * 4)
    if rollouts:
        policy.observe(outcomes(0, [s for s, _ in rollouts], [a for _, a in rollouts]))
    weights = policy.weights(1)
    assert np.all(np.isfinite(weights)) and np.all(weights >= 0) and abs(weights.sum() - 1) < 1e-12


def test_non_finite_advantages_are_kept_out_and_counted():
    estimator = LearnabilityEstimator(2)
    estimator.observe(np.array([0, 0, 0, 1]), np.array([np.nan, np.inf, -0.5, np.nan]))
    assert estimator.mean().tolist() == [0.5, 0.0]
    assert estimator.n_dropped.tolist() == [2, 1] and estimator.n_rollouts.tolist() == [3, 1]


def test_the_mean_of_huge_advantages_is_finite():
    estimator = LearnabilityEstimator(1)
    estimator.observe(np.zeros(4, np.int64), np.full(4, 1e308))
    assert estimator.mean().tolist() == [1e308]


def test_pass_rate_is_a_discounted_beta_posterior():
    estimator = PassRateEstimator(2, discount=0.5)
    estimator.observe(np.array([0, 0, 0]), np.array([True, True, False]))
    assert estimator.mean().tolist() == [3 / 5, 0.5]  # Beta(1+2, 1+1), and the prior
    estimator.observe(np.array([0]), np.array([True]))
    assert estimator.mean()[0] == (0.5 * 3 + 0.5 + 1) / (0.5 * 5 + 1 + 1)


# ----------------------------------------------------------------------------------------------------------- drawing
def test_sources_are_sorted_and_a_draw_fits_its_description():
    curriculum = make()
    assert curriculum.sources == ["a", "b", "c"]
    for draw in run(curriculum, 5):
        assert [ROWS[i] for i in draw.prompt_ids] == [curriculum.sources[k] for k in draw.source_ids]
        assert draw.rollouts.tolist() == [4] * 8 and abs(draw.weights.sum() - 1) < 1e-12
        assert len(set(draw.prompt_ids)) == 8


def test_slots_are_independent_draws_from_the_weights():
    weights = np.array([0.1, 0.6, 0.0, 0.3])
    drawn = np.concatenate([streams.categorical(weights, 100, 3, "slots", step) for step in range(200)])
    shares = np.bincount(drawn, minlength=4) / drawn.size
    standard_error = np.sqrt(weights * (1 - weights) / drawn.size)
    assert np.all(np.abs(shares - weights) <= 4 * standard_error)


@settings(max_examples=80, deadline=None)
@given(size=st.integers(1, 12), quotas=st.lists(st.integers(1, 15), min_size=1, max_size=12), seed=st.integers(0, 99))
def test_prompts_come_without_replacement(size, quotas, seed):
    """Every epoch is a permutation, and a step repeats a row only when its quota is larger than the source."""
    policy = Epoch(["x"], [np.arange(100, 100 + size)], seed)
    steps = [policy.draw(np.zeros(q, np.int64)) for q in quotas]
    everything = np.concatenate(steps)
    for start in range(0, len(everything) - size + 1, size):
        assert sorted(everything[start : start + size]) == list(range(100, 100 + size))
    for rows in steps:
        counts = np.bincount(rows - 100, minlength=size)
        assert counts.max() - counts.min() <= 1


@settings(max_examples=60, deadline=None)
@given(size=st.integers(2, 12), quotas=st.lists(st.integers(1, 15), min_size=2, max_size=12), data=st.data())
def test_prompts_continue_from_saved_state(size, quotas, data):
    whole, first, second = (Epoch(["x"], [np.arange(size)], 0) for _ in range(3))
    expected = [whole.draw(np.zeros(q, np.int64)).tolist() for q in quotas]
    cut = data.draw(st.integers(1, len(quotas) - 1))
    for quota in quotas[:cut]:
        first.draw(np.zeros(quota, np.int64))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert [second.draw(np.zeros(q, np.int64)).tolist() for q in quotas[cut:]] == expected[cut:]


def test_sources_and_epochs_have_orders_of_their_own():
    policy = Epoch(["w", "x"], [np.arange(30), np.arange(30)], 1)
    orders = [policy.draw(np.full(30, k)).tolist() for k in (0, 0, 1, 1)]
    assert len(set(map(tuple, orders))) == 4
    for name in ("uniform", "proportional"):
        curriculum = make(name, prompts=100)
        assert len({tuple(draw.source_ids) for draw in run(curriculum, 3)}) == 3


def test_the_order_inside_a_source_does_not_depend_on_the_others():
    alone, together = Epoch(["x"], [np.arange(30)], 1), Epoch(["w", "x"], [np.arange(50), np.arange(30)], 1)
    together.draw(np.zeros(17, np.int64))
    assert np.array_equal(alone.draw(np.zeros(20, np.int64)), together.draw(np.ones(20, np.int64)))


def test_proportional_is_a_pooled_shuffle():
    curriculum = make("proportional", prompts=20)
    epochs = [np.concatenate([d.prompt_ids for d in run(curriculum, 5)]) for _ in range(2)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(100))
    assert not np.array_equal(*epochs)
    np.testing.assert_allclose(curriculum.weights, [0.2, 0.5, 0.3])
    overlapping = np.concatenate([d.prompt_ids for d in run(make("proportional", prompts=30), 10)])
    assert np.bincount(overlapping).tolist() == [3] * 100


def test_uniform_ignores_sizes():
    curriculum = make("uniform", rows=["a"] * 1000 + ["b"], prompts=200)
    assert 70 < np.sum(curriculum.draw(0).source_ids == 1) < 130


def test_draws_do_not_depend_on_the_hash_seed():
    script = (
        "from tests.unit.test_curriculum import *\n"
        "c = make(rows=[f'source {i % 9}' for i in range(90)])\n"
        "print(c.sources, [d.prompt_ids.tolist() for d in run(c, 3)], c.digest())"
    )

    def output(hash_seed: str) -> str:
        env = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(REPO)}
        return subprocess.check_output([sys.executable, "-c", script], env=env, text=True)

    assert output("1") == output("2")


# ------------------------------------------------------------------------------------------ order of calls, and state
def test_stale_and_disordered_calls_are_refused():
    curriculum = make()
    with pytest.raises(RuntimeError, match=r"draw\(1\) out of order: the next step of this curriculum is 0"):
        curriculum.draw(1)
    draw = curriculum.draw(0)
    with pytest.raises(RuntimeError, match=r"draw\(1\) before the outcomes of step 0 were observed"):
        curriculum.draw(1)
    with pytest.raises(RuntimeError, match="would lose its outcomes"):
        curriculum.state_dict()
    with pytest.raises(RuntimeError, match="outcomes of step 3, but the draw that is out is of step 0"):
        curriculum.observe(outcomes(3, [0], [1.0]))
    with pytest.raises(ValueError, match="are not those of its draw"):
        curriculum.observe(outcomes(0, [(draw.source_ids[0] + 1) % 3], [1.0]))
    curriculum.observe(answer(draw))


def test_validation_cannot_reach_the_estimator():
    """Outcomes count only for the draw that is out, once: whatever else is scored has no way in."""
    curriculum = make()
    draw = run(curriculum, 1)[0]
    before = curriculum.digest()
    with pytest.raises(RuntimeError, match="no draw is out"):
        curriculum.observe(answer(draw))
    assert curriculum.digest() == before


@pytest.mark.parametrize("name", ["uniform", "proportional", "dump_ucb"])
def test_a_resumed_run_draws_the_same(name):
    """Seven rows of `a`, eight prompts a step: the state is saved in the middle of epochs and past their borders."""
    rows = ["a"] * 7 + ["b"] * 11 + ["c"] * 90
    whole, first, second = (make(name, rows=rows) for _ in range(3))
    expected = run(whole, 12)
    run(first, 5)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.digest() == first.digest()
    assert_same(run(second, 7), expected[5:])
    assert second.digest() == whole.digest() and second.metrics() == whole.metrics()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"fingerprint": "other"}, "curriculum fingerprint differs: the checkpoint has 'data', this run 'other'"),
        (
            {"rows": ["a", "z"]},
            r"curriculum sources differs: the checkpoint has \['a', 'b', 'c'\], this run \['a', 'z'\]",
        ),
        ({"name": "uniform"}, "curriculum source_policy differs: .*dump_ucb.*uniform"),
        ({"temperature": 0.2}, "curriculum source_policy differs: .*'temperature': 0.1.*'temperature': 0.2"),
        ({"seed": 8}, "curriculum seed differs: the checkpoint has 7, this run 8"),
    ],
)
def test_a_resume_that_would_differ_is_refused(changed, message):
    curriculum = make()
    run(curriculum, 1)
    with pytest.raises(ValueError, match=message):
        make(**changed).load_state_dict(curriculum.state_dict())


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


# ---------------------------------------------------------------------------------------------------- configuration
@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"name": "dump"}, r"curriculum\.sources\.name: 'dump' is unknown; known: dump_ucb, proportional, uniform"),
        ({"name": "dump_ucb", "windw": 3}, r"sources\.windw: no such option \(value 3\); options of dump_ucb: expl"),
        ({"name": "uniform", "floor": 0.1}, r"sources\.floor: no such option .* options of uniform: none"),
        ({"name": "dump_ucb", "temperature": 0}, r"sources\.temperature: 0 must be a number >= 1e-06"),
        ({"name": "dump_ucb", "floor": 1.5}, r"sources\.floor: 1.5 must be a number in \[0, 1\]"),
        ({"name": "dump_ucb", "window": 2.5}, r"sources\.window: 2.5 must be an integer >= 1"),
        ({"name": "dump_ucb", "exploration": math.nan}, r"sources\.exploration: nan must be a number"),
    ],
)
def test_configuration_errors_name_key_value_and_remedy(block, message):
    with pytest.raises(ValueError, match=message) as error:
        make_source_policy(block, [1, 1])
    assert "\n" not in str(error.value)


def test_missing_blocks_and_empty_data_are_refused():
    with pytest.raises(ValueError, match=r"trainer\.grpo\.curriculum\.budget: None must be a block with a name"):
        Curriculum(ROWS, 8, 4, 0, {"sources": {"name": "uniform"}, "prompts": {"name": "epoch"}}, "data")
    with pytest.raises(ValueError, match="the data set has no rows"):
        make(rows=[])
    with pytest.raises(ValueError, match="samples_per_prompt: 0 must be at least 1"):
        make(group=0)

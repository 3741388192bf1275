"""The simulated learner against plain arithmetic, and what its histories promise."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dump.curriculum.simulator import (
    SCENARIOS,
    History,
    Learner,
    Scenario,
    group_advantages,
    samples_to_target,
    sigmoid,
    simulate,
)
from megatron_dump.types import Draw, Outcomes

WORLD = Scenario(
    "world",
    "",
    names=("a", "b", "c", "d"),
    sizes=(20, 30, 10, 40),
    difficulties=(-1.0, 0.0, 0.5, 1.0),
    transfer=0.25,
    learning_rate=2.0,
    prompts_per_step=8,
    samples_per_prompt=4,
    steps=6,
)
STARTS = (0, 20, 50, 60)


def world(**changes) -> Scenario:
    return dataclasses.replace(WORLD, **changes)


def draw(rows, sizes: Any = 4, step=0, first=0, scenario=WORLD) -> Draw:
    rows = np.asarray(rows, np.int64)
    sources = np.repeat(np.arange(len(scenario.sizes)), scenario.sizes)[rows]
    rollouts = np.broadcast_to(np.asarray(sizes, np.int64), rows.shape).copy()
    uniform = np.full(len(scenario.sizes), 1 / len(scenario.sizes))
    return Draw(step, rows, sources, rollouts, uniform, first_group=first)


def judged(outcomes: Outcomes, rewards) -> Outcomes:
    """The same rollouts with other rewards."""
    rewards = np.asarray(rewards, np.float64)
    _, index = np.unique(outcomes.group_ids, return_inverse=True)
    return dataclasses.replace(
        outcomes, rewards=rewards, correct=rewards > 0, advantages=group_advantages(rewards, index)
    )


def lesson(scenario: Scenario, outcomes: Outcomes) -> np.ndarray:
    """[K]: what one update adds to the skills of a fresh learner."""
    learner = Learner(scenario, 0)
    learner.train(outcomes)
    return learner.skill


def column(outcomes: Outcomes, group: int) -> list[float]:
    return outcomes.rewards[outcomes.group_ids == group].tolist()


def test_sigmoid():
    x = np.array([-1e6, -30.0, -1.5, 0.0, 2.0, 1e6])
    with np.errstate(all="raise"):
        ours = sigmoid(x)
    expected = [0.0, 1 / (1 + math.exp(30)), 1 / (1 + math.exp(1.5)), 0.5, 1 / (1 + math.exp(-2)), 1.0]
    assert np.allclose(ours, expected, rtol=1e-9, atol=1e-15)


@given(st.lists(st.lists(st.sampled_from([0.0, 1.0, -0.5, 3.0]), min_size=1, max_size=9), min_size=1, max_size=6))
@settings(deadline=None)
def test_group_advantages_are_those_of_plain_python(groups):
    rewards = np.array([r for group in groups for r in group])
    index = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    expected = []
    for group in groups:
        mean = math.fsum(group) / len(group)
        deviation = statistics.stdev(group) if len(group) > 1 else 0.0
        expected += [(r - mean) / (deviation + 1e-6) for r in group]
    assert np.allclose(group_advantages(rewards, index), expected, atol=1e-9)


def test_a_group_of_one_has_advantage_zero():
    assert group_advantages(np.ones(2), np.array([0, 1])).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("reward", [0.0, 1.0])
def test_groups_all_alike_teach_nothing(reward):
    outcomes = Learner(WORLD, 0).roll_out(draw(np.arange(100)))
    assert not lesson(WORLD, judged(outcomes, np.full(400, reward))).any()


def test_a_group_teaches_by_how_it_came_out():
    outcomes = Learner(WORLD, 0).roll_out(draw([25], sizes=8))
    for right in range(9):
        got = lesson(world(transfer=0.0), judged(outcomes, np.arange(8) < right))
        expected = 2.0 * 8 * math.sqrt(right / 8 * (1 - right / 8) * 7 / 8) / 32  # a full batch is 8 x 4 rollouts
        assert got == pytest.approx([0, expected, 0, 0], abs=1e-6)


def test_training_is_the_policy_gradient():
    """The change of skill is the derivative of sum A log P(answer), by central differences."""
    scenario = world(transfer=0.0)
    learner = Learner(scenario, 3)
    outcomes = learner.roll_out(draw([1, 2, 25, 26, 55, 70, 71, 99], sizes=[4, 2, 8, 3, 5, 4, 6, 2]))

    def objective(skill: np.ndarray) -> float:
        learner.skill = skill
        p = learner.pass_rates(outcomes.prompt_ids)
        return float(np.sum(outcomes.advantages * np.log(np.where(outcomes.correct, p, 1 - p))))

    gradient = [(objective(step) - objective(-step)) / 2e-5 for step in 1e-5 * np.eye(4)]
    assert any(gradient)
    assert lesson(scenario, outcomes) == pytest.approx(2.0 / 32 * np.array(gradient), abs=1e-6)


def test_a_noisy_verifier_teaches_the_mean_gradient_over_what_the_answers_may_have_been():
    scenario = world(transfer=0.0, noise=0.2)
    learner = Learner(scenario, 0)
    p = float(learner.pass_rates(np.array([61]))[0])  # of source d; the learner of `lesson` has the same seed
    outcomes = judged(learner.roll_out(draw([61], sizes=3)), [1, 0, 1])
    total = norm = 0.0
    for answers in itertools.product([0, 1], repeat=3):
        verdicts = [0.8 if answer == reward else 0.2 for answer, reward in zip(answers, (1, 0, 1), strict=True)]
        probability = math.prod(p if a else 1 - p for a in answers) * math.prod(verdicts)
        total += probability * sum(a * (y - p) for a, y in zip(outcomes.advantages, answers, strict=True))
        norm += probability
    assert lesson(scenario, outcomes)[3] == pytest.approx(2.0 / 32 * total / norm, abs=1e-9)


def test_transfer_reaches_the_neighbours_alone():
    outcomes = Learner(WORLD, 0).roll_out(draw([25, 26], sizes=8))
    outcomes = judged(outcomes, [1, 0] * 8)
    a, b, c, d = lesson(WORLD, outcomes)
    assert b > 0 and d == 0
    assert a == c == pytest.approx(0.25 * b)
    edge = judged(Learner(WORLD, 0).roll_out(draw([5])), [1, 0, 0, 0])
    assert lesson(WORLD, edge)[2:].tolist() == [0, 0]  # neighbours do not wrap around


def test_rejected_groups_and_unjudged_rollouts_teach_nothing():
    outcomes = judged(Learner(WORLD, 0).roll_out(draw([25, 70])), [1, 0, 0, 0, 1, 0, 0, 0])
    a, b, c, d = lesson(WORLD, dataclasses.replace(outcomes, kept=outcomes.group_ids == 1))
    assert (a, b) == (0, 0) and c > 0 and d > 0
    advantages = np.where(outcomes.group_ids == 1, np.nan, outcomes.advantages)
    assert np.isfinite(lesson(WORLD, dataclasses.replace(outcomes, advantages=advantages))).all()


def test_a_rollout_is_a_function_of_seed_step_group_and_sample():
    rows = [1, 25, 55, 70]
    base = Learner(WORLD, 0).roll_out(draw(rows, sizes=20))
    again = Learner(WORLD, 0).roll_out(draw(rows, sizes=20))
    for field in dataclasses.fields(Outcomes):
        assert np.array_equal(getattr(base, field.name), getattr(again, field.name)), field.name
    ragged = Learner(WORLD, 0).roll_out(draw(rows, sizes=[7, 20, 40, 3]))
    for group, size in enumerate([7, 20, 20, 3]):
        assert column(ragged, group)[:size] == column(base, group)[:size]
    later = Learner(WORLD, 0).roll_out(draw(rows[2:], sizes=20, first=2))  # as a refill would come
    assert later.group_ids.tolist() == [2] * 20 + [3] * 20
    assert column(later, 2) == column(base, 2) and column(later, 3) == column(base, 3)
    for other in (Learner(WORLD, 1).roll_out(draw(rows, 20)), Learner(WORLD, 0).roll_out(draw(rows, 20, step=1))):
        assert other.rewards.tolist() != base.rewards.tolist()


def test_outcomes_are_whole_groups_in_global_order():
    outcomes = Learner(WORLD, 0).roll_out(draw([1, 25, 55], sizes=[2, 3, 1], step=4, first=5))
    assert outcomes.step == 4
    assert outcomes.group_ids.tolist() == [5, 5, 6, 6, 6, 7]
    assert outcomes.samples.tolist() == [0, 1, 0, 1, 2, 0]
    assert outcomes.prompt_ids.tolist() == [1, 1, 25, 25, 25, 55]
    assert outcomes.source_ids.tolist() == [0, 0, 1, 1, 1, 2]
    assert outcomes.kept.all() and outcomes.finished.all() and not outcomes.ages.any()


def test_rewards_come_as_often_as_the_pass_rate_says():
    learner = Learner(WORLD, 0)
    for row, noise in ((3, 0.0), (70, 0.0), (70, 0.3)):
        learner = Learner(world(noise=noise), 0)
        p = float(learner.pass_rates(np.array([row]))[0])
        expected = p * (1 - noise) + (1 - p) * noise
        rewards = learner.roll_out(draw([row] * 500, sizes=20)).rewards
        assert abs(rewards.mean() - expected) < 5 * math.sqrt(expected * (1 - expected) / 10_000)


def test_true_pass_rate_is_the_mean_over_rows():
    learner = Learner(WORLD, 5)
    learner.skill = np.array([0.3, -2.0, 5.0, 0.0])
    for k, (start, size) in enumerate(zip(STARTS, WORLD.sizes, strict=True)):
        rates = [float(learner.pass_rates(np.array([row]))[0]) for row in range(start, start + size)]
        assert learner.true_pass_rate()[k] == pytest.approx(math.fsum(rates) / size)
    assert learner.source_of_rows == ["a"] * 20 + ["b"] * 30 + ["c"] * 10 + ["d"] * 40


def test_without_spread_all_prompts_of_a_source_are_alike():
    learner = Learner(world(spread=0.0), 0)
    assert learner.true_pass_rate() == pytest.approx([1 / (1 + math.exp(d)) for d in WORLD.difficulties])


def test_a_broken_verifier_hides_a_skill_that_is_there():
    scenario = world(broken=("b",))
    learner = Learner(scenario, 0)
    outcomes = learner.roll_out(draw(np.arange(100)))
    of_b = outcomes.source_ids == 1
    assert not outcomes.rewards[of_b].any() and not outcomes.correct[of_b].any() and not outcomes.advantages[of_b].any()
    assert not outcomes.well_formed[of_b].any() and outcomes.well_formed[~of_b].all()
    before = learner.true_pass_rate()
    assert before[1] > 0.3 and np.array_equal(before, Learner(WORLD, 0).true_pass_rate())
    learner.train(outcomes)
    assert learner.true_pass_rate()[1] > before[1]  # by transfer alone
    assert lesson(world(broken=("b",), transfer=0.0), outcomes)[1] == 0
    assert scenario.counted.tolist() == [True, False, True, True]


def test_no_skill_solves_the_unsolvable():
    learner = Learner(world(unsolvable=("c",), noise=0.1), 0)
    learner.skill[:] = 50.0
    assert learner.true_pass_rate() == pytest.approx([1, 1, 0, 1])
    outcomes = learner.roll_out(draw(np.arange(50, 60), sizes=40))
    assert 0 < outcomes.rewards.mean() < 0.3  # the verifier's mistakes
    learner.skill[:] = 0.0
    learner.train(outcomes)
    assert not learner.skill.any()  # and nothing to learn from them


def test_a_late_bloomer_needs_its_neighbour():
    scenario = SCENARIOS["late_bloomer"]
    start = sum(scenario.sizes[:-1])
    learner = Learner(scenario, 0)
    assert learner.true_pass_rate()[-1] < 0.02
    prompts = draw(np.arange(start - 300, start), sizes=16, scenario=scenario)
    for _ in range(40):
        learner.train(learner.roll_out(prompts))
    assert learner.true_pass_rate()[-1] > 0.3


@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=SCENARIOS)
def test_every_scenario_starts_below_its_target(scenario):
    before = Learner(scenario, 0).true_pass_rate()
    assert before[scenario.counted].mean() < scenario.target - 0.05
    assert 2 <= len(scenario.names) <= 1000 and scenario.about and scenario.counted.any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"names": ("b", "a", "c", "d")}, "names must be sorted"),
        ({"sizes": (1, 2)}, "sizes must have one entry"),
        ({"broken": ("z",)}, "'z' in broken or unsolvable is none of its sources"),
    ],
)
def test_a_wrong_scenario_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        world(**changes)


def test_samples_to_target_counts_every_rollout():
    rates = np.array([[0.1, 0.9, 0.2], [0.3, 0.9, 0.4], [0.5, 0.9, 0.6], [0.4, 0.9, 0.5]])
    scenario = dataclasses.replace(
        WORLD, names=("a", "b", "c"), sizes=(1, 1, 1), difficulties=(0.0,) * 3, broken=("b",), target=0.5
    )
    drawn = np.full((3, 3), 4)
    history = History(scenario, np.full((3, 3), 1 / 3), drawn, rates, np.array([10, 30, 12]))
    assert samples_to_target(history, 0.15) == 0  # true at the start
    assert samples_to_target(history, 0.35) == 10
    assert samples_to_target(history) == 40
    assert samples_to_target(history, 0.56) == math.inf


def test_a_thousand_sources_cost_little():
    scenario = SCENARIOS["thousand"]
    learner = Learner(scenario, 0)
    prompts = draw(np.arange(0, 60_000, 60)[np.arange(1024) % 1000], sizes=16, scenario=scenario)
    learner.train(learner.roll_out(prompts))
    took = []
    for _ in range(5):
        start = time.perf_counter()
        learner.train(learner.roll_out(prompts))
        took.append(time.perf_counter() - start)
    assert min(took) < 0.03


def config(sources="uniform", **blocks) -> dict:
    return {"sources": {"name": sources}, "prompts": {"name": "epoch"}, "budget": {"name": "fixed"}, **blocks}


def test_simulate_spends_the_budget_and_no_more():
    history = simulate(config(), WORLD, 0)
    assert history.weights.shape == history.draws.shape == (6, 4) and history.pass_rates.shape == (7, 4)
    assert np.array_equal(history.rollouts, [32] * 6) and np.array_equal(history.draws.sum(axis=1), [32] * 6)
    assert np.allclose(history.weights, 0.25)
    assert history.success()[-1] > history.success()[0]
    assert len(simulate(config(), WORLD, 0, steps=2).rollouts) == 2


def test_simulate_is_deterministic():
    for name in ("dump_ucb", "sec"):
        first, second, other = (simulate(config(name), WORLD, seed) for seed in (0, 0, 1))
        for field in ("weights", "draws", "pass_rates", "rollouts"):
            assert np.array_equal(getattr(first, field), getattr(second, field))
        assert not np.array_equal(first.draws, other.draws)


def test_refills_are_paid_for():
    easy = world(difficulties=(-3.0, -3.0, -3.0, -3.0), steps=8)
    plain = simulate(config(), easy, 0)
    refilled = simulate(config(filter={"name": "zero_variance", "max_refills": 2}), easy, 0)
    assert refilled.rollouts.max() > 32 and len(refilled.rollouts) < len(plain.rollouts)
    assert refilled.rollouts[:-1].sum() < 8 * 32 <= refilled.rollouts.sum()


def test_pre_rollouts_are_paid_for_and_not_trained_on():
    prompts = {"name": "cures", "subsets": 2, "steps_per_subset": 3, "pre_rollouts": 4}
    history = simulate(config(prompts=prompts, pass_rates={"discount": 1.0, "prior": "flat"}), WORLD, 0, steps=12)
    assert history.rollouts[0] > 32 and history.rollouts[1] == 32
    assert history.rollouts[0] - 32 + history.rollouts[3] - 32 == 4 * sum(WORLD.sizes)
    assert np.abs(np.diff(history.pass_rates[:2], axis=0)).max() < 0.3  # one update, however many pre-rollouts

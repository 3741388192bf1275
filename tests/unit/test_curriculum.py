"""The curriculum as a whole: draws, rounds, feedback, state and resume."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dump.curriculum import Curriculum, streams
from megatron_dump.types import Draw, Outcomes
from tests.unit.curricula import ROWS, answer, assert_same, config, make, outcomes, run

REPO = Path(__file__).resolve().parents[2]
SCHEDULED = {"static": {"weights": {"a": 1, "b": 2, "c": 3}}}
SOURCES = ("uniform", "proportional", "static", "easy_to_hard", "sec", "dump_ucb", "dump_ucb_robust")
PROMPTS = (
    "epoch", "cures", "thompson", {"name": "cures", "subsets": 2, "steps_per_subset": 2, "pre_rollouts": 3},
)  # fmt: skip
BUDGETS = ("fixed", "neyman", "knapsack")
EVERYTHING = [
    *(({"name": name, **SCHEDULED.get(name, {})}, "epoch", "fixed") for name in SOURCES),
    *(({"name": "dump_ucb_robust"}, prompts, budget) for prompts in PROMPTS for budget in BUDGETS),
]


def full(sources, prompts, budget, rows=ROWS, **options):
    blocks = {"filter": {"name": "zero_variance", "max_refills": 2}, "audit": {"every": 4, "prompts": 3}}
    return make(rows=rows, prompts=prompts, budget=budget, blocks=blocks, **sources, **options)


def rejecting(draw: Draw) -> Outcomes:
    """A third of the rows are always right, a third never."""
    return answer(draw, lambda rows, samples: np.where(rows % 3 == 0, 1, np.where(rows % 3 == 1, 0, samples % 2)))


# ----------------------------------------------------------------------------------------------------------- drawing
def test_sources_are_sorted_and_a_draw_fits_its_description():
    curriculum = make()
    assert curriculum.sources == ["a", "b", "c"]
    for draw in run(curriculum, 5):
        assert [ROWS[i] for i in draw.prompt_ids] == [curriculum.sources[k] for k in draw.source_ids]
        assert draw.rollouts.tolist() == [4] * 8 and abs(draw.weights.sum() - 1) < 1e-12
        assert len(set(draw.prompt_ids)) == 8


@pytest.mark.parametrize(("sources", "prompts", "budget"), EVERYTHING)
def test_every_policy_keeps_the_promises_of_a_draw(sources, prompts, budget):
    """Rows of the sources drawn, no row twice in a step, exact totals, group ids that run on, weights that sum to 1."""
    curriculum, seen = full(sources, prompts, budget), {}
    for draw in run(curriculum, 6, rejecting):
        assert [ROWS[i] for i in draw.prompt_ids] == [curriculum.sources[k] for k in draw.source_ids]
        assert abs(draw.weights.sum() - 1) < 1e-12 and np.all(draw.weights >= 0)
        seen.setdefault(draw.step, []).append(draw)
    assert sorted(seen) == list(range(6))
    for rounds in seen.values():
        groups = np.concatenate([d.group_ids for d in rounds])
        assert groups.tolist() == list(range(len(groups)))
        training = [d for d in rounds if d.train]
        assert len(training[0].prompt_ids) == 8 and training[0].rollouts.sum() == 32
        assert training[0].rollouts.min() >= 2
        rows = np.concatenate([d.prompt_ids for d in training])
        assert len(set(rows.tolist())) == len(rows)


@pytest.mark.parametrize(("sources", "prompts", "budget"), EVERYTHING)
def test_a_resumed_run_draws_the_same(sources, prompts, budget):
    """Seven rows of `a`, eight prompts a step: the state is saved in the middle of epochs and past their borders."""
    rows = ["a"] * 7 + ["b"] * 11 + ["c"] * 90
    whole, first, second = (full(sources, prompts, budget, rows=rows) for _ in range(3))
    drawn = run(whole, 9, rejecting)
    run(first, 4, rejecting)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.digest() == first.digest()
    assert_same(run(second, 5, rejecting), [d for d in drawn if d.step >= 4])
    assert second.digest() == whole.digest() and second.metrics() == whole.metrics()


def test_proportional_and_epoch_are_a_pooled_shuffle():
    curriculum = make("proportional", n_prompts=20)
    epochs = [np.concatenate([d.prompt_ids for d in run(curriculum, 5)]) for _ in range(2)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(100))
    assert not np.array_equal(*epochs)
    np.testing.assert_allclose(curriculum.weights, [0.2, 0.5, 0.3])
    overlapping = np.concatenate([d.prompt_ids for d in run(make("proportional", n_prompts=30), 10)])
    assert np.bincount(overlapping).tolist() == [3] * 100


def test_slots_are_independent_draws_from_the_weights():
    weights = np.array([0.1, 0.6, 0.0, 0.3])
    drawn = np.concatenate([streams.categorical(weights, 100, 3, "slots", step) for step in range(200)])
    shares = np.bincount(drawn, minlength=4) / drawn.size
    standard_error = np.sqrt(weights * (1 - weights) / drawn.size)
    assert np.all(np.abs(shares - weights) <= 4 * standard_error)


def test_uniform_ignores_sizes():
    curriculum = make("uniform", rows=["a"] * 1000 + ["b"], n_prompts=200)
    assert 70 < np.sum(curriculum.draw(0).source_ids == 1) < 130


@pytest.mark.parametrize("prompts", ["epoch", "cures", "thompson"])
def test_draws_do_not_depend_on_the_hash_seed(prompts):
    script = (
        "from tests.unit.curricula import *\n"
        f"c = make('dump_ucb_robust', rows=[f'source {{i % 9}}' for i in range(90)], prompts={prompts!r},"
        " budget='neyman')\n"
        "print(c.sources, [d.prompt_ids.tolist() for d in run(c, 3)], c.digest())"
    )

    def output(hash_seed: str) -> str:
        env = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(REPO)}
        return subprocess.check_output([sys.executable, "-c", script], env=env, text=True)

    assert output("1") == output("2")


# ------------------------------------------------------------------------------------------------- filter and refills
def test_refills_keep_the_mixture_and_the_number_of_rollouts():
    """MT-GRPO's ratio-preserving refill: a rejected group is replaced in its own source."""
    curriculum = full({"name": "uniform"}, "epoch", "neyman", n_prompts=12)
    draw = curriculum.draw(0)
    results = rejecting(draw)
    rejected = curriculum.filter.rejected(results)
    # row % 3 decides: always right, never right, or half and half
    assert rejected.tolist() == np.flatnonzero(draw.prompt_ids % 3 != 2).tolist()
    refill = curriculum.refill(0, rejected)
    assert np.array_equal(np.sort(refill.source_ids), np.sort(draw.source_ids[rejected]))
    assert refill.rollouts.sum() == draw.rollouts[rejected].sum() and refill.first_group == 12
    assert not set(refill.prompt_ids) & set(draw.prompt_ids)
    again = curriculum.refill(0, 12 + np.arange(len(rejected)))
    assert again.first_group == 12 + len(rejected)
    assert curriculum.refill(0, again.group_ids) is None  # max_refills: 2
    for part in (results, rejecting(refill), rejecting(again)):
        curriculum.observe(part)
    metrics = curriculum.metrics()
    observed = sum(metrics[f"curriculum/{s}/n_rollouts"] for s in "abc")
    assert observed == 48 + 2 * draw.rollouts[rejected].sum()  # rejected groups teach the estimators too
    assert sum(metrics[f"curriculum/{s}/n_refilled"] for s in "abc") == 2 * len(rejected)


def test_a_source_without_other_rows_is_not_refilled():
    curriculum = full({"name": "uniform"}, "epoch", "fixed", rows=["a"] * 5 + ["b"] * 40)
    draw = curriculum.draw(0)
    refill = curriculum.refill(0, draw.group_ids)
    n_a = int(np.sum(draw.source_ids == 0))
    assert np.sum(refill.source_ids == 0) == min(n_a, max(0, 5 - n_a)) and np.sum(refill.source_ids == 1) == 8 - n_a


def test_a_refill_stays_in_the_subset_and_repeats_no_prompt():
    prompts = {"name": "cures", "subsets": 2}
    curriculum = make(
        "uniform", rows=["x"] * 20, n_prompts=8, prompts=prompts, blocks={"filter": {"name": "zero_variance"}}
    )
    draw = curriculum.draw(0)
    refill = curriculum.refill(0, draw.group_ids)
    assert len(refill.prompt_ids) == 2  # ten rows in the subset, eight of them drawn
    assert not set(refill.prompt_ids) & set(draw.prompt_ids)
    assert curriculum.refill(0, refill.group_ids) is None


def test_without_a_filter_nothing_is_rejected():
    curriculum = make()
    draw = curriculum.draw(0)
    results = answer(draw, 0 * np.ones(32))
    assert curriculum.filter.rejected(results).size == 0 and curriculum.refill(0, draw.group_ids) is None


@given(st.lists(st.lists(st.sampled_from([0.0, 1.0, -3.0, np.nan, np.inf]), min_size=1, max_size=5), min_size=1))
def test_the_filter_rejects_exactly_the_groups_whose_finite_rewards_are_alike(groups):
    ids = np.repeat(np.arange(len(groups)), [len(g) for g in groups])
    rewards = np.concatenate(groups)
    results = outcomes(0, np.zeros(len(ids), int), rewards, rewards, ids)
    chosen = full({"name": "uniform"}, "epoch", "fixed").filter.rejected(results).tolist()
    assert chosen == [i for i, g in enumerate(groups) if len({r for r in g if np.isfinite(r)}) < 2]


def test_neyman_takes_measured_gradient_norms_where_the_actor_has_them():
    with pytest.raises(ValueError, match=r"budget\.form: 'gradient' needs an actor that measures gradient norms"):
        make(budget={"name": "neyman", "form": "gradient"})
    block = config("uniform", budget={"name": "neyman", "form": "gradient"})
    curriculum = Curriculum(ROWS, 8, 4, 7, block, "data", gradient_sigma=lambda rows: 1.0 + (rows % 2))
    draw = curriculum.draw(0)
    odd = draw.prompt_ids % 2 == 1
    assert draw.rollouts.sum() == 32 and draw.rollouts[odd].min() > draw.rollouts[~odd].max()


# --------------------------------------------------------------------------------------------- CurES's pre-rollouts
def test_pre_rollouts_come_before_their_step_and_do_not_train():
    """CurES's Algorithm 1 on one source: N' = 4 for every prompt of a subset, then M = 3 steps on that subset."""
    prompts = {"name": "cures", "subsets": 2, "steps_per_subset": 3, "pre_rollouts": 4}
    blocks = {"pass_rates": {"discount": 1.0, "prior": "flat"}}
    curriculum = make("uniform", rows=["x"] * 40, prompts=prompts, budget="neyman", blocks=blocks)
    drawn = run(curriculum, 12)
    for iteration in range(4):
        steps = range(3 * iteration, 3 * iteration + 3)
        rounds = [d for d in drawn if d.step in steps]
        before = [d for d in rounds if not d.train]
        assert {d.step for d in before} == {steps[0]} and rounds[: len(before)] == before
        subset = np.concatenate([d.prompt_ids for d in before])
        assert len(subset) == len(set(subset)) == 20
        assert all(set(d.rollouts) == {4} for d in before)
        assert all(set(d.prompt_ids) <= set(subset) and d.rollouts.sum() == 32 for d in rounds if d.train)
    halves = [{*np.concatenate([d.prompt_ids for d in drawn if d.step == s and not d.train])} for s in (0, 3, 6, 9)]
    assert halves[0] == halves[2] and halves[1] == halves[3] and not halves[0] & halves[1]


@pytest.mark.parametrize("staleness", [0, 2])
def test_a_step_with_pre_rollouts_out_cannot_go_on(staleness):
    curriculum = make(prompts={"name": "cures", "subsets": 1, "pre_rollouts": 2}, staleness=staleness)
    draw = curriculum.draw(0)
    assert not draw.train
    with pytest.raises(RuntimeError, match=r"draw\(0\) before the outcomes of step 0 were observed"):
        curriculum.draw(0)
    with pytest.raises(RuntimeError, match="no training round of it is out"):
        curriculum.refill(0, np.array([0]))


# ------------------------------------------------------------------------------------------ order of calls, and state
def test_stale_and_disordered_calls_are_refused():
    curriculum = make()
    with pytest.raises(RuntimeError, match=r"draw\(1\) out of order: the next step of this curriculum is 0"):
        curriculum.draw(1)
    draw = curriculum.draw(0)
    with pytest.raises(RuntimeError, match=r"draw\(1\) before the outcomes of step 0 were observed"):
        curriculum.draw(1)
    good = answer(draw)
    with pytest.raises(RuntimeError, match="outcomes of step 3, but the draw that is out is of step 0"):
        curriculum.observe(dataclasses.replace(good, step=3))
    for field in ("source_ids", "prompt_ids"):
        with pytest.raises(ValueError, match=f"{field} of the outcomes of step 0 are not those of its draw"):
            curriculum.observe(dataclasses.replace(good, **{field: getattr(good, field) + 1}))
    with pytest.raises(ValueError, match="a sample of a group of step 0 comes twice"):
        curriculum.observe(dataclasses.replace(good, samples=0 * good.samples))
    with pytest.raises(ValueError, match="ages of the outcomes of step 0 are below 0"):
        curriculum.observe(dataclasses.replace(good, ages=good.ages - 1))
    with pytest.raises(ValueError, match=r"group_ids of step 0 are not all in 0\.\.7"):
        curriculum.observe(dataclasses.replace(good, group_ids=good.group_ids + 1))
    curriculum.observe(good)


def test_asynchronous_outcomes_come_in_any_order_and_in_parts():
    curriculum = make("dump_ucb_robust", staleness=2)
    draws = [curriculum.draw(step) for step in range(3)]
    with pytest.raises(RuntimeError, match=r"draw\(3\) before the outcomes of step 0"):
        curriculum.draw(3)
    first = answer(draws[0])
    early = first.group_ids < 5
    half, rest = (
        Outcomes(**{f.name: getattr(first, f.name) if f.name == "step" else getattr(first, f.name)[mask]
                    for f in dataclasses.fields(first)})
        for mask in (early, ~early)
    )  # fmt: skip
    curriculum.observe(answer(draws[1]))
    curriculum.observe(half)
    with pytest.raises(ValueError, match="group 0 of step 0 was observed already"):
        curriculum.observe(first)
    assert [d.step for d in curriculum.outstanding()] == [0, 2]
    resumed = make("dump_ucb_robust", staleness=2)
    resumed.load_state_dict(json.loads(json.dumps(curriculum.state_dict())))
    assert_same(resumed.outstanding(), curriculum.outstanding())  # nothing that is out is lost
    for one in (curriculum, resumed):
        one.observe(rest)
        one.observe(answer(draws[2]))
        assert one.outstanding() == []
    assert resumed.digest() == curriculum.digest()
    assert_same(run(resumed, 3), run(curriculum, 3))


@pytest.mark.parametrize("name", ["dump_ucb", "dump_ucb_robust"])
def test_answers_that_take_long_do_not_fill_the_window(name):
    """A window smaller than the step holds the same whether the long groups come with the others or after them."""
    apart, together = (make(name, rows=["x"] * 40, window=16) for _ in range(2))
    for one in (apart, together):
        draw = one.draw(0)
    results = answer(draw)
    for long in (False, True):
        of_part = (results.group_ids % 3 == 0) == long
        columns = {f.name: getattr(results, f.name)[of_part] for f in dataclasses.fields(results) if f.name != "step"}
        apart.observe(Outcomes(step=0, **columns))
    together.observe(results)
    key = "mean_abs_adv" if name == "dump_ucb" else "learnability"
    assert apart._source_policy.metrics()[key] == pytest.approx(together._source_policy.metrics()[key], rel=0.05)
    assert name != "dump_ucb" or np.array_equal(apart.weights, together.weights)


def test_incomplete_groups_are_refused():
    curriculum = make()
    results = answer(curriculum.draw(0))
    some = {f.name: getattr(results, f.name)[:-1] for f in dataclasses.fields(results) if f.name != "step"}
    with pytest.raises(
        ValueError, match="group 7 of step 0 has 3 rollouts, its draw asked for 4: outcomes come in whole"
    ):
        curriculum.observe(Outcomes(step=0, **some))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"fingerprint": "other"}, "curriculum fingerprint differs: the checkpoint has 'data', this run 'other'"),
        (
            {"rows": ["a", "z"]},
            r"curriculum source names differs: the checkpoint has \['a', 'b', 'c'\], this run \['a', 'z'\]",
        ),
        ({"name": "uniform"}, "curriculum sources differs: .*dump_ucb.*uniform"),
        ({"temperature": 0.2}, "curriculum sources differs: .*'temperature': 0.1.*'temperature': 0.2"),
        ({"prompts": "cures"}, "curriculum prompts differs: .*epoch.*cures"),
        ({"seed": 8}, "curriculum seed differs: the checkpoint has 7, this run 8"),
    ],
)
def test_a_resume_that_would_differ_is_refused(changed, message):
    curriculum = make()
    run(curriculum, 1)
    with pytest.raises(ValueError, match=message) as error:
        make(**changed).load_state_dict(curriculum.state_dict())
    assert "trainer.grpo.curriculum.resume_changed=allow" in str(error.value)


def test_numbers_as_source_names_and_another_alarm_are_no_change():
    rows, weights = ["3"] * 20 + ["14"] * 20, {3: 1.0, 14: 2.0}
    before = make("static", rows=rows, weights=weights)
    run(before, 2)
    after = make("static", rows=rows, weights=weights, blocks={"alarm": {"after": 8}})
    assert after.load_state_dict(json.loads(json.dumps(before.state_dict()))) == []
    with pytest.raises(ValueError, match="curriculum has version 1, this program's 2: they cannot be mixed"):
        after.load_state_dict({**before.state_dict(), "version": 1}, allow_changes=True)


def test_an_allowed_change_keeps_what_fits_by_name_and_says_what_it_reset():
    before = make(prompts="cures")
    run(before, 6)
    rows = ["b"] * 50 + ["new"] * 10 + ["c"] * 30  # a is gone, new has come
    after = make(prompts="cures", rows=rows, fingerprint="other")
    notes = after.load_state_dict(before.state_dict(), allow_changes=True)
    assert after.step == 6 and after.sources == ["b", "c", "new"]
    old, new = before._source_policy.metrics(), after._source_policy.metrics()
    assert new["mean_abs_adv"][:2].tolist() == old["mean_abs_adv"][1:].tolist() and new["mean_abs_adv"][2] == 0
    assert notes == [
        "curriculum source names was ['a', 'b', 'c'], is ['b', 'c', 'new']",
        "curriculum fingerprint was 'data', is 'other'",
        "curriculum prompt_policy starts afresh",
        "curriculum pass_rates starts afresh",
    ]
    run(after, 3)

    other_policy = make("sec", prompts="cures")
    notes = other_policy.load_state_dict(before.state_dict(), allow_changes=True)
    assert any(note.startswith("curriculum source_policy: ") for note in notes)
    probe = np.arange(100)
    assert np.array_equal(other_policy._pass_rates.mean(probe), before._pass_rates.mean(probe))  # same data: kept
    run(other_policy, 3)


def test_the_state_is_small_json():
    rows = [f"source {k}" for k in range(1000) for _ in range(100)]
    curriculum = make(rows=rows, n_prompts=256, group=8, prompts="cures", budget="neyman")
    run(curriculum, 5)
    assert len(json.dumps(curriculum.state_dict())) < 1_000_000


# --------------------------------------------------------------------------------------------- metrics and guards
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


# ---------------------------------------------------------------------------------------------------- configuration
@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ({"filter": {"name": "dapo"}}, r"curriculum\.filter\.name: 'dapo' is unknown; known: none, zero_variance"),
        ({"filter": {"name": "none", "cap": 1}}, r"filter\.cap: no such option \(value 1\); options of none: none"),
        ({"audit": {"evry": 3}}, r"curriculum\.audit\.evry: no such option \(value 3\); options of audit: every, pro"),
        ({"alarm": {"after": 0}}, r"curriculum\.alarm\.after: 0 must be an integer >= 1"),
        ({"alarm": {"format_failure": 2}}, r"curriculum\.alarm\.format_failure: 2 must be a number in \[0, 1\]"),
        ({"pass_rates": {"prior": "none"}}, r"curriculum\.pass_rates\.prior: 'none'"),
        ({"pass_rates": [1]}, r"curriculum\.pass_rates: \[1\] must be a block"),
    ],
)
def test_configuration_errors_name_key_value_and_remedy(blocks, message):
    with pytest.raises(ValueError, match=message) as error:
        make(blocks=blocks)
    assert "\n" not in str(error.value)


def test_missing_blocks_and_empty_data_are_refused():
    with pytest.raises(ValueError, match=r"trainer\.grpo\.curriculum\.budget: None must be a block with a name"):
        Curriculum(ROWS, 8, 4, 0, {k: v for k, v in config().items() if k != "budget"}, "data")
    with pytest.raises(ValueError, match="the data set has no rows"):
        make(rows=[])
    with pytest.raises(ValueError, match="samples_per_prompt: 0 must be at least 1"):
        make(group=0)

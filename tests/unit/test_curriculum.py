"""The curriculum as a whole: draws, refills, pre-rollouts and options."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_dump.curriculum import Curriculum, streams
from tests.unit.curricula import EVERYTHING, ROWS, answer, config, full, make, outcomes, rejecting, run

REPO = Path(__file__).resolve().parents[2]


# -------------------------------------------------------------------------------------------------------------- drawing
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


# --------------------------------------------------------------------------------------------------- filter and refills
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


# ------------------------------------------------------------------------------------------------- CurES's pre-rollouts
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


# -------------------------------------------------------------------------------------------------------- configuration
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

"""The curriculum over time: the order of calls, outcomes in parts, state and resume."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from tests.unit.curricula import EVERYTHING, answer, assert_same, full, make, rejecting, run


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
    half, rest = first.take(early), first.take(~early)
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
        apart.observe(results.take(of_part))
    together.observe(results)
    key = "mean_abs_adv" if name == "dump_ucb" else "learnability"
    assert apart._parts.metrics()[key] == pytest.approx(together._parts.metrics()[key], rel=0.05)
    assert name != "dump_ucb" or np.array_equal(apart.weights, together.weights)


def test_incomplete_groups_are_refused():
    curriculum = make()
    results = answer(curriculum.draw(0))
    with pytest.raises(
        ValueError, match="group 7 of step 0 has 3 rollouts, its draw asked for 4: outcomes come in whole"
    ):
        curriculum.observe(results.take(np.arange(len(results.samples) - 1)))


# ----------------------------------------------------------------------------------------------------- state and resume
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
    old, new = before._parts.metrics(), after._parts.metrics()
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
    kept, saved = (curriculum._parts.pass_rates.mean(probe) for curriculum in (other_policy, before))
    assert np.array_equal(kept, saved)  # same data
    run(other_policy, 3)


def test_the_state_is_small_json():
    rows = [f"source {k}" for k in range(1000) for _ in range(100)]
    curriculum = make(rows=rows, n_prompts=256, group=8, prompts="cures", budget="neyman")
    run(curriculum, 5)
    assert len(json.dumps(curriculum.state_dict())) < 1_000_000

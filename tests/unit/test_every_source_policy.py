"""Promises that every source policy keeps, and feedback that comes late."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dump.curriculum import streams
from megatron_dump.curriculum.sources import SourceSetting
from tests.unit.source_policies import NAMES, POLICIES, SIZES, K, draw, feed, histories, make, outcomes, through_json

every_policy = pytest.mark.parametrize("key", POLICIES)


@every_policy
@settings(max_examples=15, deadline=None)
@given(history=histories)
def test_weights_are_a_distribution_above_the_floor(key, history):
    block, floor = POLICIES[key]
    policy = make(block)
    feed(policy, history)
    for step in (0, 7, 1000):
        weights = policy.weights(step)
        assert weights.shape == (K,) and weights.dtype == np.float64 and np.all(np.isfinite(weights))
        assert abs(weights.sum() - 1) < 1e-12 and np.all(weights >= np.asarray(floor) - 1e-15)


@every_policy
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_absurd_feedback_leaves_finite_weights(key, data):
    """NaN, infinities and the largest numbers, as advantages and as rewards, then ordinary feedback."""
    policy = make(POLICIES[key][0])
    absurd = st.sampled_from([math.nan, math.inf, -math.inf, 1.7976931348623157e308, -1e308, 5e-324, 0.0, 1.0])
    rollouts = st.tuples(st.integers(0, K - 1), absurd, absurd, st.integers(0, 2))
    for step, round_ in enumerate(data.draw(st.lists(st.lists(rollouts, max_size=30), max_size=4))):
        draw(policy, [s for s, _, _, _ in round_], rollouts=10**12)
        columns = list(zip(*round_, strict=True)) or [[], [], [], []]
        policy.observe(outcomes(step, columns[0], columns[1], columns[3], columns[2], ages=step % 3))
        weights = policy.weights(step + 1)
        assert np.all(np.isfinite(weights)) and np.all(weights >= 0) and abs(weights.sum() - 1) < 1e-12
        assert all(np.all(np.isfinite(values)) for values in policy.metrics().values())
    feed(policy, [[(0, [(1.0, 1.0), (-1.0, 0.0)], 0)]], first_step=9)
    assert abs(policy.weights(10).sum() - 1) < 1e-12
    json.dumps({name: array.tolist() for name, array in policy.state_dict().items()}, allow_nan=False)


@every_policy
@settings(max_examples=15, deadline=None)
@given(history=histories, source=st.integers(0, K - 1), data=st.data())
def test_raising_a_sources_advantages_never_lowers_its_weight(key, history, source, data):
    lower, higher = make(POLICIES[key][0]), make(POLICIES[key][0])

    def raised(advantages, sources):
        rise = np.array(data.draw(st.lists(st.floats(0, 5), min_size=len(sources), max_size=len(sources))), float)
        return np.where(sources == source, np.copysign(np.abs(advantages) + rise, advantages), advantages)

    feed(lower, history)
    feed(higher, history, change=raised)
    assert higher.weights(9)[source] >= lower.weights(9)[source] - 1e-12


@every_policy
@settings(max_examples=15, deadline=None)
@given(history=histories, permutation=st.permutations(range(K)))
def test_permuting_source_names_permutes_the_weights(key, history, permutation):
    """Source k is renamed so that it sorts at permutation[k]; all else about it stays."""
    block, _ = POLICIES[key]
    new_name = {name: NAMES[place] for name, place in zip(NAMES, permutation, strict=True)}
    renamed = dict(block)
    if "order" in block:
        renamed["order"] = [new_name[name] for name in block["order"]]
    if "weights" in block:
        renamed["weights"] = {new_name[name]: weight for name, weight in block["weights"].items()}
    place = np.array(permutation)
    sizes = np.empty(K, np.int64)
    sizes[place] = SIZES
    here, there = make(block), make(renamed, SourceSetting(NAMES, tuple(sizes.tolist()), 20))
    feed(here, history)
    feed(there, history, relabel=place)
    for step in (0, 9):
        np.testing.assert_allclose(there.weights(step)[place], here.weights(step), rtol=1e-12, atol=1e-15)


@every_policy
@settings(max_examples=15, deadline=None)
@given(history=histories, cut=st.integers(0, 5))
def test_a_restored_policy_behaves_alike_to_the_last_bit(key, history, cut):
    block, _ = POLICIES[key]
    whole, first, second = make(block), make(block), make(block)
    feed(second, [[(0, [(3.0, 0.5)], 0)]])  # what was there before must not matter
    feed(whole, history)
    feed(first, history[:cut])
    state = first.state_dict()
    assert all(len(array) == K for array in state.values())
    second.load_state_dict(through_json(state))
    assert np.array_equal(second.weights(3), first.weights(3))
    feed(second, history[cut:], first_step=cut)
    for step in (0, 5):
        assert np.array_equal(second.weights(step), whole.weights(step))
        assert np.array_equal(second.slots(step, 13, 9, 1), whole.slots(step, 13, 9, 1))
    for left, right in ((second.metrics(), whole.metrics()), (second.state_dict(), whole.state_dict())):
        assert left.keys() == right.keys() and all(np.array_equal(left[name], right[name]) for name in left)


@every_policy
def test_only_drawing_and_observing_change_the_state(key):
    policy = make(POLICIES[key][0])
    feed(policy, [[(1, [(0.5, 1.0), (-0.5, 0.0)], 0)]])
    before = through_json(policy.state_dict())
    policy.weights(1)[:] = 7
    policy.slots(1, 5, 40, 3)
    for array in (*policy.metrics().values(), *policy.state_dict().values()):
        array[:] = 1
    assert through_json(policy.state_dict()) == before and abs(policy.weights(1).sum() - 1) < 1e-12


@every_policy
def test_slots_are_drawn_from_the_weights(key):
    policy = make(POLICIES[key][0])
    feed(policy, [[(k, [(0.1 * k, 1.0), (-0.1 * k, 0.0)], 0) for k in range(K)]])
    weights = policy.weights(4)
    if key != "proportional":  # which is a permutation
        assert np.array_equal(policy.slots(4, 36, 9, 5), streams.categorical(weights, 9, 5, "slots", 4))
    slots = policy.slots(4, 0, 48 * 200, 5)
    error = np.sqrt(weights * (1 - weights) / slots.size)
    assert slots.dtype == np.int64 and np.all(
        np.abs(np.bincount(slots, minlength=K) / slots.size - weights) <= 4 * error
    )


# -------------------------------------------------------------------------------------------------------- late feedback
@pytest.mark.parametrize("key", ["dump", "dump_floor", "robust_adv"])
@settings(max_examples=40, deadline=None)
@given(history=histories, data=st.data())
def test_rollouts_that_arrive_late_count_as_if_they_had_come_in_time(key, history, data):
    """All steps are drawn; their outcomes come in any order, aged by the steps that came before them."""
    in_time, late = make(POLICIES[key][0]), make(POLICIES[key][0])
    steps = []
    for step, round_ in enumerate(history):
        rows = [(g, s, a) for g, (s, rollouts, _) in enumerate(round_) for a, _ in rollouts]
        steps.append((step, [s for _, s, _ in rows], [a for _, _, a in rows], [g for g, _, _ in rows]))
    for policy in (in_time, late):
        draw(policy, [source for round_ in history for source, _, _ in round_], rollouts=4)
    for step in steps:
        in_time.observe(outcomes(*step))
    latest = -1
    # the first stays first: the discount of counts starts with the first step that is observed
    for i in [0, *data.draw(st.permutations(range(1, len(steps))))] if steps else []:
        latest = max(latest, i)
        late.observe(outcomes(*steps[i], ages=latest - i))
    np.testing.assert_allclose(late.weights(9), in_time.weights(9), rtol=1e-9)


@pytest.mark.parametrize("name", ["dump_ucb", "dump_ucb_robust"])
@pytest.mark.parametrize(("window", "mean"), [(1, 1.0), (2, 1.5)])
def test_ages_count_back_from_the_latest_step_seen(name, window, mean):
    """Groups of two: of steps 0, 3 and then 1 (two steps late) the latest is that of 3, the latest two 1 and 3."""
    robust = name == "dump_ucb_robust"
    options = {"learnability": "advantage", "window": window} if robust else {"window": 2 * window}
    policy = make({"name": name, **options})
    for step, advantage, age in ((0, 7.0, 0), (3, 1.0, 0), (1, 2.0, 2)):
        policy.observe(outcomes(step, [0, 0], [advantage, -advantage], [0, 0], ages=age))
    assert policy.metrics()["learnability" if robust else "mean_abs_adv"][0] == mean


def test_a_source_whose_long_rollouts_are_late_is_not_drawn_again_for_that():
    """Counts come with the draw: the bonus falls before any outcome is there; outcomes change the mean."""
    for name in ("dump_ucb", "dump_ucb_robust"):
        policy = make({"name": name, "learnability": "advantage"} if name.endswith("robust") else {"name": name})
        draw(policy, [0, 1, 2, 3], rollouts=8)
        even = policy.metrics()["bonus"]
        draw(policy, [0, 0, 0], rollouts=8)
        bonus = policy.metrics()["bonus"]
        assert bonus[0] < even[0] and bonus[1] > even[1] and bonus[0] < bonus[1]
        assert policy.weights(1)[0] < policy.weights(1)[1]


def test_a_changed_window_resets_the_window_as_a_whole():
    """What is carried over by name and shape must fit together."""
    policy, other = make({"name": "dump_ucb", "window": 4}), make({"name": "dump_ucb", "window": 2})
    feed(policy, [[(0, [(1.0, 1.0)] * 3, 0)]])
    state, fresh = policy.state_dict(), other.state_dict()
    other.load_state_dict(
        {name: state[name] if state[name].shape == fresh[name].shape else fresh[name] for name in fresh}
    )
    assert other.metrics()["mean_abs_adv"].tolist() == [0.0] * K
    feed(other, [[(0, [(0.5, 1.0)], 0)]], first_step=1)
    assert other.metrics()["mean_abs_adv"].tolist() == [0.5, 0.0, 0.0, 0.0]

"""Source policies and what they estimate: traces by hand, promises about every policy, and feedback that comes late."""

from __future__ import annotations

import bisect
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dump.curriculum import streams
from megatron_dump.curriculum.estimators import LearnabilityEstimator, PassRateEstimator, expected_learnability
from megatron_dump.curriculum.sources import SourceSetting, make_source_policy
from megatron_dump.types import Outcomes

NAMES, SIZES = ("a", "b", "c", "d"), (5, 30, 2, 11)
K = len(NAMES)
SETTING = SourceSetting(NAMES, SIZES, max_steps=20)
IDENTITY = np.arange(K)
WEIGHTS = {"a": 1, "b": 0, "c": 2.5, "d": 0.5}

# Block of the YAML, and the smallest weight that it promises to each source.
POLICIES = {
    "uniform": ({"name": "uniform"}, 1 / K),
    "proportional": ({"name": "proportional"}, np.array(SIZES) / sum(SIZES)),
    "flattened": ({"name": "proportional", "temperature": 3.0}, 0),
    "static": ({"name": "static", "weights": WEIGHTS}, np.array([0.25, 0, 0.625, 0.125])),
    "gaussian": ({"name": "easy_to_hard", "order": ["c", "a", "d", "b"]}, 2 / (K * (K + 1))),
    "cosine": ({"name": "easy_to_hard", "order": ["c", "a", "d", "b"], "kind": "cosine", "p_min": 0.05}, 0.05),
    "sec": ({"name": "sec", "floor": 0.1}, 0.1 / K),
    "sec_last": ({"name": "sec", "alpha": 1.0, "temperature": 1e-6}, 0),
    "dump": ({"name": "dump_ucb"}, 0),
    "dump_floor": ({"name": "dump_ucb", "window": 3, "floor": 0.2}, 0.2 / K),
    "dump_wild": ({"name": "dump_ucb", "window": 2, "exploration": 1e308, "temperature": 1e-6}, 0),
    "robust": ({"name": "dump_ucb_robust", "window": 3}, 0.05 / K),
    "robust_adv": (
        {"name": "dump_ucb_robust", "learnability": "advantage", "base": "proportional"},
        0.05 * np.array(SIZES) / sum(SIZES),
    ),
    "robust_post": ({"name": "dump_ucb_robust", "learnability": "posterior", "epsilon": 0.0, "discount": 0.0}, 0),
}
every_policy = pytest.mark.parametrize("key", POLICIES)


def make(block, setting=SETTING):
    return make_source_policy(block, setting)


def outcomes(step, source_ids, advantages, group_ids=None, rewards=None, correct=None, ages=0) -> Outcomes:
    """Rollouts of one step; every rollout a group of its own unless `group_ids` says otherwise."""
    n = len(source_ids)
    rewards = np.zeros(n) if rewards is None else np.asarray(rewards, float)
    return Outcomes(
        step=step,
        group_ids=np.arange(n) if group_ids is None else np.asarray(group_ids, np.int64),
        samples=np.zeros(n, np.int64),
        prompt_ids=np.zeros(n, np.int64),
        source_ids=np.asarray(source_ids, np.int64),
        rewards=rewards,
        advantages=np.asarray(advantages, float),
        correct=rewards > 0 if correct is None else np.asarray(correct, bool),
        well_formed=np.ones(n, bool),
        lengths=np.ones(n, np.int64),
        finished=np.ones(n, bool),
        kept=np.isfinite(rewards),
        ages=np.broadcast_to(np.asarray(ages, np.int64), n),
    )


def draw(policy, source_ids, rollouts=1):
    policy.drawn(np.asarray(source_ids, np.int64), np.broadcast_to(np.asarray(rollouts, np.int64), len(source_ids)))


def through_json(state):
    return json.loads(json.dumps({name: array.tolist() for name, array in state.items()}))


def softmax(values, temperature):
    top = max(values)
    scaled = [math.exp((v - top) / temperature) for v in values]
    return [s / sum(scaled) for s in scaled]


# ------------------------------------------------------------------------------------------------- traces by hand
def test_dump_ucb_follows_algorithm_1_by_hand():
    """Three sources, three steps, a window of 4: the same numbers from plain Python arithmetic."""
    policy = make({"name": "dump_ucb", "window": 4}, SourceSetting(("a", "b", "c"), (5, 5, 5)))
    np.testing.assert_allclose(policy.weights(0), [1 / 3] * 3, atol=1e-15)

    draw(policy, [0, 1], rollouts=2)
    policy.observe(outcomes(0, [0, 0, 1, 1], [1.0, -1.0, 0.5, -0.5]))
    # n = (2, 2, 0), L = (1, .5, 0)
    ucb = [
        1.0 + math.sqrt(2 * math.log(5) / 3),
        0.5 + math.sqrt(2 * math.log(5) / 3),
        0.0 + math.sqrt(2 * math.log(5) / 1),
    ]
    np.testing.assert_allclose(policy.metrics()["ucb"], ucb, atol=1e-12)
    np.testing.assert_allclose(policy.weights(1), softmax(ucb, 0.1), atol=1e-12)

    draw(policy, [2, 0], rollouts=[3, 1])
    policy.observe(outcomes(1, [2, 2, 2, 0], [0.25, -0.75, 1.25, 0.0]))
    # n = (3, 2, 3), L = (2/3, .5, .75)
    ucb = [
        2 / 3 + math.sqrt(2 * math.log(9) / 4),
        0.5 + math.sqrt(2 * math.log(9) / 3),
        0.75 + math.sqrt(2 * math.log(9) / 4),
    ]
    np.testing.assert_allclose(policy.weights(2), softmax(ucb, 0.1), atol=1e-12)

    draw(policy, [0, 1], rollouts=2)
    policy.observe(outcomes(2, [0, 0, 1, 1], [0.5, -0.5, 0.0, 0.1]))
    # the window of source 0 is (-1), 0, .5, -.5: its first value has left; n = (5, 4, 3)
    ucb = [
        (1.0 + 0.0 + 0.5 + 0.5) / 4 + math.sqrt(2 * math.log(13) / 6),
        (0.5 + 0.5 + 0.0 + 0.1) / 4 + math.sqrt(2 * math.log(13) / 5),
        0.75 + math.sqrt(2 * math.log(13) / 4),
    ]
    np.testing.assert_allclose(policy.weights(3), softmax(ucb, 0.1), atol=1e-12)


def test_constants_of_the_dump_paper_are_the_defaults_and_floor_mixes_in_uniform():
    setting = SourceSetting(("a", "b"), (5, 5))
    plain, floored = (make({"name": "dump_ucb", **o}, setting) for o in ({}, {"floor": 0.2}))
    explicit = make({"name": "dump_ucb", "window": 300, "exploration": 1.0, "temperature": 0.1}, setting)
    for policy in (plain, floored, explicit):
        draw(policy, [0, 1], rollouts=400)
        policy.observe(outcomes(0, [0] * 400 + [1] * 400, [2.0] * 100 + [1.0] * 300 + [0.0] * 400))
    np.testing.assert_allclose(plain.metrics()["mean_abs_adv"], [1.0, 0.0], atol=1e-12)
    assert np.array_equal(plain.weights(1), explicit.weights(1))
    np.testing.assert_allclose(floored.weights(1), 0.8 * plain.weights(1) + 0.1, atol=1e-15)


def test_sec_by_hand():
    policy = make({"name": "sec"}, SourceSetting(("a", "b", "c"), (5, 5, 5)))
    np.testing.assert_allclose(policy.weights(0), [1 / 3] * 3, atol=1e-15)
    policy.observe(outcomes(0, [0, 0, 1], [1.0, -0.5, 0.2]))
    q = [0.5 * 0.75, 0.5 * 0.2, 0.0]
    np.testing.assert_allclose(policy.weights(1), softmax(q, 0.4), atol=1e-12)
    policy.observe(outcomes(1, [1, 2, 2, 2], [-0.6, 0.3, math.nan, -0.1]))
    q = [q[0], 0.5 * 0.6 + 0.5 * q[1], 0.5 * 0.2]
    np.testing.assert_allclose(policy.metrics()["q"], q, atol=1e-12)
    np.testing.assert_allclose(policy.weights(2), softmax(q, 0.4), atol=1e-12)
    assert policy.metrics()["n_dropped"].tolist() == [0, 0, 1]


def test_e2h_gaussian_by_hand():
    """K = 3, a quarter of the way: mu = 0.25^0.5 * 2 = 1; the easiest is `l2`, as 2 is before 10."""
    policy = make({"name": "easy_to_hard", "total_steps": 8}, SourceSetting(("l10", "l2", "l3"), (5, 5, 5)))
    side = math.exp(-1 / (2 * 0.25))
    q = {"l2": side / (1 + 2 * side), "l3": 1 / (1 + 2 * side), "l10": side / (1 + 2 * side)}
    expected = [1 / 6 + (1 - 3 / 6) * q[name] for name in ("l10", "l2", "l3")]
    np.testing.assert_allclose(policy.weights(2), expected, atol=1e-12)
    scaled = [math.exp(-((k - math.sqrt(3 / 8) * 2) ** 2) / 0.5) for k in range(3)]
    expected = [1 / 6 + 0.5 * scaled[k] / sum(scaled) for k in (2, 0, 1)]
    np.testing.assert_allclose(policy.weights(3), expected, atol=1e-12)
    assert np.array_equal(policy.weights(8), policy.weights(1000))
    assert np.argmax(policy.weights(0)) == 1 and np.argmax(policy.weights(8)) == 0


def test_e2h_cosine_by_hand():
    block = {"name": "easy_to_hard", "kind": "cosine", "total_steps": 6}
    setting = SourceSetting(("a", "b", "c", "d"), (5, 5, 5, 5))
    paper = make({**block, "p_min": 0.0}, setting)  # alpha (K - k - 1) + (1 - alpha) k, normalised
    np.testing.assert_allclose(paper.weights(0), [3 / 6, 2 / 6, 1 / 6, 0], atol=1e-12)
    # t / T = 1/3: alpha = (1 + 1/2) / 2 = 3/4
    np.testing.assert_allclose(paper.weights(2), np.array([9, 6 + 1, 3 + 2, 3]) / 4 / 6, atol=1e-12)
    np.testing.assert_allclose(paper.weights(6), [0, 1 / 6, 2 / 6, 3 / 6], atol=1e-12)
    floored = make(block, setting)  # the form of the authors' code: alpha (K - k) + (1 - alpha) (k + 1), normalised
    np.testing.assert_allclose(floored.weights(0), np.array([4, 3, 2, 1]) / 10, atol=1e-12)
    np.testing.assert_allclose(floored.weights(2), np.array([13, 9 + 2, 6 + 3, 3 + 4]) / 4 / 10, atol=1e-12)
    assert make({**block, "p_min": 0.0}, SourceSetting(("a",), (5,))).weights(3).tolist() == [1.0]


def test_dump_ucb_robust_by_hand():
    """Two sources of 1 and 3 rows, a window of two prompts; E[2 sqrt(p (1 - p))] from Gamma functions by hand."""
    options = {"window": 2, "discount": 0.5, "exploration": 0.5, "temperature": 0.2, "epsilon": 0.2}
    policy = make({"name": "dump_ucb_robust", "base": "proportional", **options}, SourceSetting(("a", "b"), (1, 3)))

    def weights(learnability, n):
        bonus = [0.5 * math.sqrt(2 * math.log(sum(n) + 1) / (m + 1)) for m in n]
        p = softmax([x + b for x, b in zip(learnability, bonus, strict=True)], 0.2)
        return [0.8 * p[0] + 0.2 / 4, 0.8 * p[1] + 0.2 * 3 / 4]

    np.testing.assert_allclose(policy.weights(0), weights([0, 0], [0, 0]), atol=1e-12)
    draw(policy, [0, 0, 1], rollouts=2)
    np.testing.assert_allclose(policy.weights(0), weights([0, 0], [2, 1]), atol=1e-12)
    policy.observe(outcomes(0, [0, 0, 0, 0, 1, 1], [1, -1, 0, 0, 0, 0], [0, 0, 1, 1, 2, 2], [1, 0, 1, 1, 0, 0]))
    # Prior Beta(1, 1): one right of two is Beta(2, 2), 9 pi / 32; none or both Beta(1, 3), 15 pi / 64. n halves.
    half, end = 9 * math.pi / 32, 15 * math.pi / 64
    np.testing.assert_allclose(policy.weights(1), weights([(half + end) / 2, end], [1, 0.5]), atol=1e-12)

    draw(policy, [1], rollouts=2)
    policy.observe(outcomes(1, [1, 1], [1, -1], [0, 0], [0, 1]))
    # Source b's pass rate was Beta(1, 3): the prior is Beta(1/2, 3/2), the posterior Beta(3/2, 5/2): 8 / (3 pi)
    second = 8 / (3 * math.pi)
    learnability = [(half + end) / 2, (end + second) / 2]
    np.testing.assert_allclose(policy.weights(2), weights(learnability, [0.5, 0.75]), atol=1e-12)

    draw(policy, [1], rollouts=3)
    policy.observe(outcomes(2, [1, 1, 1], [0.3, -0.6, math.nan], [0, 0, 0], [0.5, 0.1, math.nan]))
    # Graded rewards: from now on mean |A| = 0.45 counts for b; its first prompt leaves the window of two.
    learnability[1] = (second + 0.45) / 2
    np.testing.assert_allclose(policy.weights(3), weights(learnability, [0.25, 0.875]), atol=1e-12)
    assert policy.metrics()["n_dropped"].tolist() == [0, 1]


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 40), data=st.data(), mean=st.floats(0.01, 0.99))
def test_expected_learnability_is_the_integral(size, data, mean):
    """The midpoint rule on p = sin^2(angle), in which the integrand has no pole that matters to the ratio."""
    right = data.draw(st.integers(0, size))
    a, b = right + 2 * mean, size - right + 2 * (1 - mean)
    value = expected_learnability(np.array([right]), np.array([size]), np.array([mean]))[0]
    # E = int 2 s^(2a) c^(2b) / int 2 s^(2a-1) c^(2b-1); by parts the poles of the second go: multiply by a and b.
    angle = (np.arange(200_000) + 0.5) / 200_000 * (math.pi / 2)
    sine, cosine = np.sin(angle), np.cos(angle)
    upper = np.mean(sine ** (2 * a) * cosine ** (2 * b))
    # B(a, b) = B(a + 1, b + 1) (a + b) (a + b + 1) / (a b)
    lower = np.mean(sine ** (2 * a + 1) * cosine ** (2 * b + 1)) * (a + b) * (a + b + 1) / (a * b)
    assert value == pytest.approx(2 * upper / lower, rel=1e-5)
    assert 0 < value < 1


def test_expected_learnability_by_hand():
    values = expected_learnability(np.array([0, 0, 1]), np.array([0, 1, 1]), np.array([0.5, 0.5, 0.5]))
    np.testing.assert_allclose(values, [math.pi / 4] * 3, atol=1e-12)  # Beta(1, 1), Beta(1, 2) and Beta(2, 1)
    assert expected_learnability(np.array([8]), np.array([16]), np.array([0.5]))[0] < 1
    many = expected_learnability(np.array([9000]), np.array([100_000]), np.array([0.5]))[0]
    assert many == pytest.approx(2 * math.sqrt(0.09 * 0.91), rel=1e-3)  # the prior is forgotten


# --------------------------------------------------------------------------------------------------- every policy
groups = st.lists(
    st.tuples(
        st.integers(0, K - 1),
        st.lists(st.tuples(st.floats(-4, 4), st.sampled_from([0.0, 1.0, 0.5])), min_size=1, max_size=4),
        st.integers(0, 3),
    ),
    max_size=6,
)
histories = st.lists(groups, max_size=5)


def feed(policy, history, first_step=0, change=lambda advantages, sources: advantages, relabel=IDENTITY):
    """Draw and observe: step by step, what a history of (source, [(advantage, reward)], age) groups says."""
    for step, round_ in enumerate(history, first_step):
        draw(policy, relabel[[source for source, _, _ in round_]] if round_ else [], [len(r) for _, r, _ in round_])
        sizes = [len(rollouts) for _, rollouts, _ in round_]
        sources = np.repeat(np.array([source for source, _, _ in round_], np.int64), sizes)
        advantages = np.array([a for _, rollouts, _ in round_ for a, _ in rollouts], float)
        rewards = np.array([r for _, rollouts, _ in round_ for _, r in rollouts], float)
        ages = np.repeat(np.array([age for _, _, age in round_], np.int64), sizes)
        group_ids = np.repeat(np.arange(len(round_)), sizes)
        advantages = change(advantages, sources)
        policy.observe(outcomes(step, relabel[sources], advantages, group_ids, rewards, ages=ages))


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


# --------------------------------------------------------------------------------------------- the sliding window
class PlainWindow:
    """The reference: a sorted list per source; ties stay in the order of arrival."""

    def __init__(self, n_sources, window):
        self.window, self.entries = window, [[] for _ in range(n_sources)]

    def observe(self, source_ids, values, ages, now):
        for source, value, age in zip(source_ids, values, ages, strict=True):
            if math.isfinite(value):
                bisect.insort_right(self.entries[source], (now - age, abs(value)), key=lambda entry: entry[0])
                del self.entries[source][: -self.window]

    def held(self, source):
        return [value for _, value in self.entries[source]]


arrivals = st.lists(
    st.tuples(
        st.lists(
            st.tuples(st.integers(0, 2), st.floats(allow_nan=True, allow_infinity=True), st.integers(0, 3)), max_size=9
        ),
        st.integers(0, 4),
    ),
    max_size=8,
)


@settings(max_examples=200, deadline=None)
@given(window=st.integers(1, 6), calls=arrivals, restore=st.integers(0, 8))
def test_the_window_is_that_of_a_plain_list(window, calls, restore):
    estimator, plain, dropped = LearnabilityEstimator(3, window), PlainWindow(3, window), [0, 0, 0]
    for i, (rollouts, now) in enumerate(calls):
        if i == restore:
            state, estimator = through_json(estimator.state_dict()), LearnabilityEstimator(3, window)
            estimator.load_state_dict(state)
        sources, values, ages = (list(c) for c in zip(*rollouts, strict=True)) if rollouts else ([], [], [])
        estimator.observe(np.array(sources, np.int64), np.array(values), np.array(ages, np.int64), now)
        plain.observe(sources, values, ages, now)
        for source, value in zip(sources, values, strict=True):
            dropped[source] += not math.isfinite(value)
        for source in range(3):
            held = plain.held(source)
            assert estimator.held(source).tolist() == held
            mean = math.fsum(v / len(held) for v in held) if held else 0.0
            assert estimator.mean()[source] == pytest.approx(mean, rel=1e-12)
    assert estimator.n_dropped.tolist() == dropped


def test_the_window_is_that_of_a_plain_list_at_size():
    """Every path at once, and calls that bring more values than a window holds: 400 sources, then one."""
    rng = np.random.Generator(np.random.Philox(3))
    for n_sources, window in ((400, 20), (1, 50)):
        estimator, plain = LearnabilityEstimator(n_sources, window), PlainWindow(n_sources, window)
        for step in range(6):
            sources, values = rng.integers(0, n_sources, 4000), rng.standard_normal(4000)
            ages = rng.integers(0, 3, 4000) if step in (2, 4) else np.zeros(4000, np.int64)
            estimator.observe(sources, values, ages, step)
            plain.observe(sources.tolist(), values.tolist(), ages.tolist(), step)
            assert all(estimator.held(k).tolist() == plain.held(k) for k in range(n_sources))


@settings(max_examples=100, deadline=None)
@given(
    window=st.integers(1, 8),
    steps=st.lists(st.lists(st.tuples(st.integers(0, 2), st.floats(-5, 5)), max_size=6), min_size=1, max_size=6),
    data=st.data(),
)
def test_late_values_end_up_as_if_they_had_come_in_time(window, steps, data):
    """Each step's values come whole, in any order of the steps, with the age that they have by then."""
    in_time, late = LearnabilityEstimator(3, window), LearnabilityEstimator(3, window)
    columns = [(np.array([s for s, _ in step], np.int64), np.array([v for _, v in step])) for step in steps]
    for now, (sources, values) in enumerate(columns):
        in_time.observe(sources, values, None, now)
    latest = -1
    for step in data.draw(st.permutations(range(len(steps)))):
        latest = max(latest, step)
        late.observe(*columns[step], np.full(len(steps[step]), latest - step), latest)
    for source in range(3):
        assert late.held(source).tolist() == in_time.held(source).tolist()
    np.testing.assert_allclose(late.mean(), in_time.mean(), rtol=1e-12)


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


def test_non_finite_advantages_are_kept_out_and_counted():
    estimator = LearnabilityEstimator(2)
    estimator.observe(np.array([0, 0, 0, 1]), np.array([np.nan, np.inf, -0.5, np.nan]))
    assert estimator.mean().tolist() == [0.5, 0.0] and estimator.n_dropped.tolist() == [2, 1]


def test_the_mean_of_huge_advantages_is_finite():
    estimator = LearnabilityEstimator(1)
    estimator.observe(np.zeros(4, np.int64), np.full(4, 1e308))
    assert estimator.mean().tolist() == [1e308]
    largest = np.finfo(np.float64).max
    estimator.observe(np.zeros(300, np.int64), np.full(300, largest))
    assert estimator.mean()[0] == pytest.approx(largest)


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


# --------------------------------------------------------------------------------------------------- pass rates
def test_pass_rate_is_a_discounted_beta_posterior():
    estimator = PassRateEstimator(2, discount=0.5)
    estimator.observe(np.array([0, 0, 0]), np.array([True, True, False]))
    assert estimator.mean().tolist() == [3 / 5, 0.5]  # Beta(1+2, 1+1), and the prior
    estimator.observe(np.array([0]), np.array([True]))
    assert estimator.mean()[0] == (0.5 * 3 + 0.5 + 1) / (0.5 * 5 + 1 + 1)


def test_pass_rate_is_discounted_once_a_step_and_leaves_out_what_is_not_valid():
    whole, parts = PassRateEstimator(2), PassRateEstimator(2)
    sources, correct = np.array([0, 0, 1, 0]), np.array([True, False, True, True])
    for step in range(3):
        whole.observe(sources, correct, step=step)
        parts.observe(sources[:1], correct[:1], step=step)
        parts.observe(np.append(sources[1:], 1), np.append(correct[1:], True), np.array([1, 1, 1, 0], bool), step)
        assert np.array_equal(parts.mean(), whole.mean())
    before = parts.state_dict()["pass_rate_counts"]
    parts.observe(sources, correct, step=0)  # late: added to what is there
    assert np.array_equal(parts.state_dict()["pass_rate_counts"], before + [[2, 1], [1, 0]])


# ------------------------------------------------------------------------------------------------ single policies
@settings(max_examples=50, deadline=None)
@given(history=histories, cut=st.integers(0, 6))
def test_sec_does_not_care_how_the_outcomes_of_a_step_are_split(history, cut):
    whole, parts = make({"name": "sec"}), make({"name": "sec"})
    for step, round_ in enumerate(history):
        rows = [(s, a) for s, rollouts, _ in round_ for a, _ in rollouts]
        for part in (rows[:cut], rows[cut:]):
            parts.observe(outcomes(step, [s for s, _ in part], [a for _, a in part]))
        whole.observe(outcomes(step, [s for s, _ in rows], [a for _, a in rows]))
    np.testing.assert_allclose(parts.weights(0), whole.weights(0), rtol=1e-12)


def test_robust_decides_by_the_rewards_whether_right_and_wrong_say_it_all():
    """Two values, whatever they are: the posterior. A third, in this call or a later one: mean |A| from then on."""
    advantage, posterior = 0.125, expected_learnability(np.array([1]), np.array([2]), np.array([0.5]))[0]
    for rewards, expected in (([-2.0, 3.0], posterior), ([1.0, 1.0], posterior)):
        policy = make({"name": "dump_ucb_robust"})
        policy.observe(outcomes(0, [0, 0], [advantage, -advantage], [0, 0], rewards, correct=[True, False]))
        assert policy.metrics()["learnability"][0] == expected
    for calls in ([[0.0, 1.0], [0.5, 0.5]], [[0.0, 1.0], [0.0, 2.0]], [[0.0, 0.5], [1.0, -1.0]]):
        policy = make({"name": "dump_ucb_robust", "window": 1})
        for step, rewards in enumerate(calls):
            state, policy = through_json(policy.state_dict()), make({"name": "dump_ucb_robust", "window": 1})
            policy.load_state_dict(state)
            policy.observe(outcomes(step, [0, 0], [advantage, -advantage], [0, 0], rewards, correct=[True, False]))
        assert policy.metrics()["learnability"][0] == advantage
        state, policy = through_json(policy.state_dict()), make({"name": "dump_ucb_robust", "window": 1})
        policy.load_state_dict(state)
        policy.observe(outcomes(2, [0, 0], [0.5, -0.5], [0, 0], calls[-1], correct=[False, True]))
        assert policy.metrics()["learnability"][0] == 0.5
        policy.observe(outcomes(3, [1, 1], [advantage, -advantage], [0, 0], [0, 1], correct=[False, True]))
        assert policy.metrics()["learnability"][1] == posterior


def spread(name: str, **options) -> float:
    """Median over seeds of max / min weight of twelve sources that are all alike: pass rate one half, G = 16."""
    ratios = []
    for seed in range(40):
        rng = np.random.Generator(np.random.Philox(seed))
        policy = make({"name": name, **options}, SourceSetting(tuple("abcdefghijkl"), (9,) * 12))
        for step in range(12):
            sources = np.repeat(np.arange(12), 10)
            draw(policy, sources, rollouts=16)
            correct = rng.random((120, 16)) < 0.5
            centred = correct - correct.mean(axis=1, keepdims=True)
            advantages = centred / (centred.std(axis=1, ddof=1, keepdims=True) + 1e-6)
            ids = np.repeat(np.arange(120), 16)
            policy.observe(outcomes(step, np.repeat(sources, 16), advantages.ravel(), ids, correct.ravel()))
        ratios.append(policy.weights(12).max() / policy.weights(12).min())
    return float(np.median(ratios))


def test_robust_hears_less_noise_than_dump():
    """Identical sources: what tells their weights apart is noise alone. At one temperature."""
    assert spread("dump_ucb_robust", temperature=0.1) < 1.25 < spread("dump_ucb")


def test_robust_keeps_exploring_where_dump_stops():
    """With cumulative counts the bonus dies; with discounted ones an untouched source gets it back."""
    dump, robust = make({"name": "dump_ucb"}), make({"name": "dump_ucb_robust", "exploration": 1.0})
    for step in range(300):
        sources = [0, 1, 2, 3] if step < 150 else [0, 1, 2, 0]
        for policy in (dump, robust):
            draw(policy, sources, rollouts=16)
            policy.observe(outcomes(step, [0], [0.0]))
    assert dump.metrics()["bonus"][3] < 0.1 and robust.metrics()["bonus"][3] > 1


def test_robust_counts_prompts_however_their_steps_come():
    in_order, mixed = (make({"name": "dump_ucb_robust", "discount": 0.9}) for _ in range(2))
    for policy, order in ((in_order, [4, 5, 6, 7]), (mixed, [4, 7, 5, 6])):
        draw(policy, [0, 0, 1], rollouts=16)
        for step in order:
            policy.observe(outcomes(step, [0], [0.5]))
            policy.observe(outcomes(step, [1], [0.5]))  # the rest of the same step
    np.testing.assert_allclose(in_order.state_dict()["n_prompts"], np.array([2, 1, 0, 0]) * 0.9**4, rtol=1e-12)
    np.testing.assert_allclose(mixed.state_dict()["n_prompts"], in_order.state_dict()["n_prompts"], rtol=1e-12)


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4), quotas=st.lists(st.integers(1, 40), max_size=12))
def test_proportional_is_the_pooled_shuffle_epoch_by_epoch(sizes, quotas):
    setting = SourceSetting(tuple("abcd"[: len(sizes)]), tuple(sizes))
    policy, rows = make({"name": "proportional"}, setting), sum(sizes)
    pool = np.repeat(np.arange(len(sizes)), sizes)
    epochs = [pool[streams.permutation(rows, 7, "pool", e)] for e in range(sum(quotas) // rows + 1)]
    sequence, start = np.concatenate(epochs), 0
    for step, quota in enumerate(quotas):
        slots = policy.slots(step, start, quota, 7)
        assert slots.dtype == np.int64 and np.array_equal(slots, sequence[start : start + quota])
        start += quota
    assert (
        np.array_equal(policy.slots(0, 0, 3, 7)[: len(sequence)], np.resize(sequence, 3)[: len(sequence)]) or rows < 3
    )
    assert np.array_equal(policy.weights(0), np.array(sizes) / rows)


def test_proportional_temperature():
    by_size = np.array(SIZES)
    for temperature, expected in ((2.0, np.sqrt(by_size)), (0.5, by_size**2), (1e9, np.ones(K))):
        weights = make({"name": "proportional", "temperature": temperature}).weights(0)
        np.testing.assert_allclose(weights, expected / expected.sum(), rtol=1e-7)
    assert np.isfinite(make({"name": "proportional", "temperature": 1e-6}).weights(0)).all()


def test_static_weights_are_normalised_by_name():
    assert make({"name": "static", "weights": WEIGHTS}).weights(3).tolist() == [0.25, 0.0, 0.625, 0.125]
    huge = make({"name": "static", "weights": {"d": 1e308, "c": 1e308, "b": 1e308, "a": 1e308}})
    assert huge.weights(0).tolist() == [0.25] * 4
    numbered = make({"name": "static", "weights": {3: 1, 4: 3}}, SourceSetting(("3", "4"), (1, 1)))
    assert numbered.weights(0).tolist() == [0.25, 0.75]  # YAML reads such names as numbers


def test_easy_to_hard_order_and_length():
    names = ("level 1", "level 10", "level 2", "x")
    policy = make({"name": "easy_to_hard"}, SourceSetting(names, (1,) * 4, max_steps=30))
    assert policy.metrics()["level"].tolist() == [0, 2, 1, 3]
    reverse = make(
        {"name": "easy_to_hard", "order": ["x", "level 10", "level 2", "level 1"]}, SourceSetting(names, (1,) * 4, 30)
    )
    assert reverse.metrics()["level"].tolist() == [3, 1, 2, 0]
    explicit = make({"name": "easy_to_hard", "total_steps": 30}, SourceSetting(names, (1,) * 4, max_steps=7))
    assert all(np.array_equal(policy.weights(step), explicit.weights(step)) for step in range(40))
    narrow = make({"name": "easy_to_hard", "sigma": 1e-6, "p_min": 0.0}, SourceSetting(names, (1,) * 4, 30))
    assert all(abs(narrow.weights(step).sum() - 1) < 1e-12 for step in range(40))  # no exponent is lost
    assert make({"name": "easy_to_hard"}, SourceSetting(("a",), (1,), 5)).weights(2).tolist() == [1.0]


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"name": "dump"}, r"sources\.name: 'dump' is unknown; known: dump_ucb, dump_ucb_robust, easy_to_hard, propor"),
        ({"name": "dump_ucb", "windw": 3}, r"sources\.windw: no such option \(value 3\); options of dump_ucb: expl"),
        ({"name": "uniform", "floor": 0.1}, r"sources\.floor: no such option .* options of uniform: none"),
        ({"name": "dump_ucb", "temperature": 0}, r"sources\.temperature: 0 must be a number >= 1e-06"),
        ({"name": "dump_ucb", "floor": 1.5}, r"sources\.floor: 1.5 must be a number in \[0, 1\]"),
        ({"name": "dump_ucb", "window": 2.5}, r"sources\.window: 2.5 must be an integer >= 1"),
        ({"name": "dump_ucb", "exploration": math.nan}, r"sources\.exploration: nan must be a number"),
        ({"name": "sec", "alpha": -1}, r"sources\.alpha: -1 must be a number in \[0, 1\]"),
        (
            {"name": "dump_ucb_robust", "base": "size"},
            r"sources\.base: 'size' is unknown; known: proportional, uniform",
        ),
        (
            {"name": "dump_ucb_robust", "learnability": 1},
            r"sources\.learnability: 1 is unknown; known: advantage, auto, p",
        ),
        ({"name": "easy_to_hard", "kind": "linear"}, r"sources\.kind: 'linear' is unknown; known: cosine, gaussian"),
        ({"name": "easy_to_hard", "p_min": 0.3}, r"sources\.p_min: 0.3 must be a number in \[0, 0.25\]"),
        ({"name": "easy_to_hard", "total_steps": 0}, r"sources\.total_steps: 0 must be an integer >= 1"),
        (
            {"name": "easy_to_hard", "order": ["a", "b"]},
            r"sources\.order: \['a', 'b'\] must hold each of \['a', 'b', 'c'",
        ),
        ({"name": "static"}, r"sources\.weights: None must give every source a weight"),
        ({"name": "static", "weights": {"a": 1}}, r"sources\.weights: \{'a': 1\} has no weight for \['b', 'c', 'd'\]"),
        ({"name": "static", "weights": {**WEIGHTS, "e": 1}}, r"names \['e'\], not in \['a', 'b', 'c', 'd'\]"),
        ({"name": "static", "weights": {**WEIGHTS, "b": -1}}, r"sources\.weights\.b: -1 must be a number >= 0"),
        ({"name": "static", "weights": dict.fromkeys(NAMES, 0)}, r"sources\.weights: .* are all 0; make one"),
    ],
)
def test_configuration_errors_name_key_value_and_remedy(block, message):
    with pytest.raises(ValueError, match=message) as error:
        make(block)
    assert "\n" not in str(error.value)


def test_a_schedule_needs_its_length():
    with pytest.raises(ValueError, match=r"sources\.total_steps: None, and trainer\.grpo\.max_steps is not known; set"):
        make({"name": "easy_to_hard"}, SourceSetting(NAMES, SIZES))

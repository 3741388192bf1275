"""What is estimated of each source: learnability over a window, in closed form, and the pass rate."""

from __future__ import annotations

import bisect
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dump.curriculum.estimators import LearnabilityEstimator, PassRateEstimator, expected_learnability
from tests.unit.source_policies import through_json


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


# --------------------------------------------------------------------------------------------------- the sliding window
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


# ----------------------------------------------------------------------------------------------------------- pass rates
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

"""What is believed of prompts: CurES's and MoPPS's posteriors by hand, and against a slow model."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dump.curriculum.pass_rates import PromptPassRates
from megatron_dump.curriculum.rows import SourceRows, ranks, ranks_within
from megatron_dump.types import Outcomes

NAMES = ["b", "a", "b", "b", "a", "c"]  # of rows 0..5
ROWS = SourceRows(NAMES)
ALL = np.arange(len(NAMES))


def outcomes(step, rollouts, rows=ROWS) -> Outcomes:
    """rollouts: (row, correct[, age[, reward]]) each; a run of equal rows is a group."""
    full = [(*r, *(0, 1.0 if r[1] else 0.0)[len(r) - 2 :]) for r in rollouts]
    prompt_ids = np.array([r[0] for r in full], np.int64)
    n = len(full)
    rewards = np.array([r[3] for r in full], float)
    return Outcomes(
        step=step,
        group_ids=np.cumsum(np.diff(prompt_ids, prepend=prompt_ids[:1]) != 0),
        samples=np.zeros(n, np.int64),
        prompt_ids=prompt_ids,
        source_ids=rows.of_row[prompt_ids].astype(np.int64),
        rewards=rewards,
        advantages=np.zeros(n),
        correct=np.array([r[1] for r in full], bool),
        well_formed=np.ones(n, bool),
        lengths=np.ones(n, np.int64),
        finished=np.ones(n, bool),
        kept=np.isfinite(rewards),
        ages=np.array([r[2] for r in full], np.int64),
    )


class SlowModel:
    """The same beliefs in plain Python, row by row."""

    def __init__(self, discount, prior, strength):
        self.discount, self.prior, self.strength = discount, prior, strength
        self.rows: dict[int, tuple[float, float, int]] = {}  # row -> alpha, beta, latest step
        self.sources = dict.fromkeys(NAMES, (1.0, 1.0, -1))

    def prior_of(self, row):
        alpha, beta, _ = self.sources[NAMES[row]]
        mean = alpha / (alpha + beta) if self.prior == "source" else 0.5
        return self.strength * mean, self.strength * (1 - mean)

    def updated(self, old, prior, step, right, wrong):
        alpha, beta, latest = old
        if step > latest:
            alpha = self.discount * alpha + (1 - self.discount) * prior[0]
            beta = self.discount * beta + (1 - self.discount) * prior[1]
        return alpha + right, beta + wrong, max(step, latest)

    def observe(self, step, rollouts):
        seen: dict[int, list[float]] = {}
        for row, correct, age, reward in rollouts:
            if math.isfinite(reward):
                seen.setdefault(row, [0.0, 0.0])[0 if correct else 1] += self.discount**age
        new = {
            row: self.updated(self.rows.get(row, (*self.prior_of(row), -1)), self.prior_of(row), step, *seen[row])
            for row in seen
        }
        for source in {NAMES[row] for row in seen}:
            right, wrong = (math.fsum(seen[row][i] for row in seen if NAMES[row] == source) for i in range(2))
            self.sources[source] = self.updated(self.sources[source], (1.0, 1.0), step, right, wrong)
        self.rows.update(new)

    def alpha_beta(self, row):
        return self.rows.get(row, (*self.prior_of(row), -1))[:2]


REWARD = st.sampled_from([0.0, 1.0, 1.0, math.nan, math.inf])
ROLLOUT = st.tuples(st.integers(0, 5), st.booleans(), st.sampled_from([0, 0, 0, 1, 3]), REWARD)
CALLS = st.lists(st.tuples(st.integers(0, 6), st.lists(ROLLOUT, max_size=12)), max_size=8)
OPTIONS = st.fixed_dictionaries(
    {
        "discount": st.sampled_from([0.0, 0.5, 0.9, 1.0]),
        "prior": st.sampled_from(["source", "flat"]),
        "prior_strength": st.sampled_from([0.5, 2.0, 10.0]),
    }
)


# -------------------------------------------------------------------------------------------------------- SourceRows
@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(["x", "a", "é", "10", "2", ""]), min_size=1, max_size=40))
def test_source_rows_say_where_every_row_is(names):
    rows = SourceRows(names)
    assert rows.names == sorted(set(names)) and len(rows) == len(names)
    for k, name in enumerate(rows.names):
        mine = [i for i, other in enumerate(names) if other == name]
        assert rows.rows(k).tolist() == mine and rows.sizes[k] == len(mine)
        assert rows.local[mine].tolist() == list(range(len(mine))) and set(rows.of_row[mine]) == {k}
    assert rows.of_row.dtype == np.int32 and rows.order.dtype == rows.starts.dtype == np.int64
    assert ranks(np.sort(rows.of_row)).tolist() == rows.local[rows.order].tolist()


@given(st.lists(st.integers(0, 4), max_size=30))
def test_ranks_count_the_equal_values_before(ids):
    found = ranks_within(np.array(ids, np.int64))
    assert found.dtype == np.int64 and found.tolist() == [ids[:i].count(k) for i, k in enumerate(ids)]


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=20))
def test_runs_tell_the_source_of_every_row(names):
    rows = SourceRows(names)
    runs = rows.runs()
    assert [rows.names[k] for k, length in runs.tolist() for _ in range(length)] == names
    assert np.all(np.diff(runs[:, 0]) != 0)


# -------------------------------------------------------------------------------------------- by hand, from papers
def test_cures_posterior_by_hand():
    """CurES, Eq. 22-24: alpha and beta count successes and failures from Beta(1, 1); the estimate is alpha's share."""
    rates = PromptPassRates(ROWS, discount=1.0, prior="flat")
    assert rates.mean(ALL).tolist() == [0.5] * 6
    rates.observe(outcomes(0, [(0, True), (0, False), (0, True), (0, True), (4, False), (4, False)]))
    assert rates.mean(np.array([0, 4, 1])).tolist() == [4 / 6, 1 / 4, 1 / 2]
    rates.observe(outcomes(1, [(0, False), (0, False), (1, True), (1, True)]))
    rates.observe(outcomes(2, [(0, True), (0, False), (4, True), (4, True)]))
    alpha, beta = rates.alpha_beta(np.array([0, 4, 1, 2]))
    assert alpha.tolist() == [1 + 4, 1 + 2, 1 + 2, 1] and beta.tolist() == [1 + 4, 1 + 2, 1, 1]
    assert rates.mean(np.array([0, 4, 1, 2])).tolist() == [5 / 10, 3 / 6, 3 / 4, 1 / 2]
    assert rates.visited.tolist() == [True, True, False, False, True, False]
    rates.reset()
    assert rates.mean(ALL).tolist() == [0.5] * 6 and not rates.visited.any()
    rates.observe(outcomes(2, [(0, True)]))  # nothing of before is left, whatever the step
    assert rates.mean(np.array([0])).tolist() == [2 / 3]


def test_discounted_posterior_with_the_sources_mean_by_hand():
    """MoPPS, lambda = 0.5, prior of strength 2 around the source's mean (b: rows 0, 2, 3)."""
    rates = PromptPassRates(ROWS)
    rates.observe(outcomes(0, [(0, True), (0, True), (0, True), (2, True), (2, False)]))
    # at the first update every source is Beta(1, 1), so the prior is Beta(1, 1); then b is Beta(1 + 4, 1 + 1)
    np.testing.assert_allclose(rates.alpha_beta(np.array([0, 2])), [[4, 2], [1, 2]], atol=1e-12)
    m = 5 / 7
    np.testing.assert_allclose(rates.source_mean(), [0.5, m, 0.5], atol=1e-12)
    np.testing.assert_allclose(rates.alpha_beta(np.array([3])), [[2 * m], [2 * (1 - m)]], atol=1e-12)
    rates.observe(outcomes(1, [(0, False), (3, True)]))
    row_0 = (0.5 * 4 + 0.5 * 2 * m, 0.5 * 1 + 0.5 * 2 * (1 - m) + 1)
    row_3 = (2 * m + 1, 2 * (1 - m))
    np.testing.assert_allclose(rates.alpha_beta(np.array([0, 3])), np.transpose([row_0, row_3]), atol=1e-12)
    b = (0.5 * 5 + 0.5 + 1, 0.5 * 2 + 0.5 + 1)
    np.testing.assert_allclose(rates.source_mean()[1], b[0] / sum(b), atol=1e-12)
    rates.observe(outcomes(5, [(0, True, 2)]))  # two steps old: worth a quarter
    m = b[0] / sum(b)
    expected = [0.5 * row_0[0] + 0.5 * 2 * m + 0.25, 0.5 * row_0[1] + 0.5 * 2 * (1 - m)]
    np.testing.assert_allclose(np.ravel(rates.alpha_beta(np.array([0]))), expected, atol=1e-12)


# -------------------------------------------------------------------------------------------------------- properties
@settings(max_examples=200, deadline=None)
@given(CALLS, OPTIONS)
def test_beliefs_equal_a_slow_model(calls, options):
    rates = PromptPassRates(ROWS, **options)
    slow = SlowModel(options["discount"], options["prior"], options["prior_strength"])
    for step, rollouts in calls:
        rates.observe(outcomes(step, rollouts))
        slow.observe(step, rollouts)
        np.testing.assert_allclose(np.transpose(rates.alpha_beta(ALL)), [slow.alpha_beta(r) for r in ALL], rtol=1e-12)
        means = [slow.sources[name][0] / sum(slow.sources[name][:2]) for name in ROWS.names]
        np.testing.assert_allclose(rates.source_mean(), means, rtol=1e-12)
        assert set(np.flatnonzero(rates.visited)) == set(slow.rows)
        assert np.all((rates.mean(ALL) > 0) & (rates.mean(ALL) < 1))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=20), st.data())
def test_how_a_step_is_cut_into_calls_does_not_matter(rollouts, data):
    whole, cut = (PromptPassRates(ROWS, discount=0.7, prior="flat") for _ in range(2))
    for rates in (whole, cut):
        rates.observe(outcomes(0, [(0, True), (1, False), (2, True)]))
    whole.observe(outcomes(1, rollouts))
    rest = data.draw(st.permutations(rollouts))
    while rest:
        n = data.draw(st.integers(1, len(rest)))
        cut.observe(outcomes(1, rest[:n]))
        rest = rest[n:]
    for left, right in zip(whole.state_dict().values(), cut.state_dict().values(), strict=True):
        assert np.array_equal(left, right)


@settings(max_examples=100, deadline=None)
@given(CALLS, CALLS, OPTIONS)
def test_saved_beliefs_go_on_alike_to_the_last_bit(before, after, options):
    first, second = (PromptPassRates(ROWS, **options) for _ in range(2))
    second.observe(outcomes(3, [(0, True), (5, False)]))  # to be forgotten
    for step, rollouts in before:
        first.observe(outcomes(step, rollouts))
    saved = json.loads(json.dumps({name: array.tolist() for name, array in first.state_dict().items()}))
    second.load_state_dict(saved)
    for step, rollouts in [*after, (9, [])]:
        assert np.array_equal(first.alpha_beta(ALL), second.alpha_beta(ALL))
        assert np.array_equal(first.source_mean(), second.source_mean())
        assert np.array_equal(first.visited, second.visited)
        first.observe(outcomes(step, rollouts))
        second.observe(outcomes(step, rollouts))


@settings(max_examples=100, deadline=None)
@given(CALLS, st.lists(st.sampled_from(["look", "reset", "load", "go on"]), min_size=8, max_size=8))
def test_changes_name_every_row_that_changed(calls, actions):
    rates = PromptPassRates(ROWS, prior="flat")
    rows, revision = rates.changes(-1)
    assert rows is None
    seen = rates.alpha_beta(ALL)
    for (step, rollouts), action in zip(calls, actions, strict=False):
        rates.observe(outcomes(step, rollouts))
        if action == "reset":
            rates.reset()
        if action == "load":
            rates.load_state_dict(rates.state_dict())
        if action == "look":
            changed, revision = rates.changes(revision)
            now = rates.alpha_beta(ALL)
            differ = np.flatnonzero((seen[0] != now[0]) | (seen[1] != now[1]))
            assert changed is None or set(differ) <= set(changed)
            seen = now
    assert rates.changes(rates.changes(revision)[1])[0].size == 0


def test_changes_of_long_ago_are_forgotten():
    rates = PromptPassRates(ROWS)
    _, revision = rates.changes(-1)
    for step in range(200):
        rates.observe(outcomes(step, [(0, True)]))
    assert rates.changes(revision)[0] is None
    assert set(rates.changes(rates.changes(-1)[1] - 5)[0]) == {0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"discount": 1.5}, r"curriculum\.pass_rates\.discount: 1.5 must be a number in \[0, 1\]"),
        ({"prior": "beta"}, r"curriculum\.pass_rates\.prior: 'beta' is unknown; known: flat, source"),
        ({"prior_strength": 0}, r"curriculum\.pass_rates\.prior_strength: 0 must be a number >= 0.001"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PromptPassRates(ROWS, **options)

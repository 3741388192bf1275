"""Source policies one by one: traces by hand, what is particular to each, and their options."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dump.curriculum import streams
from megatron_dump.curriculum.estimators import expected_learnability
from megatron_dump.curriculum.source_policy import IndependentSlots
from megatron_dump.curriculum.sources import SourceSetting
from tests.unit.source_policies import NAMES, SETTING, SIZES, WEIGHTS, K, draw, histories, make, outcomes, through_json


def softmax(values, temperature):
    top = max(values)
    scaled = [math.exp((v - top) / temperature) for v in values]
    return [s / sum(scaled) for s in scaled]


# ------------------------------------------------------------------------------------------------------- traces by hand
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


def test_dump_ucb_robust_counts_what_a_token_teaches_by_hand():
    """Prompts of 10 and 30 tokens a rollout in source a, of 60 in b; c is not seen, and costs what all do."""
    options = {"exploration": 0.5, "temperature": 0.2, "epsilon": 0.0, "discount": 1.0, "learnability": "advantage"}
    setting, policies = SourceSetting(("a", "b", "c"), (5, 5, 5)), {}
    for exponent in (0.0, 1.0, 0.5):
        policies[exponent] = make({"name": "dump_ucb_robust", **options, "cost_exponent": exponent}, setting)
        draw(policies[exponent], [0, 0, 1], rollouts=2)
        told = outcomes(0, [0, 0, 0, 0, 1, 1], [1, -1, 0.5, -0.5, 0.5, -0.5], [0, 0, 1, 1, 2, 2])
        policies[exponent].observe(dataclasses.replace(told, lengths=np.array([5, 15, 20, 40, 50, 70])))
    bonus = [0.5 * math.sqrt(2 * math.log(4) / (n + 1)) for n in (2, 1, 0)]
    ucb = np.array([0.75 + bonus[0], 0.5 + bonus[1], bonus[2]])
    for exponent, policy in policies.items():
        cheap = np.array([40 / 20, 40 / 60, 1.0]) ** exponent
        np.testing.assert_allclose(policy.weights(1), softmax(list(ucb * cheap), 0.2), atol=1e-12)
        np.testing.assert_allclose(policy.metrics()["ucb"], ucb * cheap, atol=1e-12)


def test_a_source_counts_as_at_most_four_times_as_cheap():
    """Answers of 1, 10 and 1,000 tokens: 337 tokens on average, so that two of the sources are out of bounds."""
    block = {"name": "dump_ucb_robust", "learnability": "advantage", "cost_exponent": 1.0}
    policy = make(block, SourceSetting(("a", "b", "c"), (5, 5, 5)))
    draw(policy, [0, 1, 2], rollouts=2)
    told = outcomes(0, [0, 0, 1, 1, 2, 2], [0.5, -0.5] * 3, [0, 0, 1, 1, 2, 2])
    policy.observe(dataclasses.replace(told, lengths=np.repeat([1, 10, 1000], 2)))
    ucb = policy.metrics()["ucb"]
    np.testing.assert_allclose(ucb / ucb[2], [4 / (337 / 1000), 4 / (337 / 1000), 1.0], rtol=1e-12)


# ------------------------------------------------------------------------------------------------------ single policies
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


# -------------------------------------------------------------------------------------------------------- configuration
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


def test_a_policy_without_weights_cannot_be_made():
    class Forgetful(IndependentSlots):
        pass

    for kind in (IndependentSlots, Forgetful):
        with pytest.raises(TypeError, match="abstract .*weights"):
            kind(SETTING)


def test_a_schedule_needs_its_length():
    with pytest.raises(ValueError, match=r"sources\.total_steps: None, and trainer\.grpo\.max_steps is not known; set"):
        make({"name": "easy_to_hard"}, SourceSetting(NAMES, SIZES))

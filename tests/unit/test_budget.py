"""Budgets: exact totals and limits, CurES by hand, the knapsack against its optimum."""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from decimal import Decimal
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron_dump.curriculum.budget import (
    BUDGETS,
    bounded_shares,
    knapsack,
    largest_remainder,
    make_budget,
)

rates = st.floats(0, 1) | st.integers(0, 16).map(lambda k: k / 16)
edges = st.sampled_from([0.0, 1.0, 5e-324, 1e-200, 1e-9, 1 - 2**-53, 0.5])
sigmas = st.floats(0, 1) | st.sampled_from([0.0, 5e-324, 1e-310, 1e-150, 1e300, 1.7e308])
adaptive = pytest.mark.parametrize("name", ["neyman", "knapsack"])


@st.composite
def problems(draw, values=rates | edges, max_prompts=30):
    """(values [P], total, n_min, n_max) with a total that fits."""
    chosen = np.array(draw(st.lists(values, min_size=1, max_size=max_prompts)))
    n_min = draw(st.integers(2, 6))
    n_max = n_min + draw(st.integers(0, 20))
    return chosen, draw(st.integers(len(chosen) * n_min, len(chosen) * n_max)), n_min, n_max


def allot(name: str, p: np.ndarray, total: int, n_min: int, n_max: int) -> np.ndarray:
    budget = make_budget({"name": name, "n_min": n_min, "n_max": n_max}, n_min)
    return budget.allot(p, total)


# ------------------------------------------------------------------------------------------------------ CurES, by hand
def test_cures_eq_20_and_21_by_hand():
    """N' = 4 rollouts with 0..4 right, posterior means (1 + s) / 6: 6 sigma = sqrt5, sqrt8, 3, sqrt8, sqrt5."""
    p = np.array([1, 2, 3, 4, 5]) / 6
    by_hand = ["6.812612219741744424", "8.617348571951772982", "9.140078416612965186"]
    shares = [float(Decimal(x)) for x in (*by_hand, by_hand[1], by_hand[0])]
    np.testing.assert_allclose(bounded_shares(np.sqrt(p * (1 - p)), 40, 2, 100), shares, rtol=0, atol=1e-12)
    # floors 6, 8, 9, 8, 6; the three that are missing: .81, .81, and of the two .62 the first
    assert make_budget({"name": "neyman", "n_max": 100}, 8).allot(p, 40).tolist() == [7, 9, 9, 8, 7]


def test_limits_are_filled_like_water_by_hand():
    """sigma = .5 .3 .4 0 .1, 24 rollouts, limits 2 and 7."""
    p = np.array([0.5, 0.1, 0.2, 0.0, (1 - math.sqrt(0.96)) / 2])
    shares = bounded_shares(np.sqrt(p * (1 - p)), 24, 2, 7)
    # in proportion: 9.2 5.5 7.4 0 1.8, so that .5 is held at 7 and 0 and .1 at 2; 13 are left for .3 and .4, 5.6 and
    # 7.4: .4 is held at 7 too, and .3 gets the 6 that are left
    np.testing.assert_allclose(shares, [7, 6, 7, 2, 2], rtol=0, atol=1e-12)


@settings(max_examples=100, deadline=None)
@given(problems(st.floats(0.01, 1)), st.data())
def test_bounded_shares_minimise_the_variance(problem, data):
    """sum(sigma^2 / n), the variance of the sum of the prompts' mean gradients, is not less for any other shares."""
    sigma, total, n_min, n_max = problem
    best = bounded_shares(sigma, total, n_min, n_max)
    weights = np.array(data.draw(st.lists(st.floats(0, 1), min_size=len(sigma), max_size=len(sigma))))
    other = bounded_shares(weights, total, n_min, n_max)  # any feasible point
    assert (sigma**2 / best).sum() <= (sigma**2 / other).sum() * (1 + 1e-12)


# ---------------------------------------------------------------------------------------------------------- properties
@adaptive
@settings(max_examples=200, deadline=None)
@given(problem=problems())
def test_totals_are_exact_and_limits_hold(name, problem):
    p, total, n_min, n_max = problem
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        n = allot(name, *problem)
    assert n.dtype == np.int64 and n.shape == p.shape
    assert n.sum() == total and n.min() >= n_min and n.max() <= n_max


@settings(max_examples=300, deadline=None)
@given(problems(sigmas))
def test_shares_are_clipped_multiples_of_sigma(problem):
    """For any sigma whatever: limits, total, and one c (found by bisection) that explains every share."""
    sigma, total, n_min, n_max = problem
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        shares = bounded_shares(*problem)
    assert shares.min() >= n_min and shares.max() <= n_max
    assert math.isclose(math.fsum(shares), total, rel_tol=1e-12)
    positive = [float(s) for s in sigma if s > 1e-290 * sigma.max()]
    if n_min * (len(sigma) - len(positive)) + n_max * len(positive) <= total:
        return  # all of them have n_max: test_prompts_without_a_signal_share_equally

    def level(log_c: float) -> list[float]:
        powers = (log_c + math.log(s) if s > 1e-290 * sigma.max() else -math.inf for s in sigma)
        return [min(max(math.exp(min(x, 700.0)), n_min), n_max) for x in powers]

    low, high = -800.0, 800.0  # of log c
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if math.fsum(level(middle)) < total else (low, middle)
    np.testing.assert_allclose(shares, level(high), rtol=1e-9)


@settings(max_examples=100, deadline=None)
@given(problems(st.sampled_from([0.0, 0.25, 1.0])))
def test_prompts_without_a_signal_share_equally(problem):
    """What is left when all others have n_max; everything when no prompt has a signal."""
    p, total, n_min, n_max = problem
    for name in ("neyman", "knapsack"):
        n = allot(name, *problem)
        flat = n[(p == 0) | (p == 1)]
        others = n[p == 0.25]
        if flat.size:
            assert flat.max() - flat.min() <= 1
            assert np.array_equal(flat, -np.sort(-flat))  # the first ones have one more
            assert flat.max() == n_min or np.all(others == n_max)
    equal = largest_remainder(bounded_shares(np.zeros(len(p)), total, n_min, n_max), total)
    assert equal.tolist() == [total // len(p) + (i < total % len(p)) for i in range(len(p))]


@settings(max_examples=200, deadline=None)
@given(problems())
def test_neyman_is_monotone(problem):
    p, *_ = problem
    sigma, n = np.sqrt(p * (1 - p)), allot("neyman", *problem)
    larger = sigma[:, None] > sigma[None, :] + 1e-6  # far above the 9 digits that make a tie
    assert np.all((n[:, None] >= n[None, :])[larger])
    equal = sigma[:, None] == sigma[None, :]
    assert np.all(np.abs(n[:, None] - n[None, :])[equal] <= 1)


def by_value(values: np.ndarray, n: np.ndarray) -> dict[float, list[int]]:
    groups = defaultdict(list)
    for value, count in zip(values, n, strict=True):
        groups[float(value)].append(int(count))
    return {value: sorted(counts) for value, counts in groups.items()}


@settings(max_examples=200, deadline=None)
@given(problems(st.floats(0.01, 0.99)), st.randoms(use_true_random=False))
def test_neyman_is_equivariant(problem, random):
    """Permuted prompts have permuted shares, bit for bit, and group sizes up to ties."""
    p, total, n_min, n_max = problem
    order = np.array(random.sample(range(len(p)), len(p)))
    sigma = np.sqrt(p * (1 - p))
    shares = bounded_shares(sigma, total, n_min, n_max)
    assert np.array_equal(bounded_shares(sigma[order], total, n_min, n_max), shares[order])
    n, permuted = allot("neyman", *problem), allot("neyman", p[order], total, n_min, n_max)
    assert np.abs(permuted - n[order]).max() <= 1
    of_share = defaultdict(set)  # a tie between different shares may go either way
    for share in shares:
        of_share[round(share % 1, 8)].add(share)
    assume(all(len(tied) == 1 for tied in of_share.values()))
    assert by_value(shares, n) == by_value(shares[order], permuted)


@settings(max_examples=200, deadline=None)
@given(problems(st.floats(0.01, 0.99)), st.randoms(use_true_random=False))
def test_knapsack_is_equivariant(problem, random):
    p, total, n_min, n_max = problem
    order = np.array(random.sample(range(len(p)), len(p)))
    n, permuted = allot("knapsack", *problem), allot("knapsack", p[order], total, n_min, n_max)
    gains = sorted((gain(x, m), x) for x in p for m in range(n_min, n_max))[::-1]
    taken = total - len(p) * n_min
    at_border = 0 < taken < len(gains) and gains[taken - 1][1] != gains[taken][1]
    assume(not at_border or gains[taken - 1][0] > gains[taken][0] * (1 + 1e-12))
    assert by_value(p, n) == by_value(p[order], permuted)


@adaptive
@settings(max_examples=100, deadline=None)
@given(problem=problems(), data=st.data())
def test_the_rollouts_of_any_rejected_groups_can_be_allotted_anew(name, problem, data):
    p, _, n_min, n_max = problem
    n_rejected = data.draw(st.integers(0, len(p)))
    total = int(allot(name, *problem)[:n_rejected].sum())
    fresh = np.array(data.draw(st.lists(rates, min_size=n_rejected, max_size=n_rejected)))
    assert allot(name, fresh, total, n_min, n_max).sum() == total


# ---------------------------------------------------------------------------------------------------------- rounding
@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=20).filter(any), st.integers(0, 500))
def test_largest_remainder_against_exact_fractions(weights, total):
    exact = [Fraction(total * w, sum(weights)) for w in weights]
    expected = [math.floor(x) for x in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (expected[i] - exact[i], i))
    for i in by_remainder[: total - sum(expected)]:
        expected[i] += 1
    assert largest_remainder(np.array([float(x) for x in exact]), total).tolist() == expected


def test_mirrored_pass_rates_tie():
    """sqrt(p(1-p)) of a/n and (n-a)/n may differ in the last bit; the first prompt still gets the odd rollout."""
    budget = make_budget({"name": "neyman"}, 9)
    for n in range(2, 60):
        for a in range(1, n):
            assert budget.allot(np.array([a, n - a]) / n, 17).tolist() == [9, 8]


@pytest.mark.parametrize("shares", [[1.0, 2.5], [1.0, math.nan], [4.0, -1.0], [1.0, math.inf], []])
def test_shares_that_do_not_sum_to_the_total_are_refused(shares):
    with pytest.raises(ValueError, match=r"shares must be >= 0 and sum to 3, not to"):
        largest_remainder(np.array(shares), 3)


# ---------------------------------------------------------------------------------------------------------- knapsack
def value(p, n):
    return (1 - p**n - (1 - p) ** n) * p * (1 - p) ** 2


def gain(p, n):
    return value(p, n + 1) - value(p, n)


def optimum(p: list[Fraction], total: int, n_min: int, n_max: int) -> Fraction:
    """The largest sum of values, in exact arithmetic, by dynamic programming over prompts."""
    best = {0: Fraction(0)}
    for x in p:
        step: dict[int, Fraction] = {}
        for used, so_far in best.items():
            for n in range(n_min, n_max + 1):
                step[used + n] = max(step.get(used + n, Fraction(-1)), so_far + value(x, n))
        best = step
    return best[total]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 32), min_size=1, max_size=5), st.integers(2, 3), st.integers(0, 6), st.data())
def test_knapsack_is_optimal(parts, n_min, span, data):
    exact = [Fraction(k, 32) for k in parts]
    total = data.draw(st.integers(len(exact) * n_min, len(exact) * (n_min + span)))
    n = knapsack(np.array(parts) / 32, total, n_min, n_min + span)
    found = sum(value(x, int(k)) for x, k in zip(exact, n, strict=True))
    assert n.sum() == total
    assert abs(found - optimum(exact, total, n_min, n_min + span)) <= Fraction(1, 10**15)


def test_the_dynamic_programme_agrees_with_every_allocation():
    p = [Fraction(1, 8), Fraction(1, 2), Fraction(7, 8)]
    everything = (n for n in product(range(2, 9), repeat=3) if sum(n) == 14)
    assert optimum(p, 14, 2, 8) == max(sum(map(value, p, n)) for n in everything)


@pytest.mark.parametrize("seed", range(4))
def test_knapsack_against_one_rollout_at_a_time(seed):
    """A large case, wide limits: the same total value as handing out one rollout after the other."""
    rng = np.random.default_rng(seed)
    p = rng.beta([0.1, 0.3, 1.0, 3.0][seed], 0.5, 200)
    n = knapsack(p, 200 * 8, 2, 1000)
    greedy = np.full(200, 2)
    heap = [(-gain_closed(x, 2), i) for i, x in enumerate(p)]
    heapq.heapify(heap)
    for _ in range(200 * 6):
        _, i = heapq.heappop(heap)
        greedy[i] += 1
        heapq.heappush(heap, (-gain_closed(p[i], int(greedy[i])), i))
    assert n.sum() == greedy.sum()
    assert math.isclose(value(p, n).sum(), value(p, greedy).sum(), rel_tol=1e-12)


def gain_closed(p: float, n: int) -> float:
    return p * (1 - p) ** 2 * (p**n * (1 - p) + (1 - p) ** n * p)


def test_one_prompt_may_take_everything_up_to_n_max():
    """599 solved prompts: the search goes on past any first guess of how many rollouts one prompt can want."""
    p = np.ones(600)
    p[77] = 0.01
    n = knapsack(p, 600 * 4, 2, 1000)
    assert n[77] == 1000 and np.delete(n, 77).tolist() == [3] * 202 + [2] * 397


# ------------------------------------------------------------------------------------------------- options and errors
def test_fixed_gives_every_prompt_the_same():
    budget = make_budget({"name": "fixed"}, 8)
    assert not budget.uses_pass_rates
    assert budget.allot(None, 24).tolist() == [8, 8, 8]
    assert budget.allot(np.zeros(3), 24).tolist() == [8, 8, 8]
    with pytest.raises(ValueError, match="20 rollouts are not whole groups of samples_per_prompt = 8"):
        budget.allot(None, 20)
    with pytest.raises(ValueError, match="24 rollouts are not 2 groups of samples_per_prompt = 8"):
        budget.allot(np.zeros(2), 24)


@adaptive
def test_limits_default_to_two_and_four_times_the_mean(name):
    budget = make_budget({"name": name}, 4)
    assert budget.uses_pass_rates
    assert budget.allot(np.array([0.5, 0, 1, 0, 1, 0, 1, 1]), 32).tolist() == [16, 3, 3, 2, 2, 2, 2, 2]
    assert budget.allot(np.empty(0), 0).tolist() == []


@adaptive
@pytest.mark.parametrize(
    ("p", "total", "message"),
    [
        ([0.5, 0.5], 3, "3 rollouts do not fit 2 prompts of 2 to 16 each"),
        ([0.5, 0.5], 33, "33 rollouts do not fit 2 prompts of 2 to 16 each"),
        ([0.5, math.nan], 8, r"pass rate nan of prompt 1 must be in \[0, 1\]"),
        ([-0.1, 0.5], 8, r"pass rate -0.1 of prompt 0 must be in \[0, 1\]"),
        (None, 8, "needs each prompt's pass rate, not None"),
    ],
)
def test_what_cannot_be_allotted_is_refused(name, p, total, message):
    with pytest.raises(ValueError, match=message):
        make_budget({"name": name}, 4).allot(None if p is None else np.array(p), total)


def test_a_sigma_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="sigma nan of prompt 1 must be finite"):
        bounded_shares(np.array([3.0, np.nan]), 8, 2, 16)


@adaptive
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_min": 1}, r"curriculum\.budget\.n_min: 1 must be an integer >= 2"),
        ({"n_min": 2.5}, r"curriculum\.budget\.n_min: 2.5 must be an integer >= 2"),
        ({"n_min": 9}, r"curriculum\.budget\.n_min: 9 is more than samples_per_prompt = 8, the mean; lower it"),
        ({"n_max": 7}, r"curriculum\.budget\.n_max: 7 is less than samples_per_prompt = 8, the mean; raise it"),
        ({"n_max": "many"}, r"curriculum\.budget\.n_max: 'many' must be an integer"),
        ({"nmax": 7}, r"curriculum\.budget\.nmax: no such option \(value 7\); options of .*n_max, n_min"),
    ],
)
def test_configuration_errors_name_key_value_and_remedy(name, options, message):
    with pytest.raises(ValueError, match=message) as error:
        make_budget({"name": name, **options}, 8)
    assert "\n" not in str(error.value)


def test_unknown_names_and_forms_are_refused():
    with pytest.raises(ValueError, match=r"budget\.name: 'cures' is unknown; known: fixed, knapsack, neyman"):
        make_budget({"name": "cures"}, 8)
    with pytest.raises(ValueError, match=r"budget\.form: 'norm': it is unknown; write proxy, or leave it out"):
        make_budget({"name": "neyman", "form": "norm"}, 8)


def test_the_gradient_form_is_gone():
    """A YAML of before gets one line; the form that is left is written into checkpoints as ever."""
    gone = r"curriculum\.budget\.form: 'gradient': it is gone, nothing measured gradients for it; write proxy, or leave"
    with pytest.raises(ValueError, match=gone) as error:
        make_budget({"name": "neyman", "form": "gradient"}, 8)
    assert "\n" not in str(error.value)
    assert BUDGETS.describe({"name": "neyman"})["form"] == "proxy"

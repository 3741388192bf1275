"""CurES: the distributions of the paper, the slow walk along the weights, and Algorithm 1."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dump.curriculum import streams
from megatron_dump.curriculum.cures import Cures
from megatron_dump.curriculum.pass_rates import PromptPassRates
from megatron_dump.curriculum.prompts import make_prompt_policy
from megatron_dump.curriculum.rows import SourceRows
from tests.unit.prompt_policies import World, draw, one_source, taught
from tests.unit.test_pass_rates import outcomes


def rho(chances, temperature, floor=0.0):
    """CurES, Eq. 14, mixed with the uniform distribution."""
    scaled = [math.exp(math.sqrt(p * (1 - p)) / temperature) for p in chances]
    return [(1 - floor) * s / math.fsum(scaled) + floor / len(scaled) for s in scaled]


def test_cures_equation_14_by_hand():
    """Posterior of Eq. 22-24 by counting, then rho, for five rows over three steps."""
    rows = one_source(5)
    for temperature, floor in ((0.1, 0.0), (0.5, 0.25), (0.001, 0.0), (10.0, 1.0)):
        rates = PromptPassRates(rows, discount=1.0, prior="flat")
        policy = Cures(rows, 0, rates, temperature=temperature, floor=floor)
        right, wrong = [0] * 5, [0] * 5
        for step, results in enumerate(([(0, 4, 0), (1, 0, 4)], [(1, 3, 1), (2, 1, 7)], [(4, 1, 1), (0, 16, 0)])):
            for row, r, w in results:
                right[row], wrong[row] = right[row] + r, wrong[row] + w
            rollouts = [(row, i < r) for row, r, w in results for i in range(r + w)]
            rates.observe(outcomes(step, rollouts, rows))
            chances = [(1 + r) / (2 + r + w) for r, w in zip(right, wrong, strict=True)]
            ids, found = policy.distribution(step, 0)
            assert ids.tolist() == [0, 1, 2, 3, 4]
            np.testing.assert_allclose(found, rho(chances, temperature, floor), atol=1e-12)


def test_unvisited_rows_follow_their_source():
    rows = SourceRows(["a"] * 3 + ["b"] * 2)
    rates = PromptPassRates(rows, discount=1.0)
    policy = Cures(rows, 0, rates)
    for step in range(4):
        rates.observe(outcomes(step, [(0, False)] * 3 + [(3, step > 1)], rows))
        n = 3 * (step + 1)
        m = 1 / (2 + n)  # of source a: Beta(1, 1 + n)
        prior = [1.0, 1.0]  # of row 0: made at the first update, when its source was Beta(1, 1)
        chances = [prior[0] / (sum(prior) + n), m, m]
        np.testing.assert_allclose(policy.distribution(step, 0)[1], rho(chances, 0.1), atol=1e-12)


class SlowCures:
    """Draws one source's rows by running through a list of weights."""

    def __init__(self, seed, name):
        self.generator = np.random.Philox(key=streams.philox_key(seed, "cures", name))

    def uniform(self):
        return int(self.generator.random_raw(4)[0] >> np.uint64(11)) / 2**53

    def attempt(self, weights):
        """weights: row -> weight; the row at a uniform place on the line of weights."""
        target = self.uniform() * math.fsum(weights.values())
        for row, weight in sorted(weights.items()):
            target -= weight
            if target < 0:
                return row
        return row

    def draw(self, weights, n, exclude):
        """In the third attempt and after it, taken rows are off the line."""
        taken, drawn = set(exclude), [None] * n
        for attempt in itertools.count():
            line = weights
            if attempt > 1:
                taken = set() if taken >= set(weights) else taken
                line = {row: w for row, w in weights.items() if row not in taken}
            for i in [i for i, row in enumerate(drawn) if row is None][: len(weights)]:
                row = self.attempt(line)
                if row not in taken:
                    drawn[i] = row
                    taken.add(row)
            if None not in drawn:
                return drawn


@settings(max_examples=100, deadline=None)
@given(
    size=st.sampled_from([1, 2, 7, 40]),
    floor=st.sampled_from([0.0, 0.3, 1.0]),
    temperature=st.sampled_from([0.02, 0.1]),
    steps=st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=3), min_size=1, max_size=4),
    seed=st.integers(0, 99),
)
def test_cures_draws_are_a_walk_along_the_weights(size, floor, temperature, steps, seed):
    rows = one_source(size)
    world = World({"name": "cures", "floor": floor, "temperature": temperature}, rows, seed, prior="flat")
    slow = SlowCures(seed, "x")
    for step, rounds in enumerate(steps):
        used: list[int] = []
        for n in rounds:
            weights = dict(enumerate(rho(world.rates.mean(np.arange(size)), temperature, floor)))
            expected = slow.draw(weights, n, used)
            assert world.round(step, [0] * n, used).tolist() == expected
            used += expected


def of_twelve(ks):
    """Posteriors of means k / 12."""
    return [(k, 12 - k) for k in ks], [k / 12 for k in ks]


@pytest.mark.parametrize("options", [{}, {"floor": 0.5}, {"temperature": 1.0}, {"temperature": 0.05, "floor": 0.1}])
def test_cures_draws_with_the_probabilities_of_equation_14(options):
    """Chi-square over 20,000 draws of one prompt, below its 99.9 % point (36.1 at 14 degrees of freedom)."""
    counts, chances = of_twelve([1, 11, 2, 6, 6, 5, 3, 1, 9, 4, 7, 1, 1, 2, 10])
    rows, rates = taught(counts, 1000)
    policy = Cures(rows, 5, rates, **options)
    expected = np.array(rho(chances, options.get("temperature", 0.1), options.get("floor", 0.0)))
    n = 20_000
    drawn = np.concatenate([draw(policy, step, np.arange(1000)) for step in range(n // 1000)])
    observed = np.bincount(drawn % 15, minlength=15)
    assert np.sum((observed - n * expected) ** 2 / (n * expected)) < 36.1


@pytest.mark.parametrize("refill", [False, True])
@pytest.mark.parametrize("floor", [0.0, 0.4])
def test_cures_draws_one_after_the_other_without_replacement(floor, refill):
    """Each set of two of four rows as often as successive sampling gives it; in one round, or with a refill of one."""
    counts, chances = of_twelve([1, 3, 6, 11])
    p = rho(chances, 0.2, floor)
    expected = dict.fromkeys(map(frozenset, itertools.combinations(range(4), 2)), 0.0)
    for i, j in itertools.permutations(range(4), 2):
        expected[frozenset((i, j))] += p[i] * p[j] / (1 - p[i])
    copies, n_steps = 1000, 15
    rows, rates = taught(counts, copies)
    policy, pairs = Cures(rows, 1, rates, temperature=0.2, floor=floor), []
    for step in range(n_steps):
        first = draw(policy, step, np.repeat(np.arange(copies), 1 if refill else 2))
        both = (
            np.stack([first, draw(policy, step, np.arange(copies), first)], axis=1) if refill else first.reshape(-1, 2)
        )
        pairs += both.tolist()
    observed = Counter(frozenset(row % 4 for row in pair) for pair in pairs)
    for pair, share in expected.items():
        assert abs(observed[pair] / len(pairs) - share) < 4 * math.sqrt(share * (1 - share) / len(pairs))


def test_algorithm_1_of_cures():
    """One source, T = 3 subsets of 7, 7 and 6 rows, M = 4 steps each, N' = 4 pre-rollouts; seven rounds of subsets.

    Beside it, in plain Python: counts of the current iteration only, rho over the subset, and the slow draw.
    """
    rows, n_steps, m = one_source(20), 28, 3
    config = {"name": "cures", "subsets": 3, "steps_per_subset": 4, "pre_rollouts": 4}
    rates = PromptPassRates(rows, discount=1.0, prior="flat")
    policy, slow = make_prompt_policy(config, rows, 9, rates), SlowCures(9, "x")
    shuffled = streams.permutation(20, 9, "subsets", "x").tolist()
    subsets = [shuffled[:6], shuffled[6:13], shuffled[13:]]
    counts: dict[int, list[int]] = {}
    prepared = []
    for step in range(n_steps):
        subset = subsets[step // 4 % 3]
        todo = policy.pre_rollouts(step)
        assert (todo is not None) == (step % 4 == 0)
        if todo is not None:
            assert sorted(todo[0]) == sorted(subset) and todo[1] == 4
            prepared.append(step)
            counts = {row: [1, 1] for row in subset}
            rollouts = [(row, (row * 7 + i + step) % 5 < 2) for row in todo[0].tolist() for i in range(4)]
            rates.observe(outcomes(step, rollouts, rows))
            for row, right in rollouts:
                counts[row][0 if right else 1] += 1
            policy.prepared(step)
            assert policy.pre_rollouts(step) is None
        chances = {row: a / (a + b) for row, (a, b) in counts.items()}
        np.testing.assert_allclose(
            rates.mean(np.array(sorted(subset))), [chances[r] for r in sorted(subset)], atol=1e-12
        )
        weights = dict(zip(sorted(subset), rho([chances[r] for r in sorted(subset)], 0.1), strict=True))
        ids, density = policy.distribution(step, 0)
        np.testing.assert_allclose(density, [weights.get(r, 0.0) for r in ids.tolist()], atol=1e-12)
        drawn = draw(policy, step, m).tolist()
        assert drawn == slow.draw(weights, m, [])
        rollouts = [(row, (row + i * step) % 3 == 0) for row in drawn for i in range(8)]
        rates.observe(outcomes(step, rollouts, rows))
        for row, right in rollouts:
            counts[row][0 if right else 1] += 1
    assert prepared == [0, 4, 8, 12, 16, 20, 24]


def test_pre_rollouts_begin_once_and_survive_a_restart():
    """What the first rounds of pre-rollouts taught is not forgotten when the run is cut between two of them."""
    config = {"name": "cures", "subsets": 2, "steps_per_subset": 5, "pre_rollouts": 2}
    world = World(config, one_source(8), discount=1.0, prior="flat")
    world.step(0, [[0, 0]])
    rows, n = world.policy.pre_rollouts(5)
    assert not world.rates.visited.any() and n == 2 and len(rows) == 4
    world.rates.observe(outcomes(5, [(int(rows[0]), True)] * 2, world.rows))
    other = World(config, one_source(8), discount=1.0, prior="flat")
    other.load(world.state())
    for each in (world, other):
        again, _ = each.policy.pre_rollouts(5)
        assert again.tolist() == rows.tolist() and each.rates.mean(rows[:1]) == 3 / 4
        each.rates.observe(outcomes(5, [(int(row), False) for row in rows[1:]], each.rows))
        each.policy.prepared(5)
        assert each.policy.pre_rollouts(5) is None and each.policy.pre_rollouts(9) is None
        assert each.rates.mean(rows).tolist() == [3 / 4, 1 / 3, 1 / 3, 1 / 3]
    assert world.round(5, [0] * 3).tolist() == other.round(5, [0] * 3).tolist()


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 30), st.integers(1, 12))
def test_subsets_cover_a_source(size, subsets):
    """Disjoint and even while there are rows enough; else one row each, and every row in some."""
    world = World({"name": "cures", "subsets": subsets, "steps_per_subset": 1, "pre_rollouts": 1}, one_source(size))
    parts = [world.policy.pre_rollouts(step)[0].tolist() for step in range(subsets)]
    assert set().union(*parts) == set(range(size))
    lengths = [len(part) for part in parts]
    assert min(lengths) >= 1 and max(lengths) - min(lengths) <= 1
    if size >= subsets:
        assert sum(lengths) == size

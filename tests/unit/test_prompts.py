"""Prompts inside a source: every draw against a slow reference, and the distributions the papers ask for."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dump.curriculum import streams
from megatron_dump.curriculum.cures import Cures
from megatron_dump.curriculum.pass_rates import PromptPassRates
from megatron_dump.curriculum.prompts import Epoch, make_prompt_policy
from megatron_dump.curriculum.rows import SourceRows
from megatron_dump.curriculum.sum_trees import SumTrees
from megatron_dump.curriculum.thompson import Thompson
from tests.unit.test_pass_rates import outcomes

NONE = np.empty(0, np.int64)
MIXED = SourceRows(["b", "a", "b", "c", "a", "b", "a", "b", "a", "a"] * 3 + ["d"])  # sizes 15, 12, 3, 1
SLOTS = st.lists(st.integers(0, 3), min_size=1, max_size=25)
POLICIES = [
    {"name": "epoch"},
    {"name": "cures"},
    {"name": "cures", "floor": 0.3},
    {"name": "cures", "subsets": 2, "steps_per_subset": 2},
    {"name": "cures", "subsets": 2, "steps_per_subset": 2, "pre_rollouts": 2},
    {"name": "thompson", "pool": 3},
    {"name": "thompson", "floor": 0.5},
]


def one_source(size: int) -> SourceRows:
    return SourceRows(["x"] * size)


def draw(policy, step, n, exclude=NONE, first_group=0):
    """n slots of source 0, or the given ones."""
    slots = np.zeros(n, np.int64) if isinstance(n, int) else np.asarray(n, np.int64)
    return policy.draw(step, first_group, slots, np.asarray(exclude, np.int64))


def answer(step, prompt_ids, rows):
    """Made-up rollouts, three of each row: a function of (its place in the source, sample, step)."""
    places = rows.local[prompt_ids]
    right = [math.sin(place * 12.9898 + sample * 78.233 + step) > 0.2 for place in places for sample in range(3)]
    return outcomes(step, list(zip(np.repeat(prompt_ids, 3).tolist(), right, strict=True)), rows)


def saved(state):
    return json.loads(json.dumps({name: array.tolist() for name, array in state.items()}))


class World:
    """A policy and its pass rates, drawn from and taught as in training."""

    def __init__(self, config, rows=MIXED, seed=3, **pass_rates):
        self.rows, self.rates = rows, PromptPassRates(rows, **pass_rates)
        self.policy = make_prompt_policy(config, rows, seed, self.rates)

    def round(self, step, slots, drawn=NONE):
        prompt_ids = draw(self.policy, step, slots, drawn)
        self.rates.observe(answer(step, prompt_ids, self.rows))
        return prompt_ids

    def step(self, step, rounds):
        """Pre-rollouts if it wants any, then the rounds; what was drawn to be trained on, round by round."""
        if (todo := self.policy.pre_rollouts(step)) is not None:
            self.rates.observe(answer(step, todo[0], self.rows))
            self.policy.prepared(step)
        drawn = []
        for slots in rounds:
            drawn.append(self.round(step, slots, np.concatenate([NONE, *drawn])))
        return drawn

    def state(self):
        return saved(self.policy.state_dict()), saved(self.rates.state_dict())

    def load(self, state):
        self.policy.load_state_dict(state[0])
        self.rates.load_state_dict(state[1])


# ------------------------------------------------------------------------------------------------------- every policy
@pytest.mark.parametrize("config", POLICIES, ids=str)
@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(SLOTS, min_size=1, max_size=3), min_size=1, max_size=5))
def test_rows_are_of_their_source_and_do_not_repeat_in_a_step(config, steps):
    world = World(config)
    for step, rounds in enumerate(steps):
        drawn = np.concatenate(world.step(step, rounds))
        slots = np.concatenate(rounds)
        assert np.array_equal(MIXED.of_row[drawn], slots)
        for source in np.unique(slots):
            mine = drawn[slots == source]
            available = MIXED.sizes[source]
            if config.get("subsets"):
                available = len(np.flatnonzero(world.policy.distribution(step, source)[1]))
            assert len(set(mine)) == min(len(mine), available)


@pytest.mark.parametrize("config", POLICIES, ids=str)
@settings(max_examples=25, deadline=None)
@given(steps=st.lists(st.lists(SLOTS, min_size=2, max_size=2), min_size=2, max_size=6), data=st.data())
def test_a_restored_policy_goes_on_alike(config, steps, data):
    """Saved through JSON after any round, the first of a step included."""
    whole, first, second = (World(config) for _ in range(3))
    expected = [whole.step(step, rounds) for step, rounds in enumerate(steps)]
    second.step(0, [[0, 1, 2, 3, 3]])  # to be forgotten
    cut, in_step = data.draw(st.integers(0, len(steps) - 1)), data.draw(st.booleans())
    for step in range(cut):
        first.step(step, steps[step])
    before = first.step(cut, steps[cut][:1]) if in_step else []
    second.load(first.state())
    assert second.state() == first.state()
    after = second.step(cut, steps[cut]) if not in_step else [second.round(cut, steps[cut][1], before[0])]
    resumed = [before + after] + [second.step(step, steps[step]) for step in range(cut + 1, len(steps))]
    for left, right in zip(resumed, expected[cut:], strict=True):
        assert [rows.tolist() for rows in left] == [rows.tolist() for rows in right]
    assert second.state() == whole.state()


@pytest.mark.parametrize("config", POLICIES, ids=str)
def test_a_sources_draws_do_not_depend_on_the_other_sources(config):
    """Alone, or among others that come before and after it in the list and in each round."""
    alone = World(config, SourceRows(["m"] * 40))
    among = World(config, SourceRows(["m", "a", "z"] * 40))
    rng = np.random.default_rng(0)
    for step in range(12):
        n = int(rng.integers(1, 9))
        slots = rng.permutation([1] * n + [0] * int(rng.integers(0, 20)) + [2] * int(rng.integers(0, 20)))
        drawn = among.step(step, [slots, slots])
        for left, right in zip(alone.step(step, [[0] * n] * 2), drawn, strict=True):
            assert left.tolist() == (right[slots == 1] // 3).tolist()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "cure"}, r"prompts\.name: 'cure' is unknown; known: cures, epoch, thompson"),
        ({"name": "epoch", "floor": 0.1}, r"prompts\.floor: no such option .* options of epoch: none"),
        ({"name": "cures", "temperature": 0}, r"prompts\.temperature: 0 must be a number >= 0.001"),
        ({"name": "cures", "pre_rollouts": 4}, r"prompts\.pre_rollouts: 4 needs prompts\.subsets >= 1"),
        ({"name": "cures", "steps_per_subset": 0}, r"prompts\.steps_per_subset: 0 must be an integer >= 1"),
        ({"name": "thompson", "pool": 0}, r"prompts\.pool: 0 must be an integer >= 1"),
        ({"name": "thompson", "target": 1.5}, r"prompts\.target: 1.5 must be a number in \[0, 1\]"),
        ({"name": "thompson", "floor": -1}, r"prompts\.floor: -1 must be a number in \[0, 1\]"),
    ],
)
def test_configuration_errors_name_key_value_and_remedy(config, message):
    with pytest.raises(ValueError, match=message) as error:
        World(config)
    assert "\n" not in str(error.value)


# -------------------------------------------------------------------------------------------------------------- epoch
class SlowEpoch:
    """The order of an epoch, built anew for every draw: one round a step."""

    def __init__(self, rows: SourceRows, seed: int):
        self.rows = {k: rows.rows(k).tolist() for k in range(len(rows.names))}
        self.names, self.seed = rows.names, seed
        self.consumed = dict.fromkeys(self.rows, 0)
        self.border: dict[int, tuple[int, set[int]]] = {}

    def draw(self, slots):
        taken = {k: self.take(k, slots.count(k)) for k in set(slots)}
        return [taken[k].pop(0) for k in slots]

    def take(self, k, n):
        size, taken = len(self.rows[k]), []
        while len(taken) < n:
            epoch, position = divmod(self.consumed[k], size)
            if position == 0:
                used = taken[len(taken) // size * size :]
                self.border[k] = (min(n - len(taken), size - len(used)), set(used))
            new = self.order(k, epoch)[position : position + n - len(taken)]
            self.consumed[k] += len(new)
            taken += new
        return taken

    def order(self, k, epoch):
        shuffled = streams.permutation(len(self.rows[k]), self.seed, "prompts", self.names[k], epoch)
        order = [self.rows[k][i] for i in shuffled]
        ahead, used = self.border.get(k, (0, set()))
        first = [row for row in order if row not in used][:ahead]
        return first + [row for row in order if row not in first]


@settings(max_examples=200, deadline=None)
@given(st.lists(SLOTS, min_size=1, max_size=12), st.integers(0, 99))
def test_epoch_draws_what_its_definition_says(steps, seed):
    policy, slow = Epoch(MIXED, seed), SlowEpoch(MIXED, seed)
    for step, slots in enumerate(steps):
        assert draw(policy, step, slots).tolist() == slow.draw(slots)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(SLOTS, min_size=1, max_size=4), min_size=1, max_size=6))
def test_rounds_of_a_step_are_one_larger_step(steps):
    in_rounds, at_once = Epoch(MIXED, 1), Epoch(MIXED, 1)
    for step, rounds in enumerate(steps):
        parts: list[np.ndarray] = []
        for slots in rounds:
            parts.append(draw(in_rounds, step, slots, np.concatenate([NONE, *parts])))
        whole, slots = draw(at_once, step, list(itertools.chain(*rounds))), np.concatenate(rounds)
        for source in range(4):
            assert np.concatenate(parts)[slots == source].tolist() == whole[slots == source].tolist()


@pytest.mark.parametrize("config", POLICIES[:3] + POLICIES[5:], ids=str)
@settings(max_examples=40, deadline=None)
@given(st.lists(SLOTS, min_size=1, max_size=4), st.lists(SLOTS, min_size=1, max_size=6), st.integers(0, 5))
def test_refills_may_come_after_later_steps_were_drawn(config, steps, refills, seed):
    """With asynchronous generation. Still no row twice in a step while its source has others."""
    policy, drawn = World(config, seed=seed).policy, []
    for step, slots in enumerate(steps):
        drawn.append(draw(policy, step, slots))
    for i, slots in enumerate(refills):
        step = i * 7 % len(steps)
        drawn[step] = np.concatenate([drawn[step], draw(policy, step, slots, drawn[step])])
        of_source = MIXED.of_row[drawn[step]]
        for source in range(4):
            mine = drawn[step][of_source == source]
            assert len(set(mine)) == min(len(mine), MIXED.sizes[source])


# ---------------------------------------------------------------------------------------------------------- sum trees
@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([1, 2, 31, 32, 33, 100, 1025]), min_size=1, max_size=4), st.data())
def test_a_leaf_is_found_by_its_share_of_the_sum(sizes, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    trees, leaves = SumTrees(np.array(sizes), 2), [np.zeros((n, 2)) for n in sizes]
    for _ in range(3):
        tree = rng.integers(0, len(sizes), 40)
        leaf = (rng.random(40) * np.array(sizes)[tree]).astype(np.int64)
        leaf[:2], tree[:2] = leaf[2:4], tree[2:4]  # the same leaf twice
        places = Counter(zip(tree.tolist(), leaf.tolist(), strict=True))
        values = np.array(
            [[k % 3, (k * 7 + i) % 5] for k, i in zip(tree, leaf, strict=True)], float
        )  # whole: sums exact
        trees.assign(tree, leaf, values)
        for k, i in places:
            leaves[k][i] = (k % 3, (k * 7 + i) % 5)
    mix = np.array([0.25, 2.0])
    for k, own in enumerate(leaves):
        weights = own @ mix
        assert trees.totals[k].tolist() == own.sum(axis=0).tolist()
        if weights.sum() == 0:
            continue
        targets = np.concatenate([[0.0, weights.sum(), np.nextafter(weights.sum(), 0)], rng.random(50) * weights.sum()])
        found = trees.find(np.full(53, k), targets, np.tile(mix, (53, 1)))
        expected = np.searchsorted(np.cumsum(weights), np.minimum(targets, np.nextafter(weights.sum(), 0)), "right")
        assert found.tolist() == expected.tolist() and np.all(weights[found] > 0)


def test_sums_depend_on_the_leaves_alone():
    """To the last bit: changed one by one or made at once, also where the numbers differ by orders of magnitude."""
    rng = np.random.default_rng(0)
    values = np.exp(rng.uniform(-50, 0, (5000, 3)))
    order, tree = np.arange(5000), np.zeros(5000, np.int64)
    at_once, gradually = SumTrees(np.array([5000]), 3), SumTrees(np.array([5000]), 3)
    at_once.assign(tree, order, values)
    gradually.assign(tree, order, rng.random((5000, 3)))
    for part in [*np.split(rng.permutation(5000), 100), np.array([7]), np.arange(5, 4000)]:
        gradually.assign(tree[part], part, values[part])
    assert np.array_equal(at_once.totals, gradually.totals)
    target, mix = rng.random(500) * at_once.totals.sum(), np.ones((500, 3))
    assert np.array_equal(at_once.find(tree[:500], target, mix), gradually.find(tree[:500], target, mix))


# -------------------------------------------------------------------------------------------------------------- cures
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


def taught(counts, copies):
    """`copies` sources alike, so that many draws cost one call; row i of each has the posterior Beta(*counts[i])."""
    rows = SourceRows([f"copy {c}" for c in range(copies) for _ in counts])
    rates = PromptPassRates(rows, discount=1.0, prior="flat")
    state = rates.state_dict()
    n = len(rows)
    rates.load_state_dict({**state, "rows": np.arange(n), "counts": np.tile(counts, (copies, 1)), "steps": np.zeros(n)})
    return rows, rates


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


# ----------------------------------------------------------------------------------------------------------- thompson
def test_a_pool_of_one_is_epoch():
    world, epoch = World({"name": "thompson", "pool": 1}), Epoch(MIXED, 3)
    rng = np.random.default_rng(0)
    for step in range(30):
        slots = rng.integers(0, 4, int(rng.integers(1, 20)))
        assert world.round(step, slots).tolist() == draw(epoch, step, slots).tolist()


@settings(max_examples=60, deadline=None)
@given(
    pool=st.integers(1, 5),
    target=st.sampled_from([0.0, 0.5, 0.8]),
    steps=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=3), min_size=1, max_size=6),
)
def test_thompson_takes_the_candidates_nearest_to_the_target(pool, target, steps):
    """Candidates in the slow epoch's order, one Beta draw each from the source's stream, sorted one by one."""
    rows = one_source(20)
    world = World({"name": "thompson", "pool": pool, "target": target}, rows)
    slow, scored = SlowEpoch(rows, 3), 0
    for step, rounds in enumerate(steps):
        used: list[int] = []
        for n in rounds:
            candidates = slow.draw([0] * max(n, min(pool * n + len(used), 20)))
            alpha, beta = world.rates.alpha_beta(np.array(candidates))
            keys = np.tile(streams.philox_key(3, "thompson", "x"), (len(candidates), 1))
            chances = streams.betas_at(alpha, beta, keys, scored + np.arange(len(candidates)))
            scored += len(candidates)
            order = sorted(range(len(candidates)), key=lambda i: (candidates[i] in used, abs(chances[i] - target)))
            expected = [candidates[i] for i in sorted(order[:n])]
            assert world.round(step, [0] * n, used).tolist() == expected
            used = sorted({*used, *expected})


def test_every_prompt_is_a_candidate_once_a_pass():
    """Rows at the target are taken as soon as they are candidates: once in the 5 steps that a pass of 20 rows takes."""
    rows = one_source(20)
    rates = PromptPassRates(rows, discount=1.0, prior="flat")
    good = {2, 3, 11, 17, 18}
    rollouts = [(row, i < (500 if row in good else 1000)) for row in range(20) for i in range(1000)]
    rates.observe(outcomes(0, rollouts, rows))
    policy = Thompson(rows, 0, rates, pool=4)
    for start in range(0, 50, 5):
        drawn = [int(draw(policy, start + i, 1)[0]) for i in range(5)]
        assert len(set(drawn)) == 5  # one candidate in four is taken: never twice in a pass


def test_thompson_chooses_as_often_as_the_posteriors_say():
    """Two rows, Beta(3, 1) and Beta(1, 1), target 1/2: the chance that the first is nearer, by quadrature."""
    rows, rates = taught([(3, 1), (1, 1)], 1000)
    policy = Thompson(rows, 2, rates, pool=2)
    drawn = np.concatenate([draw(policy, step, np.arange(1000)) for step in range(20)])
    x = (np.arange(100_000) + 0.5) / 100_000
    expected = np.mean(3 * x**2 * (1 - 2 * np.abs(x - 0.5)))  # density of Beta(3, 1) times P(|uniform - 1/2| is larger)
    assert abs(np.mean(drawn % 2 == 0) - expected) < 4 * math.sqrt(expected * (1 - expected) / len(drawn))


@pytest.mark.parametrize(("floor", "share"), [(0.0, 0.0), (0.4, 0.2), (1.0, 0.5)])
def test_thompsons_floor_is_the_share_of_slots_left_to_chance(floor, share):
    """Half of the rows are hopeless: they are drawn in the floor's slots only, and there as often as the others."""
    rows, rates = taught([(200, 200)] * 20 + [(1, 400)] * 20, 100)
    policy = Thompson(rows, 2, rates, pool=8, floor=floor)
    slots = np.repeat(np.arange(100), 2)
    hopeless = np.concatenate([draw(policy, step, slots) for step in range(30)]) % 40 >= 20
    assert abs(hopeless.mean() - share) <= 4 * math.sqrt(share * (1 - share) / len(hopeless))

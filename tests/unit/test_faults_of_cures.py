"""What CurES's reference implementation gets wrong, a test each, named after the fault; here it must not happen.

Most tests show the fault first, in a few lines that behave as the faulty code does, and then what happens here.
"""

from __future__ import annotations

import collections
import itertools
import math

import numpy as np
import pytest
import torch

from megatron_dump import grpo
from megatron_dump.batches import share_of_draw
from megatron_dump.collect import with_advantages
from megatron_dump.curriculum.budget import make_budget
from megatron_dump.curriculum.cures import Cures
from megatron_dump.curriculum.pass_rates import PromptPassRates
from megatron_dump.curriculum.rows import SourceRows
from tests.unit import test_pass_rates
from tests.unit.curricula import answer, make, outcomes, run, softmax
from tests.unit.guessing import logged, observed, read, trainer


def cures_of(right: dict[int, int], n: int, n_rows: int, **options) -> tuple[Cures, PromptPassRates, SourceRows]:
    """CurES on one source with its own posterior, after `right` of n rollouts of rows were right."""
    rows = SourceRows(["x"] * n_rows)
    rates = PromptPassRates(rows, discount=1.0, prior="flat")
    policy = Cures(rows, 5, rates, **options)
    told = [(i, sample < k) for i, k in right.items() for sample in range(n)]
    rates.observe(test_pass_rates.outcomes(0, told, rows))
    return policy, rates, rows


def test_a_temperature_of_hundreds_makes_sampling_uniform():
    """Fault: the temperature is (accepted + 1) / 1e-2, so that rho differs from uniform by less than 0.3 %."""
    for accepted in (0, 1, 8):
        rho = softmax(np.repeat([0.0, 0.5], 50), (accepted + 1) / 1e-2)  # the widest gap there is
        assert np.abs(100 * rho - 1).max() < 0.003
    policy, *_ = cures_of({i: 4 * (i % 2) for i in range(40)}, 8, 40)  # p = 1/10 or 5/10
    ids, rho = policy.distribution(1, 0)
    assert rho[ids % 2 == 1].min() / rho[ids % 2 == 0].max() == pytest.approx(math.exp((0.5 - 0.3) / 0.1), rel=1e-9)
    drawn = [policy.draw(step, 0, np.zeros(8, np.int64), np.empty(0, np.int64)) for step in range(1, 30)]
    assert np.mean(np.concatenate(drawn) % 2) > 0.8


def test_the_posterior_never_updates_inside_an_iteration():
    """Fault: alpha and beta stay those of the pre-rollouts for all M steps of an iteration."""
    policy, rates, rows = cures_of({}, 0, 12, subsets=2, steps_per_subset=10, pre_rollouts=4)
    subset, n = policy.pre_rollouts(0)
    counts = {i: [1, 1] for i in subset.tolist()}

    def observe(step: int, told: list[tuple[int, bool]]) -> None:
        rates.observe(test_pass_rates.outcomes(step, told, rows))
        for i, right in told:
            counts[i][not right] += 1

    def rho() -> dict[int, float]:
        p = {i: a / (a + b) for i, (a, b) in counts.items()}
        weights = softmax(np.array([math.sqrt(x * (1 - x)) for x in p.values()]), 0.1)
        return dict(zip(p, weights.tolist(), strict=True))

    observe(0, [(int(i), (i + sample) % 2 == 0) for i in subset for sample in range(n)])
    policy.prepared(0)
    seen = []
    for step in range(10):
        assert policy.pre_rollouts(step) is None
        ids, found = policy.distribution(step, 0)
        np.testing.assert_allclose(found, [rho().get(i, 0.0) for i in ids.tolist()], atol=1e-12)
        seen.append(found)
        drawn = policy.draw(step, 0, np.zeros(2, np.int64), np.empty(0, np.int64))
        observe(step, [(i, True) for i in drawn.tolist() for _ in range(8)])
    assert np.all(np.abs(np.diff(seen, axis=0)).max(axis=1) > 1e-3)  # a new one in every step


@pytest.mark.parametrize("name", ["neyman", "knapsack"])
def test_prompts_with_none_or_all_of_the_pre_rollouts_right_get_no_rollouts(name):
    """Fault: k in {0, N'} has sigma = 0 and so n_i = 0: a hard filter on the evidence of four rollouts."""
    k = np.arange(40) % 5  # of N' = 4
    sigma = np.sqrt(k / 4 * (1 - k / 4))
    assert np.all(np.floor(320 * sigma / sigma.sum())[k % 4 == 0] == 0)
    _, rates, rows = cures_of(dict(enumerate(k.tolist())), 4, 40)
    budget = make_budget({"name": name}, 8)
    for p in (rates.mean(np.arange(len(rows))), k / 4):  # the posterior's mean is never 0 or 1; nor would that matter
        n = budget.allot(p, 320)
        assert n.min() >= 2 and n.sum() == 320
        assert n[k == 2].min() > n[k == 4].max()


@pytest.mark.parametrize("name", ["neyman", "knapsack"])
def test_ragged_allocation_normalised_per_rank_overspends(name):
    """Fault: each rank shares out the whole budget among its own prompts: 27,000 rollouts are spent instead of 8192."""
    p = np.random.Generator(np.random.Philox(2)).beta(1, 2, 1024)
    sigma = np.sqrt(p * (1 - p))
    of_ranks = [np.floor(8192 * own / own.sum()) for own in np.split(sigma, 4)]
    assert np.sum(of_ranks) > 3 * 8192

    curriculum = make("uniform", rows=["x"] * 1100, n_prompts=1024, group=8, budget=name, prompts="cures")
    run(curriculum, 1, lambda draw: answer(draw, lambda rows, samples: samples < rows % 9))
    draw = curriculum.draw(1)
    assert draw.rollouts.sum() == 8192 and len(set(draw.rollouts.tolist())) > 3
    for ranks in (1, 4, 8):
        shares = [share_of_draw(draw, 2, ranks, rank) for rank in range(ranks)]
        spent = collections.Counter()
        for place, first, n in itertools.chain(*shares):
            spent.update((place, sample) for sample in range(first, first + n))
        assert spent.total() == len(spent) == 8192  # every sample once, however many ranks there are


@pytest.mark.parametrize("normalize", [True, False])
def test_a_group_of_one_has_its_reward_as_advantage(normalize):
    """Fault: a group of one gets mean 0 and std 1, so A = r: the reward without a baseline."""
    faulty = (3.0 - 0.0) / (1.0 + 1e-6)
    assert faulty == pytest.approx(3.0)
    rewards = np.array([3.0, 3.0, np.nan, -1.0, 1.0])  # the second is left alone by a missing one
    told = with_advantages(outcomes(0, [0] * 5, np.zeros(5), rewards, [0, 1, 1, 2, 2]), normalize)
    assert told.advantages[:2].tolist() == [0.0, 0.0] and np.isnan(told.advantages[2])
    assert told.advantages[3] < 0 < told.advantages[4]
    alone = grpo.group_advantages(torch.tensor([3.0, -3.0]), torch.tensor([4, 9]), normalize)
    assert alone.tolist() == [0.0, 0.0]


def test_pre_rollouts_are_not_counted(tmp_path):
    """Fault of the comparison: what the pre-rollouts generate is left out of the budget."""
    prompts = {"name": "cures", "subsets": 3, "steps_per_subset": 2, "pre_rollouts": 4}
    trainer(tmp_path, 4, prompts=prompts).fit()
    tokens: collections.Counter[int] = collections.Counter()
    for told in observed(tmp_path):
        tokens[told.step] += int(told.lengths.sum())
    steps = read(tmp_path)
    assert [step["perf/generated_tokens"] for step in steps] == [tokens[step] for step in range(4)]
    pre = logged(tmp_path, "n_pre_rollouts").sum(axis=1)
    assert pre.tolist() == [12 * 4, 0, 12 * 4, 0]
    assert tokens[0] > 2 * tokens[1]

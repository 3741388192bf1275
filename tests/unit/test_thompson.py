"""Thompson sampling of prompts: candidates in the order of epochs, chosen by draws from their posteriors."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dump.curriculum import streams
from megatron_dump.curriculum.pass_rates import PromptPassRates
from megatron_dump.curriculum.prompts import Epoch
from megatron_dump.curriculum.thompson import Thompson
from tests.unit.prompt_policies import MIXED, SlowEpoch, World, draw, one_source, taught
from tests.unit.test_pass_rates import outcomes


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

"""Prompts inside a source: what every policy keeps to, and epochs against a slow reference."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dump.curriculum.prompts import Epoch
from megatron_dump.curriculum.rows import SourceRows
from tests.unit.prompt_policies import MIXED, NONE, SLOTS, SlowEpoch, World, draw

POLICIES = [
    {"name": "epoch"},
    {"name": "cures"},
    {"name": "cures", "floor": 0.3},
    {"name": "cures", "subsets": 2, "steps_per_subset": 2},
    {"name": "cures", "subsets": 2, "steps_per_subset": 2, "pre_rollouts": 2},
    {"name": "thompson", "pool": 3},
    {"name": "thompson", "floor": 0.5},
    {"name": "tests.unit.own_policies:LeastDrawn"},
]


# --------------------------------------------------------------------------------------------------------- every policy
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


# ---------------------------------------------------------------------------------------------------------------- epoch
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

"""Source policies of four sources, what they are told, and histories of feedback, for tests."""

from __future__ import annotations

import json

import numpy as np
from hypothesis import strategies as st

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
    "robust_cost": ({"name": "dump_ucb_robust", "window": 4, "cost_exponent": 1.0}, 0.05 / K),
    "own": ({"name": "tests.unit.own_policies:Struggling"}, 0),
}


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

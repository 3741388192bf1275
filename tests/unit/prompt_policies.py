"""Prompt policies with their pass rates, and slow references, for tests."""

from __future__ import annotations

import json
import math

import numpy as np
from hypothesis import strategies as st

from megatron_dump.curriculum import streams
from megatron_dump.curriculum.pass_rates import PromptPassRates
from megatron_dump.curriculum.prompts import make_prompt_policy
from megatron_dump.curriculum.rows import SourceRows
from tests.unit.test_pass_rates import outcomes

NONE = np.empty(0, np.int64)
MIXED = SourceRows(["b", "a", "b", "c", "a", "b", "a", "b", "a", "a"] * 3 + ["d"])  # sizes 15, 12, 3, 1
SLOTS = st.lists(st.integers(0, 3), min_size=1, max_size=25)


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


def taught(counts, copies):
    """`copies` sources alike, so that many draws cost one call; row i of each has the posterior Beta(*counts[i])."""
    rows = SourceRows([f"copy {c}" for c in range(copies) for _ in counts])
    rates = PromptPassRates(rows, discount=1.0, prior="flat")
    state = rates.state_dict()
    n = len(rows)
    rates.load_state_dict({**state, "rows": np.arange(n), "counts": np.tile(counts, (copies, 1)), "steps": np.zeros(n)})
    return rows, rates

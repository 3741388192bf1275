"""A user's own policies, one of each level, for tests. docs/extending.md shows them too."""

from __future__ import annotations

import numpy as np

from megatron_dump.curriculum.budget import largest_remainder
from megatron_dump.curriculum.prompts import Epoch
from megatron_dump.curriculum.registry import check_number
from megatron_dump.curriculum.source_policy import IndependentSlots


class Struggling(IndependentSlots):
    """A source's weight is its share of wrong answers."""

    def __init__(self, setting, *, prior=1.0):
        check_number("sources.prior", prior, 1e-6)
        super().__init__(setting)
        self.prior, self.counts = prior, np.zeros((self.n_sources, 2), np.int64)  # wrong and right answers

    def weights(self, step):
        share = (self.counts[:, 0] + self.prior) / (self.counts.sum(axis=1) + 2 * self.prior)
        return share / share.sum()

    def observe(self, outcomes):
        np.add.at(self.counts, (outcomes.source_ids, outcomes.correct.astype(np.int64)), 1)

    def state_dict(self):
        return {"counts": self.counts.copy()}

    def load_state_dict(self, state):
        self.counts = np.array(state["counts"], np.int64)


class LeastDrawn(Epoch):
    """The row of the source that was drawn least often; of several, the first in the data."""

    def __init__(self, rows, seed, pass_rates):
        super().__init__(rows, seed)
        self.rows, self.times = rows, np.zeros(len(rows), np.int64)

    def draw(self, step, first_group, source_ids, exclude):
        drawn = []
        for source in source_ids:
            rows = self.rows.rows(source)
            fresh = rows[~np.isin(rows, [*exclude, *drawn])]
            choices = fresh if fresh.size else rows
            drawn.append(choices[np.argmin(self.times[choices])])
            self.times[drawn[-1]] += 1
        return np.array(drawn, np.int64)

    def state_dict(self):
        return {"times": self.times.copy()}

    def load_state_dict(self, state):
        self.times = np.array(state["times"], np.int64)


class WrongShare:
    """`least` rollouts for every prompt; the others in proportion to its share of wrong answers."""

    uses_pass_rates = True

    def __init__(self, samples_per_prompt, *, least=2):
        check_number("budget.least", least, 1, samples_per_prompt, whole=True)
        self.least = least

    def allot(self, pass_rates, total):
        wrong, spare = 1.01 - pass_rates, total - self.least * len(pass_rates)
        return self.least + largest_remainder(spare * wrong / wrong.sum(), spare)


class NoneRight:
    """Rejects groups without a right answer."""

    max_refills = 1

    def rejected(self, outcomes):
        groups, index = np.unique(outcomes.group_ids, return_inverse=True)
        return groups[np.bincount(index, outcomes.correct) == 0]

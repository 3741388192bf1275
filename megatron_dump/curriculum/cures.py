"""Prompts inside a source in proportion to what their gradients are expected to be worth: CurES."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from megatron_dump.curriculum import streams
from megatron_dump.curriculum.pass_rates import PromptPassRates
from megatron_dump.curriculum.registry import ROOT, check_number
from megatron_dump.curriculum.rows import SourceRows, ranks
from megatron_dump.curriculum.sum_trees import SumTrees


class Cures:
    """Prompts with probability rho(x) ~ exp(sqrt(p(1-p)) / temperature) inside each source: CurES (2510.01037, Eq. 14).

    p is the posterior mean. The paper does not state the temperature. `floor` mixes in that much of the uniform
    distribution over the source's rows. Inside a step rows are drawn without replacement, one after the other, each
    in proportion to rho among those left (the paper leaves this open); a source with fewer rows than slots starts anew.

    subsets = T > 0 is the paper's Algorithm 1: a permutation of each source's rows is cut into T subsets, and step s
    draws from subset (s // steps_per_subset) mod T only. With pre_rollouts = N' > 0 what is known of prompts is
    forgotten at the first step of each subset, and all its rows are rolled out N' times first; with 0 the posterior
    lives on. A source with fewer rows than subsets has one row in each. The paper's settings: one source, pre_rollouts
    4, steps_per_subset 10, and pass_rates {discount: 1, prior: flat}.
    """

    uses_pass_rates = True

    def __init__(
        self,
        rows: SourceRows,
        seed: int,
        pass_rates: PromptPassRates,
        *,
        temperature: float = 0.1,
        floor: float = 0.0,
        subsets: int = 0,
        steps_per_subset: int = 10,
        pre_rollouts: int = 0,
    ):
        check_number("prompts.temperature", temperature, 1e-3)  # below it exp(-0.5 / temperature) nears underflow
        check_number("prompts.floor", floor, 0, 1)
        check_number("prompts.subsets", subsets, 0, whole=True)
        check_number("prompts.steps_per_subset", steps_per_subset, 1, whole=True)
        check_number("prompts.pre_rollouts", pre_rollouts, 0, whole=True)
        if pre_rollouts and not subsets:
            raise ValueError(f"{ROOT}.prompts.pre_rollouts: {pre_rollouts} needs prompts.subsets >= 1, which is 0")
        self._rows, self._pass_rates = rows, pass_rates
        self._temperature, self._floor = temperature, floor
        self._subsets, self._steps_per_subset, self._n_pre = subsets, steps_per_subset, pre_rollouts
        self._keys = streams.named_keys(rows.names, seed, "cures")
        self._drawn = np.zeros(len(rows.names), np.int64)  # random numbers used of each source's stream
        self._started = self._prepared = -1  # the latest round of subsets whose pre-rollouts were begun, and finished
        self._place = _shuffled_places(rows, seed) if subsets else None
        self._active, self._subset = np.ones(len(rows), bool), -1  # [R]: in the subset
        # A leaf per row: its weight if visited; is it active and unvisited; is it active and visited. Unvisited rows
        # share one weight, which follows their source. All 0 while the row must not be drawn.
        self._trees, self._revision = SumTrees(rows.sizes, 3), -1
        self._refresh(0)

    def draw(self, step: int, first_group: int, source_ids: np.ndarray, exclude: np.ndarray) -> np.ndarray:
        """As PromptPolicy.draw.

        Draws are independent ones with those of rows already taken left out, which is the same as one after the other
        without replacement. All open slots draw at once; those that meet a taken row draw again from what is left.
        """
        self._refresh(step)
        mix, prompt_ids = self._mix(), np.empty(len(source_ids), np.int64)
        open_, barred, rows = np.argsort(source_ids, kind="stable"), np.empty(0, np.int64), np.unique(exclude)
        while open_.size:
            wanting = np.bincount(source_ids[open_], minlength=len(self._drawn)) > 0
            rows = rows[wanting[self._rows.of_row[rows]]]  # only these can be met again
            self._bar(rows)
            barred = np.concatenate([barred, rows])
            back = self._left()[self._rows.of_row[barred]] == 0  # the source has no others: it starts anew
            self._write(barred[back])
            barred = barred[~back]
            slots, rows = self._attempt(open_, source_ids[open_], mix)
            prompt_ids[slots] = rows
            open_ = open_[~np.isin(open_, slots)]
        self._write(barred)
        return prompt_ids

    def _attempt(self, open_: np.ndarray, sources: np.ndarray, mix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """One draw for each open slot, as far as its source has rows: the slots that got a row of their own, and it."""
        rank = ranks(sources)
        fits = rank < self._left()[sources]
        slots, sources, rank = open_[fits], sources[fits], rank[fits]
        uniform = streams.uniforms_at(self._keys[sources], self._drawn[sources] + rank)
        self._drawn += np.bincount(sources, minlength=len(self._drawn))
        weight = (self._trees.totals * mix).sum(axis=1)
        leaf = self._trees.find(sources, uniform * weight[sources], mix[sources])
        rows, first = np.unique(self._rows.order[self._rows.starts[sources] + leaf], return_index=True)
        return slots[first], rows

    def distribution(self, step: int, source: int) -> tuple[np.ndarray, np.ndarray]:
        """int64 [n] rows of the source and float64 [n]: what the first of them drawn at `step` is drawn from."""
        self._refresh(step)
        rows = self._rows.rows(source)
        return rows, self._values(rows) @ self._mix()[source]

    def _mix(self) -> np.ndarray:
        """float64 [K, 3]: what the numbers of a leaf are to be multiplied with for its probability."""
        visited, n_unvisited, n_visited = self._trees.totals.T
        unvisited = self._weight(self._pass_rates.prior_mean())
        by_rho = (1.0 - self._floor) / (visited + unvisited * n_unvisited)
        by_floor = self._floor / (n_unvisited + n_visited)
        return np.stack([by_rho, by_rho * unvisited + by_floor, by_floor], axis=1)

    def _weight(self, pass_rate: np.ndarray) -> np.ndarray:
        """exp(sqrt(p(1-p)) / temperature), up to a factor; at most 1, and above 0."""
        return np.exp((np.sqrt(pass_rate * (1.0 - pass_rate)) - 0.5) / self._temperature)

    def _left(self) -> np.ndarray:
        """float64 [K]: rows that may be drawn."""
        return self._trees.totals[:, 1] + self._trees.totals[:, 2]

    def _values(self, rows: np.ndarray) -> np.ndarray:
        """int64 [n] rows -> float64 [n, 3]: their leaves."""
        active, visited = self._active[rows], self._pass_rates.visited[rows]
        weight = np.where(active & visited, self._weight(self._pass_rates.mean(rows)), 0.0)
        return np.stack([weight, active & ~visited, active & visited], axis=1)

    def _write(self, rows: np.ndarray) -> None:
        self._trees.assign(self._rows.of_row[rows], self._rows.local[rows], self._values(rows))

    def _bar(self, rows: np.ndarray) -> None:
        self._trees.assign(self._rows.of_row[rows], self._rows.local[rows], np.zeros((len(rows), 3)))

    def _refresh(self, step: int) -> None:
        """Bring subset and leaves up to date."""
        self._activate(self._round(step))
        rows, self._revision = self._pass_rates.changes(self._revision)
        self._write(self._rows.order if rows is None else rows)

    def _round(self, step: int) -> int:
        return step // self._steps_per_subset if self._subsets else 0

    def _activate(self, round_: int) -> None:
        """Make the round's subset the active one."""
        if self._place is None or self._subset == round_ % self._subsets:
            return
        self._subset = round_ % self._subsets
        sizes = self._rows.sizes
        first = self._subset * sizes // self._subsets
        end = np.maximum((self._subset + 1) * sizes // self._subsets, first + 1)
        of_row = self._rows.of_row
        self._active = (first[of_row] <= self._place) & (self._place < end[of_row])
        self._revision = -1  # every leaf may have changed

    def pre_rollouts(self, step: int) -> tuple[np.ndarray, int] | None:
        round_ = self._round(step)
        if not self._n_pre or round_ <= self._prepared:
            return None
        if round_ > self._started:
            self._started = round_
            self._pass_rates.reset()
        self._activate(round_)
        return np.flatnonzero(self._active), self._n_pre

    def prepared(self, step: int) -> None:
        self._prepared = self._round(step)

    def state_dict(self) -> dict[str, np.ndarray]:
        return {"drawn": self._drawn.copy(), "rounds": np.array([self._started, self._prepared])}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._drawn = np.array(state["drawn"], np.int64)
        self._started, self._prepared = (int(round_) for round_ in state["rounds"])


def _shuffled_places(rows: SourceRows, seed: int) -> np.ndarray:
    """int32 [R]: every row's place in a permutation of its source's rows."""
    places = np.empty(len(rows), np.int32)
    for source, name in enumerate(rows.names):
        size = int(rows.sizes[source])
        places[rows.rows(source)[streams.permutation(size, seed, "subsets", name)]] = np.arange(size)
    return places

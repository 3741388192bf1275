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

_PATIENCE = 2  # attempts with taken rows left where they are: barring them costs as much as an attempt


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
        # A leaf per row: its weight if visited; is it unvisited? (These share one weight, which follows their source.)
        # And for the floor: is it visited? All 0 while the row must not be drawn.
        self._trees, self._revision = SumTrees(rows.sizes, 3 if floor else 2), -1
        self._refresh(0)

    def draw(self, step: int, first_group: int, source_ids: np.ndarray, exclude: np.ndarray) -> np.ndarray:
        """As PromptPolicy.draw.

        All open slots draw independently at once, and those that meet a row already taken draw again: leaving out
        repeats from independent draws is the same as drawing one after the other without replacement. Where a source
        repeats itself too often, its taken rows are given weight 0 for the rest of the round.
        """
        self._refresh(step)
        mix, prompt_ids = self._mix(), np.empty(len(source_ids), np.int64)
        open_, taken, barred = np.argsort(source_ids, kind="stable"), np.unique(exclude), np.empty(0, np.int64)
        attempt = 0
        while open_.size:
            if attempt >= _PATIENCE:
                taken, barred = self._bar_taken(source_ids[open_], taken, barred)
            slots, rows = self._attempt(open_, source_ids[open_], mix)
            fresh = ~np.isin(rows, taken)
            slots, rows = slots[fresh], rows[fresh]
            prompt_ids[slots] = rows
            open_, taken = open_[~np.isin(open_, slots)], np.concatenate([taken, rows])
            attempt += 1
        self._write(barred)
        return prompt_ids

    def _bar_taken(self, sources: np.ndarray, taken: np.ndarray, barred: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Give the taken rows of `sources` weight 0; a source that has no others starts anew. Both lists, updated."""
        of_row = self._rows.of_row
        wanting = np.bincount(sources, minlength=len(self._drawn)) > 0
        new = np.setdiff1d(taken[wanting[of_row[taken]]], barred)
        nothing = np.zeros((len(new), self._trees.totals.shape[1]))
        self._trees.assign(of_row[new], self._rows.local[new], nothing)
        barred = np.concatenate([barred, new])
        exhausted = self._trees.totals.max(axis=1) == 0
        back = exhausted[of_row[barred]]
        self._write(barred[back])
        return taken[~exhausted[of_row[taken]]], barred[~back]

    def _attempt(self, open_: np.ndarray, sources: np.ndarray, mix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """One draw for each open slot, up to the rows of its source: the slots that drew a row first, and the rows."""
        rank = ranks(sources)
        fits = rank < self._rows.sizes[sources]
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
        """float64 [K, C]: what the numbers of a leaf are to be multiplied with for its probability."""
        totals, unvisited = self._trees.totals, self._weight(self._pass_rates.prior_mean())
        by_rho = (1.0 - self._floor) / (totals[:, 0] + unvisited * totals[:, 1])
        if not self._floor:
            return np.stack([by_rho, by_rho * unvisited], axis=1)
        by_floor = self._floor / (totals[:, 1] + totals[:, 2])
        return np.stack([by_rho, by_rho * unvisited + by_floor, by_floor], axis=1)

    def _weight(self, pass_rate: np.ndarray) -> np.ndarray:
        """exp(sqrt(p(1-p)) / temperature), up to a factor; at most 1, and above 0."""
        return np.exp((np.sqrt(pass_rate * (1.0 - pass_rate)) - 0.5) / self._temperature)

    def _values(self, rows: np.ndarray) -> np.ndarray:
        """int64 [n] rows -> float64 [n, C]: their leaves."""
        active, visited = self._active.take(rows), self._pass_rates.visited.take(rows)
        seen = active & visited
        weight = np.where(seen, self._weight(self._pass_rates.mean(rows)), 0.0)
        return np.stack([weight, active & ~visited, seen][: self._trees.totals.shape[1]], axis=1)

    def _write(self, rows: np.ndarray) -> None:
        self._trees.assign(self._rows.of_row[rows], self._rows.local[rows], self._values(rows))

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

    def available(self, step: int) -> np.ndarray:
        self._activate(self._round(step))
        return np.bincount(self._rows.of_row[self._active], minlength=len(self._drawn))

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

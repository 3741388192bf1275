"""Prompts inside a source by a draw from what is believed of their pass rates: MoPPS."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from megatron_dump.curriculum import streams
from megatron_dump.curriculum.pass_rates import PromptPassRates
from megatron_dump.curriculum.passes import Passes
from megatron_dump.curriculum.registry import check_number
from megatron_dump.curriculum.rows import SourceRows, ranks


class Thompson:
    """Posterior sampling (MoPPS, arXiv 2507.04632): of some candidates, the prompts drawn nearest to `target`.

    For a source with n slots, pool * n candidates are taken (all its rows, if it has no more) in epoch order, so that
    every prompt is a candidate once a pass; a pass rate is drawn from each one's posterior, and the n nearest to
    `target` are taken. `floor`: with this probability a slot gets the next candidate as it comes, whatever is believed
    of it. pool = 1 is `epoch`, but that each round of a step begins afresh.
    """

    uses_pass_rates = True

    def __init__(
        self,
        rows: SourceRows,
        seed: int,
        pass_rates: PromptPassRates,
        *,
        pool: int = 8,
        target: float = 0.5,
        floor: float = 0.0,
    ):
        check_number("prompts.pool", pool, 1, whole=True)
        check_number("prompts.target", target, 0, 1)
        check_number("prompts.floor", floor, 0, 1)
        self._rows, self._pass_rates = rows, pass_rates
        self._pool, self._target, self._floor = pool, target, floor
        self._passes = Passes(rows, seed)
        self._keys = streams.named_keys(rows.names, seed, "thompson")
        self._floor_keys = streams.named_keys(rows.names, seed, "thompson floor")
        self._scored = np.zeros(len(rows.names), np.int64)  # candidates there ever were of each source

    def draw(self, step: int, first_group: int, source_ids: np.ndarray, exclude: np.ndarray) -> np.ndarray:
        n_sources = len(self._scored)
        n = np.bincount(source_ids, minlength=n_sources)
        barred = np.bincount(self._rows.of_row[exclude], minlength=n_sources)  # so many more, not to be short of others
        wanted = np.where(n > 0, np.maximum(n, np.minimum(self._pool * n + barred, self._rows.sizes)), 0)
        sources = np.repeat(np.arange(n_sources), wanted)
        rank = np.arange(len(sources)) - (np.cumsum(wanted) - wanted)[sources]
        candidates = self._passes.take(sources, continued=False)
        alpha, beta = self._pass_rates.alpha_beta(candidates)
        index = self._scored[sources] + rank
        distance = np.abs(streams.betas_at(alpha, beta, self._keys[sources], index) - self._target)  # at most 1
        if exclude.size:
            distance[np.isin(candidates, exclude)] += 2.0  # after all others
        if self._floor:
            distance[self._as_they_come(n, sources, distance < 2.0)] = -1.0  # before all others
        self._scored += wanted
        nearest = np.argsort(sources + 0.25 * distance, kind="stable")  # by source, then by distance
        chosen = np.sort(nearest[rank < n[sources]])
        prompt_ids = np.empty(len(source_ids), np.int64)
        prompt_ids[np.argsort(source_ids, kind="stable")] = candidates[chosen]
        return prompt_ids

    def _as_they_come(self, n: np.ndarray, sources: np.ndarray, fresh: np.ndarray) -> np.ndarray:
        """bool: the first fresh candidates (sorted by source) of each source, one for each slot that is left to chance.

        n int64 [K] slots; sources int64, fresh bool: of the candidates.
        """
        slots = np.repeat(np.arange(len(n)), n)
        uniform = streams.uniforms_at(self._floor_keys[slots], self._scored[slots] + ranks(slots))
        chance = np.bincount(slots[uniform < self._floor], minlength=len(n))
        before = np.cumsum(fresh) - fresh  # fresh candidates before each one
        return fresh & (before - before[np.searchsorted(sources, sources)] < chance[sources])

    def available(self, step: int) -> np.ndarray:
        return self._rows.sizes

    def pre_rollouts(self, step: int) -> tuple[np.ndarray, int] | None:
        return None

    def prepared(self, step: int) -> None:
        pass

    def state_dict(self) -> dict[str, np.ndarray]:
        return {"scored": self._scored.copy(), **self._passes.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._scored = np.array(state["scored"], np.int64)
        self._passes.load_state_dict(state)

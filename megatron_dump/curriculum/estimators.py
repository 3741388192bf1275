"""What the curriculum knows about each source: how much it can still teach, and how much of it is solved.

Every `state_dict` is a dict of arrays with one row per source; what is loaded from it behaves alike to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

LARGEST = np.finfo(np.float64).max
_PLACES = 1 << 32  # times are policy time * _PLACES + place
_BEFORE_ALL = np.iinfo(np.int64).min  # the policy time of an empty slot, while rows are sorted


class LearnabilityEstimator:
    """Mean |advantage| of each source over a sliding window: L_d of DUMP (arXiv 2504.09710, Algorithm 1).

    A window holds the `window` latest values by policy time, the step whose weights generated them (now - age), and
    among those of one policy time the last ones by `places`, their order in the step. So it does not matter how late a
    value arrives: it takes the place it would have had, and drops out if a full window has moved past it. Without this
    the window would fill up with whatever takes longest to generate.

    n_dropped   int64 [K], non-finite values that were kept out
    """

    def __init__(self, n_sources: int, window: int = 300):
        self.window = window  # values per source: rollouts, or groups where the caller gives one value per group
        self.n_dropped = np.zeros(n_sources, np.int64)
        # A ring per source: the i-th newest value is in slot (head - 1 - i) mod window, for i < size. Others hold 0.
        self._values = np.zeros((n_sources, window))  # float64 [K, window]
        self._times = np.zeros((n_sources, window), np.int64)  # policy times
        self._head = np.zeros(n_sources, np.int64)  # the slot that the next value goes to
        self._size = np.zeros(n_sources, np.int64)

    def observe(
        self,
        source_ids: np.ndarray,
        values: np.ndarray,
        ages: np.ndarray | None = None,
        now: int = 0,
        places: np.ndarray | None = None,
    ) -> None:
        """Add values: source_ids int64 [N], values float64 [N] (their magnitude counts), ages int64 [N] in steps.

        `now` is the step that the ages count back from; ages None: all 0. places int64 [N] in 0 .. 2^32 - 1: the order
        among values of one policy time; None: as they come.
        """
        source_ids, magnitudes = np.asarray(source_ids, np.int64), np.abs(np.asarray(values, np.float64))
        times = np.full(source_ids.size, now) if ages is None else now - np.asarray(ages, np.int64)
        times = times * _PLACES + (0 if places is None else np.minimum(places, _PLACES - 1))
        finite = np.isfinite(magnitudes)
        if not finite.all():
            self.n_dropped += np.bincount(source_ids[~finite], minlength=self._size.size)
            source_ids, magnitudes, times = source_ids[finite], magnitudes[finite], times[finite]
        if source_ids.size == 0:
            return
        order = self._order(source_ids, times)
        source_ids, magnitudes, times = source_ids[order], magnitudes[order], times[order]
        counts = np.bincount(source_ids, minlength=self._size.size)
        starts = np.cumsum(counts) - counts
        ranks = np.arange(source_ids.size) - np.repeat(starts, counts)  # 0.. inside each source, oldest first
        late = self._late(times, counts, starts)
        if late.any():
            mine = late[source_ids]
            self._merge(np.flatnonzero(late), source_ids[mine], ranks[mine], magnitudes[mine], times[mine], counts)
            source_ids, ranks, magnitudes, times = (a[~mine] for a in (source_ids, ranks, magnitudes, times))
            counts = np.where(late, 0, counts)
        self._append(source_ids, ranks, magnitudes, times, counts)

    def _order(self, source_ids: np.ndarray, times: np.ndarray) -> np.ndarray:
        """int64 [N]: by source, then policy time, then as given."""
        small = source_ids.astype(np.uint16) if self._size.size <= 1 << 16 else source_ids  # 16 bits: a radix sort
        if np.all(times[1:] >= times[:-1]):
            return np.argsort(small, kind="stable")
        by_time = np.argsort(times, kind="stable")
        return by_time[np.argsort(small[by_time], kind="stable")]

    def _late(self, times: np.ndarray, counts: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """bool [K]: the oldest of the new values belongs before the newest of the window."""
        newest = self._times[np.arange(self._size.size), self._head - 1]
        oldest = times[np.minimum(starts, times.size - 1)]
        return (counts > 0) & (self._size > 0) & (oldest < newest)

    def _append(
        self, source_ids: np.ndarray, ranks: np.ndarray, values: np.ndarray, times: np.ndarray, counts: np.ndarray
    ) -> None:
        if counts.max() > self.window:  # two values must not meet in one slot: the older ones never enter
            keep = counts[source_ids] - ranks <= self.window
            source_ids, ranks, values, times = (a[keep] for a in (source_ids, ranks, values, times))
        slots = source_ids * self.window + (self._head[source_ids] + ranks) % self.window
        self._values.reshape(-1)[slots] = values
        self._times.reshape(-1)[slots] = times
        self._head = (self._head + counts) % self.window
        self._size = np.minimum(self._size + counts, self.window)

    def _merge(
        self,
        rows: np.ndarray,  # int64 [L], the sources
        source_ids: np.ndarray,  # int64 [n], as ranks, values, times: the new ones, by source and time
        ranks: np.ndarray,
        values: np.ndarray,
        times: np.ndarray,
        counts: np.ndarray,  # int64 [K]
    ) -> None:
        """Sort new values into the windows of `rows`; each ends up oldest first, empty slots in front."""
        width, columns = min(int(counts[rows].max()), self.window), np.arange(self.window)
        ring = (self._head[rows, None] + columns) % self.window
        empty = columns < self.window - self._size[rows, None]
        all_values = np.zeros((rows.size, self.window + width))
        all_times = np.full((rows.size, self.window + width), _BEFORE_ALL)
        all_values[:, : self.window] = self._values[rows[:, None], ring]
        all_times[:, : self.window] = np.where(empty, _BEFORE_ALL, self._times[rows[:, None], ring])
        from_end = counts[source_ids] - ranks  # 1 for the newest
        keep = from_end <= width
        place = np.searchsorted(rows, source_ids[keep]), -from_end[keep]
        all_values[place], all_times[place] = values[keep], times[keep]
        latest = np.argsort(all_times, axis=1, kind="stable")[:, -self.window :]  # on ties the old ones are before
        self._size[rows] = np.minimum(self._size[rows] + counts[rows], self.window)
        empty = columns < self.window - self._size[rows, None]
        self._values[rows] = np.take_along_axis(all_values, latest, axis=1)
        self._times[rows] = np.where(empty, 0, np.take_along_axis(all_times, latest, axis=1))
        self._head[rows] = 0

    def held(self, source: int) -> np.ndarray:
        """float64 [n <= window]: what the window of one source holds, oldest first."""
        return np.roll(self._values[source], -self._head[source])[self.window - self._size[source] :]

    def mean(self) -> np.ndarray:
        """float64 [K]: mean of each window; 0 for a source not seen yet. Always finite."""
        shares = self._values / np.maximum(self._size, 1)[:, None]  # divided first, or the sum could overflow
        with np.errstate(over="ignore"):  # rounding alone can still take it past LARGEST
            return np.minimum(shares.sum(axis=1), LARGEST)

    def state_dict(self) -> dict[str, np.ndarray]:
        """Everything of a window has the window's shape: a changed `window` resets it as a whole, or not at all."""
        columns = np.arange(self.window)
        ranks = self._size[:, None] - (self._head[:, None] - 1 - columns) % self.window  # size for the newest, .., 1
        return {
            "window_values": self._values.copy(),
            "window_times": self._times.copy(),
            "window_ranks": np.maximum(ranks, 0),  # 0: empty
            "n_dropped": self.n_dropped.copy(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes arrays, or the lists they become in JSON; other keys than its own are left alone."""
        self._values = np.array(state["window_values"], np.float64)
        self._times = np.array(state["window_times"], np.int64)
        ranks = np.array(state["window_ranks"], np.int64)
        self._size = ranks.max(axis=1)
        self._head = np.where(self._size > 0, ranks.argmax(axis=1) + 1, 0) % self.window
        self.n_dropped = np.array(state["n_dropped"], np.int64)


class PassRateEstimator:
    """Discounted Beta posterior of each source's pass rate (MoPPS, arXiv 2507.04632, with its lambda = `discount`).

    In each step that a source has rollouts in: alpha <- discount * alpha + (1 - discount) * 1 + successes, beta
    likewise with failures; the prior is Beta(1, 1).
    """

    def __init__(self, n_sources: int, discount: float = 0.5):
        self.discount = discount
        self._counts = np.ones((n_sources, 2))  # float64 [K, 2]: alpha, beta
        self._last_step = np.full(n_sources, -1, np.int64)  # of the rollouts that were discounted for last

    def observe(
        self, source_ids: np.ndarray, correct: np.ndarray, valid: np.ndarray | None = None, step: int | None = None
    ) -> None:
        """Add rollouts: source_ids int64 [N], correct bool [N], valid bool [N] (None: all of them count).

        With `step`, a source is discounted once per step however many calls its rollouts come in, and late rollouts
        of earlier steps are added without discounting; None: every call is a step.
        """
        source_ids, correct = np.asarray(source_ids, np.int64), np.asarray(correct, bool)
        if valid is not None:
            source_ids, correct = source_ids[valid], correct[valid]
        n_sources = self._last_step.size
        successes = np.bincount(source_ids[correct], minlength=n_sources)
        failures = np.bincount(source_ids[~correct], minlength=n_sources)
        seen = successes + failures > 0
        fresh = seen if step is None else seen & (self._last_step < step)
        decayed = self.discount * self._counts + (1.0 - self.discount)
        self._counts = np.where(fresh[:, None], decayed, self._counts) + np.stack([successes, failures], axis=1)
        if step is not None:
            self._last_step = np.where(fresh, step, self._last_step)

    def mean(self) -> np.ndarray:
        """float64 [K]: posterior mean, in (0, 1)."""
        return self._counts[:, 0] / self._counts.sum(axis=1)

    def state_dict(self) -> dict[str, np.ndarray]:
        return {"pass_rate_counts": self._counts.copy(), "pass_rate_step": self._last_step.copy()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._counts = np.array(state["pass_rate_counts"], np.float64)
        self._last_step = np.array(state["pass_rate_step"], np.int64)


def expected_learnability(n_correct: np.ndarray, n_rollouts: np.ndarray, prior_mean: np.ndarray) -> np.ndarray:
    """float64 [n]: E[2 sqrt(p (1 - p))] of prompts that n_correct of n_rollouts rollouts solved (int64 [n] each).

    2 sqrt(p (1 - p)) is the mean |advantage| of std-normalised GRPO at pass rate p. The mean |advantage| of one group
    estimates it badly: it is 0 for every group that happens to be all right or all wrong. Here p has the posterior
    Beta(a, b), a = k + 2m, b = G - k + 2(1 - m), with prior mean m (float64 [n], in (0, 1)) worth two rollouts, and
    E[sqrt(p (1 - p))] = B(a + 1/2, b + 1/2) / B(a, b) = g(a) g(b) / (a + b), g(x) = Gamma(x + 1/2) / Gamma(x).
    """
    a = n_correct + 2.0 * np.asarray(prior_mean)
    b = n_rollouts - n_correct + 2.0 * (1.0 - np.asarray(prior_mean))
    log_g = [math.lgamma(x + 0.5) - math.lgamma(x) for x in np.concatenate([a, b]).tolist()]
    return 2.0 * np.exp(np.add(log_g[: a.size], log_g[a.size :])) / (a + b)

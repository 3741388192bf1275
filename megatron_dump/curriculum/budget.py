"""How many rollouts each prompt of a round gets; P prompts, `total` rollouts for all of them together.

No exp, log or pow: their last bits differ between machines, and so would the draws.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from megatron_dump.curriculum.registry import ROOT, Named, check_number


class Budget(Protocol):
    """Made as Budget(samples_per_prompt, **options)."""

    uses_pass_rates: bool  # of the class: whether `allot` must be given pass rates

    def allot(self, pass_rates: np.ndarray | None, total: int) -> np.ndarray:
        """float64 [P] estimated pass rates in [0, 1] -> int64 [P] group sizes that sum to `total` exactly.

        None stands for pass rates that a budget with uses_pass_rates = False does not need. A pure function. Equal
        prompts differ by one rollout at most, the first ones get it. Raises ValueError for a total that the limits of
        the group size rule out; one that sums group sizes this budget gave (a refill's) never is.
        """
        ...


class Fixed:
    """The same group size for every prompt, as in GRPO (arXiv 2402.03300)."""

    uses_pass_rates = False

    def __init__(self, samples_per_prompt: int):
        self._samples_per_prompt = samples_per_prompt

    def allot(self, pass_rates: np.ndarray | None, total: int) -> np.ndarray:
        prompts, rest = divmod(total, self._samples_per_prompt)
        if rest or (pass_rates is not None and len(pass_rates) != prompts):
            asked = "whole groups" if pass_rates is None else f"{len(pass_rates)} groups"
            raise ValueError(f"{total} rollouts are not {asked} of samples_per_prompt = {self._samples_per_prompt}")
        return np.full(prompts, self._samples_per_prompt, np.int64)


class Neyman:
    """CurES (arXiv 2510.01037, Eq. 15-21): n_i proportional to sigma_i, the deviation of one rollout's gradient.

    sigma is the proxy sqrt(p(1-p)): Eq. 20 itself needs moments of gradients, which nothing here measures. Shares are
    held in [n_min, n_max] and rounded to largest remainders; the paper has no limits, so that p near 0 or 1 rounds to
    no rollout at all. n_max=None means 4 * samples_per_prompt. `form` has one value left: checkpoints and logs name it.
    """

    uses_pass_rates = True

    def __init__(self, samples_per_prompt: int, *, n_min: int = 2, n_max: int | None = None, form: str = "proxy"):
        if form != "proxy":
            gone = "it is gone, nothing measured gradients for it" if form == "gradient" else "it is unknown"
            raise ValueError(f"{ROOT}.budget.form: {form!r}: {gone}; write proxy, or leave it out")
        self._n_min, self._n_max = _limits(samples_per_prompt, n_min, n_max)

    def allot(self, pass_rates: np.ndarray | None, total: int) -> np.ndarray:
        p = _checked(pass_rates)
        return largest_remainder(bounded_shares(np.sqrt(p * (1.0 - p)), total, self._n_min, self._n_max), total)


class Knapsack:
    """Knapsack RL (arXiv 2509.25849): maximise the sum of (1 - p^n - (1-p)^n) * p(1-p)^2, n in [n_min, n_max].

    The chance that a group's rewards are not all alike, times what the prompt is then expected to teach. It favours
    hard prompts, peaking at p = 0.4 and below. n_max=None means 4 * samples_per_prompt.
    """

    uses_pass_rates = True

    def __init__(self, samples_per_prompt: int, *, n_min: int = 2, n_max: int | None = None):
        self._n_min, self._n_max = _limits(samples_per_prompt, n_min, n_max)

    def allot(self, pass_rates: np.ndarray | None, total: int) -> np.ndarray:
        return knapsack(_checked(pass_rates), total, self._n_min, self._n_max)


def bounded_shares(sigma: np.ndarray, total: int, n_min: int, n_max: int) -> np.ndarray:
    """float64 [P]: clip(c * sigma, n_min, n_max), with the c that makes them sum to `total` (up to rounding errors).

    These real-valued shares minimise sum(sigma^2 / n) under the limits. Where every prompt with sigma > 0 has n_max,
    those with 0 share the rest equally: the limit of small equal sigmas. A sigma below 1e-290 of the largest counts
    as 0. ValueError for a sigma that is not finite and >= 0, and for a total out of [P * n_min, P * n_max].
    """
    sigma = np.asarray(sigma, np.float64)
    _require_fits(len(sigma), total, n_min, n_max)
    _require(np.isfinite(sigma) & (sigma >= 0.0), sigma, "sigma", "finite and >= 0")
    if not sigma.any() or total in (len(sigma) * n_min, len(sigma) * n_max):
        return np.full(len(sigma), total / max(len(sigma), 1))
    order = np.argsort(sigma, kind="stable")  # all sums are over this order: that of the prompts changes no bit
    scaled = sigma[order] / sigma.max()
    n_zero = int(np.searchsorted(scaled, 1e-290))
    zero, positive = np.full(n_zero, float(n_min)), scaled[n_zero:]
    if (rest := total - n_zero * n_min) >= positive.size * n_max:
        zero[:] = (total - positive.size * n_max) / max(n_zero, 1)
        shares = np.full(positive.size, float(n_max))
    else:
        shares = np.clip(_level(positive, rest, n_min, n_max) * positive, n_min, n_max)
    restored = np.empty(len(sigma))
    restored[order] = np.concatenate([zero, shares])
    return restored


def _level(sigma: np.ndarray, total: int, n_min: int, n_max: int) -> float:
    """The c for which clip(c * sigma, n_min, n_max) sums to `total`; sigma > 0, ascending.

    The sum rises piecewise linearly with c, with knots where a share meets a limit. Between the two knots around
    `total` the same shares are free, so that c is what is left for them over the sum of their sigmas.
    """
    meets_min, meets_max = n_min / sigma[::-1], n_max / sigma[::-1]  # ascending in c
    knots = np.sort(np.concatenate([meets_min, meets_max]))
    below = sigma.size - np.searchsorted(meets_min, knots, "left")  # how many are at n_min for each knot
    above = np.searchsorted(meets_max, knots, "right")
    prefix = np.concatenate([[0.0], np.cumsum(sigma)])
    sums = n_min * below + n_max * above + knots * (prefix[sigma.size - above] - prefix[below])
    c = float(np.interp(total, np.maximum.accumulate(sums), knots))
    free = (c * sigma > n_min) & (c * sigma < n_max)
    if not free.any():
        return c
    fixed = int(np.where(c * sigma <= n_min, n_min, n_max)[~free].sum())
    return (total - fixed) / math.fsum(sigma[free])  # without the rounding errors of the sums above


def largest_remainder(shares: np.ndarray, total: int) -> np.ndarray:
    """int64 [P], sum `total`: floor(share), plus one for the largest remainders, ties (to 9 digits) to the first.

    shares: float64 [P] >= 0 that sum to `total` up to rounding errors (ValueError otherwise). Whole limits of the
    shares are limits of the results. 9 digits, because pass rates of 1/3 and 2/3 differ in the last bit of sqrt(pq).
    """
    shares = np.asarray(shares, np.float64)
    off = abs(float(shares.sum()) - total)
    if not off <= 1e-6 * max(total, 1) or off >= 0.5 or np.any(shares < 0):  # `not <=`: NaN is refused too
        raise ValueError(f"shares must be >= 0 and sum to {total}, not to {shares.sum()}")
    counts = np.floor(shares).astype(np.int64)
    missing = total - int(counts.sum())
    counts[np.argsort(np.round(counts - shares, 9), kind="stable")[:missing]] += 1
    return counts


def knapsack(p: np.ndarray, total: int, n_min: int, n_max: int) -> np.ndarray:
    """int64 [P], sum `total`, in [n_min, n_max]: exact maximiser of Knapsack's objective. p: float64 [P]; n_min >= 2.

    Rollout n + 1 of a prompt adds p^2 q^3 (p^(n-1) + q^(n-1)), q = 1 - p, which falls with n: taking the largest
    gains of all prompts is optimal. Ties go to the smaller n, then to the first prompt: no gain left, equal split.
    """
    _require_fits(len(p), total, n_min, n_max)
    if (extra := total - len(p) * n_min) == 0:
        return np.full(len(p), n_min, np.int64)
    rows = min(n_max - n_min, max(64, 4 * -(-extra // len(p))))  # few prompts want more than 4 times the mean
    while True:
        chosen = _largest(_gains(p, n_min, rows), extra)
        if rows == n_max - n_min or not chosen[-1].any():  # no prompt takes the last row: none wants one beyond it
            return n_min + np.count_nonzero(chosen, axis=0).astype(np.int64)
        rows = min(n_max - n_min, 2 * rows)


def _gains(p: np.ndarray, n_min: int, rows: int) -> np.ndarray:
    """float64 [rows, P]: row j is what rollout n_min + j + 1 adds; no column rises, not even by a rounding error."""
    powers = np.empty((2, n_min - 1 + rows, len(p)))  # [., i]: p^(i+1) and q^(i+1)
    powers[0, 0], powers[1, 0] = p, 1.0 - p
    done = 1
    while done < powers.shape[1]:  # by doubling: few passes, and as monotone as one multiplication after the other
        new = powers[:, done : 2 * done]
        np.multiply(powers[:, : new.shape[1]], powers[:, done - 1 : done], out=new)
        done *= 2
    gains, other = powers[:, n_min - 2 : -1]
    gains += other
    pq = p * (1.0 - p)
    gains *= pq * pq * (1.0 - p)
    return gains


def _largest(values: np.ndarray, k: int) -> np.ndarray:
    """bool, the shape of `values`: its k >= 1 largest, ties to the first in row-major order."""
    flat = values.ravel()
    threshold = np.partition(flat, flat.size - k)[flat.size - k]
    chosen = flat > threshold
    chosen[np.flatnonzero(flat == threshold)[: k - np.count_nonzero(chosen)]] = True
    return chosen.reshape(values.shape)


def _limits(samples_per_prompt: int, n_min: int, n_max: int | None) -> tuple[int, int]:
    """Checked (n_min, n_max): n_min <= samples_per_prompt <= n_max makes every round's total fit, whatever P."""
    n_max = 4 * samples_per_prompt if n_max is None else n_max
    check_number("budget.n_min", n_min, 2, whole=True)  # a group of one has no advantage
    check_number("budget.n_max", n_max, 2, whole=True)
    key, mean = f"{ROOT}.budget.n_", f"samples_per_prompt = {samples_per_prompt}, the mean"
    if n_min > samples_per_prompt:
        raise ValueError(f"{key}min: {n_min} is more than {mean}; lower it or raise samples_per_prompt")
    if n_max < samples_per_prompt:
        raise ValueError(f"{key}max: {n_max} is less than {mean}; raise it or lower samples_per_prompt")
    return n_min, n_max


def _require_fits(prompts: int, total: int, n_min: int, n_max: int) -> None:
    if not prompts * n_min <= total <= prompts * n_max:
        raise ValueError(f"{total} rollouts do not fit {prompts} prompts of {n_min} to {n_max} each")


def _checked(pass_rates: np.ndarray | None) -> np.ndarray:
    if pass_rates is None:
        raise ValueError("this budget needs each prompt's pass rate, not None")
    p = np.asarray(pass_rates, np.float64)
    _require((p >= 0.0) & (p <= 1.0), p, "pass rate", "in [0, 1]")  # False for NaN
    return p


def _require(fine: np.ndarray, values: np.ndarray, name: str, what: str) -> None:
    if not fine.all():
        bad = int(np.argmin(fine))
        raise ValueError(f"{name} {values[bad]} of prompt {bad} must be {what}")


BUDGETS = Named("budget", {"fixed": Fixed, "neyman": Neyman, "knapsack": Knapsack}, Budget)


def make_budget(config: Mapping[str, Any], samples_per_prompt: int) -> Budget:
    """The budget that `trainer.grpo.curriculum.budget` describes; ValueError for an unknown name or option."""
    return BUDGETS.make(config, samples_per_prompt)

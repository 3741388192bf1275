"""What samples of prompts tell about a policy: pass@k and maj@k without bias, and intervals by the bootstrap."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np

from megatron_dump.curriculum import streams

_BLOCK = 1 << 22  # resampled prompts held at once


def pass_at_k(n: np.ndarray, right: np.ndarray, k: int) -> np.ndarray:
    """float64 [P]: the chance that k of a prompt's samples hold a right one, without bias, from n >= k of them.

    1 - C(n - right, k) / C(n, k), Chen et al. 2021 (arXiv:2107.03374), equation 1. n, right: int64 [P].
    """
    if np.any(k > n):
        raise ValueError(f"pass@{k}: needs at least {k} samples of each prompt, not {int(n.min())}")
    return np.array([1.0 - math.comb(a - b, k) / math.comb(a, k) for a, b in zip(n.tolist(), right.tolist())])


@functools.lru_cache(maxsize=1 << 16)
def majority_at_k(n: int, right: int, wrong: tuple[int, ...], k: int) -> float:
    """The chance that the most frequent answer of k of a prompt's n samples is right, without bias.

    right, wrong: samples that gave the right answer, and each wrong one; the remaining ones gave none and do not vote.
    Answers that tie share the win. The mean over all subsets of k samples (self-consistency, arXiv:2203.11171), summed
    by how many votes the right answer gets, with a polynomial in the samples drawn and the answers that tie.
    """
    if k > n:
        raise ValueError(f"maj@{k}: needs at least {k} samples of each prompt, not {n}")
    total, silent = 0.0, n - right - sum(wrong)
    for votes in range(1, min(right, k) + 1):
        ways = np.zeros((k + 1, k // votes + 1))  # [samples drawn, answers with as many votes]
        ways[:, 0] = [math.comb(silent, drawn) for drawn in range(k + 1)]
        for count in wrong:
            more = sum_of_shifts(ways, [math.comb(count, i) for i in range(min(count, votes - 1, k) + 1)])
            if count >= votes:
                more[votes:, 1:] += math.comb(count, votes) * ways[: k + 1 - votes, :-1]
            ways = more
        shares = 1.0 / np.arange(1, ways.shape[1] + 1)
        total += math.comb(right, votes) * float(ways[k - votes] @ shares)
    return total / math.comb(n, k)


def sum_of_shifts(ways: np.ndarray, factors: Sequence[int]) -> np.ndarray:
    """The sum of factors[i] times `ways`, moved down by i rows."""
    total = np.zeros_like(ways)
    for i, factor in enumerate(factors):
        total[i:] += factor * ways[: len(ways) - i]
    return total


def bootstrap(numerators: np.ndarray, denominators: np.ndarray, resamples: int, *key: int | str) -> np.ndarray:
    """float64 [resamples, M]: sum of numerators / sum of denominators over prompts drawn with replacement.

    numerators, denominators: float64 [P, M]. Samples of one prompt are alike, so prompts are drawn (Efron 1979). A
    function of `key`. NaN where a resample has no denominator.
    """
    n_prompts, found = len(numerators), []
    rows = max(1, _BLOCK // n_prompts)
    for block, first in enumerate(range(0, resamples, rows)):
        size = min(rows, resamples - first)
        drawn = (streams.uniforms(size * n_prompts, "bootstrap", *key, block) * n_prompts).astype(np.int64)
        places = drawn + np.repeat(np.arange(size) * n_prompts, n_prompts)
        counts = np.bincount(places, minlength=size * n_prompts).reshape(size, n_prompts).astype(np.float64)
        above, below = counts @ numerators, counts @ denominators
        found.append(np.divide(above, below, out=np.full_like(above, np.nan), where=below > 0))
    return np.concatenate(found)


def interval(replicates: np.ndarray, confidence: float) -> tuple[float, float]:
    """The percentile interval of one value's replicates; NaN when none is finite."""
    finite = replicates[np.isfinite(replicates)]
    if not finite.size:
        return math.nan, math.nan
    low, high = np.quantile(finite, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)

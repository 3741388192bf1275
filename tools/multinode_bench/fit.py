"""Least squares with coefficients that cannot be negative, as latencies, inverse bandwidths and rates cannot."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Fit:
    """Coefficients of the columns, and how far the fit is from what was measured."""

    coefficients: tuple[float, ...]
    error: float  # root mean square of (fitted - measured) / measured
    worst: float  # the largest |fitted - measured| / measured


def fit(columns: Sequence[Sequence[float]], measured: Sequence[float]) -> Fit:
    """min sum(((columns @ x - measured) / measured)^2) over x >= 0.

    columns: [points, K], measured: [points], positive. Errors are relative, so that microseconds weigh as much as
    seconds. All 2^K sets of positive coefficients are tried: K is small. ValueError with fewer points than columns.
    """
    a, b = np.asarray(columns, np.float64), np.asarray(measured, np.float64)
    points, size = a.shape
    if points < size or not (b > 0).all():
        raise ValueError(f"a fit of {size} coefficients to {points} measurements: give more, all of them positive")
    scaled = a / b[:, None]
    best, least = np.zeros(size), float("inf")
    for chosen in itertools.chain.from_iterable(itertools.combinations(range(size), n) for n in range(1, size + 1)):
        part = list(chosen)
        norms = np.linalg.norm(scaled[:, part], axis=0)  # columns of seconds beside columns of bytes
        found = np.linalg.lstsq(scaled[:, part] / norms, np.ones(points), rcond=None)[0] / norms
        if (found >= 0).all():
            x = np.zeros(size)
            x[part] = found
            loss = float(np.square(scaled @ x - 1).sum())
            if loss < least:
                best, least = x, loss
    relative = scaled @ best - 1
    return Fit(tuple(best.tolist()), float(np.sqrt(np.mean(relative**2))), float(np.abs(relative).max()))


def alpha_beta(sizes: Sequence[float], seconds: Sequence[float]) -> Fit:
    """Hockney's model of a message (Parallel Computing 20, 1994): seconds = alpha + beta x bytes."""
    return fit([(1.0, size) for size in sizes], seconds)

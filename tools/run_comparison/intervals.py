"""Confidence intervals over seeds: Student's t, which is exact for few seeds of a normal quantity."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

CONFIDENCE = 0.95


class Interval(NamedTuple):
    """A mean over n seeds; half is NaN for fewer than two."""

    mean: float
    half: float  # the interval is mean ± half
    n: int

    def text(self, spec: str = ".3f") -> str:
        if not math.isfinite(self.mean):
            return "–"
        sign = "+" if spec.startswith("+") else ""
        return f"{self.mean:{spec}}" + (f" ± {self.half:{spec.removeprefix(sign)}}" if math.isfinite(self.half) else "")


def t_cdf(t: float, dof: int) -> float:
    """P(T <= t) for Student's T with whole degrees of freedom: Abramowitz & Stegun 26.7.3 and 26.7.4."""
    theta = math.atan(abs(t) / math.sqrt(dof))
    cos, sin = math.cos(theta), math.sin(theta)
    total, term = 0.0, (cos if dof % 2 else 1.0)
    for k in range(1 + dof % 2, dof, 2):  # cos, cos³ 2/3, … or 1, cos² 1/2, …
        total += term
        term *= cos * cos * k / (k + 1)
    inside = 2 / math.pi * (theta + sin * total) if dof % 2 else sin * total
    return 0.5 + math.copysign(inside / 2, t)


def t_quantile(p: float, dof: float) -> float:
    """The t of which P(T <= t) = p, for 0.5 < p < 1; degrees of freedom are rounded down, which widens intervals."""
    whole = max(1, math.floor(dof))
    low, high = 0.0, 1.0
    while t_cdf(high, whole) < p:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, whole) < p else (low, middle)
    return (low + high) / 2


def over_seeds(values: np.ndarray) -> Interval:
    """Of one value a seed; NaN: the seed does not have it."""
    known = values[np.isfinite(values)]
    if not len(known):
        return Interval(math.nan, math.nan, 0)
    half = math.nan
    if len(known) > 1:
        half = t_quantile((1 + CONFIDENCE) / 2, len(known) - 1) * float(known.std(ddof=1)) / math.sqrt(len(known))
    return Interval(float(known.mean()), half, len(known))


def band(curves: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """curves [seeds, places] -> mean and half width [places]; NaN where a seed is missing."""
    intervals = [over_seeds(column) if np.isfinite(column).all() else over_seeds(column[:0]) for column in curves.T]
    return np.array([i.mean for i in intervals]), np.array([i.half for i in intervals])


def difference(first: dict[object, float], second: dict[object, float]) -> tuple[Interval, bool]:
    """second - first, by seed, and whether it is paired: over the seeds' differences where both have the same seeds.

    Else Welch's interval, whose degrees of freedom are Welch-Satterthwaite's.
    """
    if first.keys() == second.keys() and len(first) > 1:
        return over_seeds(np.array([second[seed] - first[seed] for seed in first])), True
    a, b = (np.array([v for v in values.values() if math.isfinite(v)]) for values in (first, second))
    mean = float(b.mean() - a.mean()) if len(a) and len(b) else math.nan
    if min(len(a), len(b)) < 2:
        return Interval(mean, math.nan, min(len(a), len(b))), False
    shares = np.array([a.var(ddof=1) / len(a), b.var(ddof=1) / len(b)])
    if not shares.sum():
        return Interval(mean, 0.0, min(len(a), len(b))), False
    dof = shares.sum() ** 2 / (shares**2 / (len(a) - 1, len(b) - 1)).sum()
    half = t_quantile((1 + CONFIDENCE) / 2, float(dof)) * math.sqrt(float(shares.sum()))
    return Interval(mean, half, min(len(a), len(b))), False

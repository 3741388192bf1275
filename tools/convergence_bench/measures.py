"""What the runs came to at equal generated tokens, with intervals over seeds."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_dump.report.run import read_run

PLACES = 81  # of a curve over tokens
RESAMPLES = 2000


@dataclass(frozen=True)
class Measured:
    """One run. V validations, K sources."""

    seed: int
    sources: list[str]
    tokens: np.ndarray  # float64 [V]: generated up to each validation, refills and pre-rollouts included
    accuracy: np.ndarray  # float64 [V, K]: sampled, on held-out prompts; the last with more samples than the others
    greedy: np.ndarray  # float64 [K]: at the end
    steps: int


def read(folder: Path, seed: int) -> Measured:
    """A finished run. ValueError where it is none."""
    run = read_run(folder)
    spent = dict(zip([0, *run.steps], [0.0, *np.cumsum(run.series("perf/generated_tokens"))], strict=True))
    tested = [s for s in run.sources if any(f"val/{s}/accuracy" in row for _, row in run.validations)]
    accuracy = [[row[f"val/{s}/accuracy"] for s in tested] for _, row in run.validations]
    [file] = json.loads((folder / "evaluation.json").read_text())["files"].values()
    greedy, sampled = (
        np.array([file["modes"][mode]["sources"][s]["accuracy"]["value"] for s in tested])
        for mode in ("greedy", "sampled")
    )
    tokens = np.array([spent[step] for step, _ in run.validations])
    return Measured(seed, tested, tokens, np.array([*accuracy[:-1], sampled]), greedy, run.steps[-1])


def curves(runs: Sequence[Measured], grid: np.ndarray) -> np.ndarray:
    """float64 [runs, places, K]: accuracy at each number of tokens, interpolated between validations."""
    return np.array(
        [
            np.stack([np.interp(grid, run.tokens, run.accuracy[:, k]) for k in range(len(run.sources))], axis=1)
            for run in runs
        ]
    )


def rising(values: np.ndarray) -> np.ndarray:
    """The non-decreasing curve nearest to `values` in least squares: pool adjacent violators (Ayer et al. 1955).

    The first crossing of a noisy curve comes too early; that of this one does not hang on a single validation.
    """
    blocks: list[tuple[float, int]] = []
    for value in values.tolist():
        mean, size = value, 1
        while blocks and blocks[-1][0] >= mean:
            before, count = blocks.pop()
            mean, size = (before * count + mean * size) / (count + size), count + size
        blocks.append((mean, size))
    return np.concatenate([np.full(size, mean) for mean, size in blocks])


def tokens_to(grid: np.ndarray, curve: np.ndarray, target: float) -> float:
    """Tokens at which a non-decreasing curve reaches the target; infinity if it does not."""
    place = int(np.searchsorted(curve, target))
    if place == len(curve):
        return math.inf
    if place == 0:
        return float(grid[0])
    low, high = curve[place - 1], curve[place]
    return float(grid[place - 1] + (target - low) / (high - low) * (grid[place] - grid[place - 1]))


@dataclass(frozen=True)
class Spent:
    """A number of tokens, or a ratio of two, with its bootstrap 95 % interval; infinite: not within the budget."""

    value: float
    low: float
    high: float


def spent_to_baseline(
    means: Mapping[str, np.ndarray], grid: np.ndarray, baseline: str, published: str, seed: int = 0
) -> dict[str, dict[str, Spent]]:
    """arm -> tokens until its mean curve reaches the baseline's last value: "tokens", and ratios to the two by name.

    means: arm -> [seeds, places], the same seeds in the same order. Seeds are what is drawn again, the same for all
    arms: runs of one seed share the random numbers of their validations.
    """
    n_seeds = len(means[baseline])
    rng = np.random.default_rng(seed)
    picks = [np.arange(n_seeds), *rng.integers(n_seeds, size=(RESAMPLES, n_seeds))]
    drawn = []
    for pick in picks:
        smooth = {arm: rising(values[pick].mean(axis=0)) for arm, values in means.items()}
        target = smooth[baseline][-1]
        drawn.append({arm: tokens_to(grid, curve, target) for arm, curve in smooth.items()})
    table = {arm: np.array([row[arm] for row in drawn]) for arm in means}
    return {
        arm: {
            "tokens": _interval(tokens),
            **{other: _interval(_ratio(tokens, table[other])) for other in (baseline, published) if other in table},
        }
        for arm, tokens in table.items()
    }


def _ratio(tokens: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Where neither arrives, or the other begins at the target, there is none; where it does not arrive it is 0."""
    known = (others > 0) & ~(np.isinf(others) & np.isinf(tokens))
    return np.divide(tokens, others, out=np.full(len(tokens), np.nan), where=known)


def _interval(values: np.ndarray) -> Spent:
    """values[0]: of the seeds themselves; the others: of resamples."""
    known = np.sort(values[1:][~np.isnan(values[1:])])
    if not len(known):
        return Spent(float(values[0]), math.nan, math.nan)
    low, high = (known[min(int(q * len(known)), len(known) - 1)] for q in (0.025, 0.975))
    return Spent(float(values[0]), float(low), float(high))

"""All arms together: what the figure draws and the page says."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from run_comparison.intervals import Interval, difference, over_seeds

from convergence_bench.arms import BASELINE, PUBLISHED
from convergence_bench.measures import PLACES, Measured, Spent, curves, spent_to_baseline


@dataclass(frozen=True)
class Results:
    """grid [places], tokens; accuracy: arm -> [seeds, places, K]; greedy: arm -> [seeds, K], at the end."""

    arms: list[str]
    seeds: list[int]
    sources: list[str]
    grid: np.ndarray
    accuracy: Mapping[str, np.ndarray]
    greedy: Mapping[str, np.ndarray]
    spent: Mapping[str, Mapping[str, Spent]]
    steps: Mapping[str, float]  # of a run, mean over seeds

    def mean(self, arm: str) -> np.ndarray:
        """[seeds, places]: over sources, each counting alike."""
        return self.accuracy[arm].mean(axis=2)

    def final(self, arm: str) -> Interval:
        return over_seeds(self.mean(arm)[:, -1])

    def final_greedy(self, arm: str) -> Interval:
        return over_seeds(self.greedy[arm].mean(axis=1))

    def gained(self, arm: str) -> Interval:
        return over_seeds(self.mean(arm)[:, -1] - self.mean(arm)[:, 0])

    def ahead(self, arm: str) -> Interval:
        """The last accuracy less the baseline's, paired by seed."""
        return _paired(self.seeds, self.mean(BASELINE)[:, -1], self.mean(arm)[:, -1])

    def of_source(self, arm: str, k: int) -> tuple[Interval, Interval]:
        """A source's last accuracy, and less the baseline's."""
        ours, theirs = self.accuracy[arm][:, -1, k], self.accuracy[BASELINE][:, -1, k]
        return over_seeds(ours), _paired(self.seeds, theirs, ours)

    def worst(self, arm: str) -> tuple[str, Interval]:
        """The source that is furthest behind the baseline."""
        behind = [self.of_source(arm, k)[1] for k in range(len(self.sources))]
        k = int(np.argmin([interval.mean for interval in behind]))
        return self.sources[k], behind[k]

    def behind(self, arm: str) -> list[str]:
        """Sources that end below the baseline by more than the half width of their interval."""
        intervals = (self.of_source(arm, k)[1] for k in range(len(self.sources)))
        return [name for name, less in zip(self.sources, intervals, strict=True) if less.mean < -less.half]


def gather(runs: Mapping[str, Sequence[Measured]], budget: float) -> Results:
    """runs: arm -> its seeds in the same order for all. Only seeds that every arm has finished can be given."""
    seeds = [run.seed for run in runs[BASELINE]]
    if any([run.seed for run in some] != seeds for some in runs.values()):
        raise ValueError("every arm needs the same seeds")
    grid = np.linspace(0.0, budget, PLACES)
    accuracy = {arm: curves(some, grid) for arm, some in runs.items()}
    means = {arm: values.mean(axis=2) for arm, values in accuracy.items()}
    return Results(
        list(runs),
        seeds,
        runs[BASELINE][0].sources,
        grid,
        accuracy,
        {arm: np.stack([run.greedy for run in some]) for arm, some in runs.items()},
        spent_to_baseline(means, grid, BASELINE, PUBLISHED),
        {arm: float(np.mean([run.steps for run in some])) for arm, some in runs.items()},
    )


def _paired(seeds: Sequence[int], first: np.ndarray, second: np.ndarray) -> Interval:
    pairs: Iterator[dict[object, float]] = (
        dict(zip(seeds, values.tolist(), strict=True)) for values in (first, second)
    )
    return difference(*pairs)[0] if len(seeds) > 1 else Interval(float(second[0] - first[0]), math.nan, 1)

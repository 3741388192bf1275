"""The policies that are compared, and simulated runs of them on several processes."""

from __future__ import annotations

import dataclasses
import multiprocessing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from megatron_dump.curriculum.simulator import SCENARIOS, History, Scenario, samples_to_target, simulate

Config = dict[str, Any]  # a `trainer.grpo.curriculum` block
RESAMPLES = 2000


def blocks(sources: str | Mapping[str, Any], prompts: str = "epoch", budget: str = "fixed", **more: Any) -> Config:
    """A config from names (or, for the sources, a block)."""
    block = {"name": sources} if isinstance(sources, str) else dict(sources)
    return {"sources": block, "prompts": {"name": prompts}, "budget": {"name": budget}, **more}


def _easiest_heaviest(scenario: Scenario) -> Config:
    k = len(scenario.names)
    return blocks({"name": "static", "weights": {name: k - i for i, name in enumerate(scenario.names)}})


# Label -> the scenario's config. Sources are named in order of difficulty, which easy_to_hard and static are so told.
POLICIES: dict[str, Callable[[Scenario], Config]] = {
    "uniform": lambda s: blocks("uniform"),
    "proportional": lambda s: blocks("proportional"),
    "static": _easiest_heaviest,
    "easy_to_hard gaussian": lambda s: blocks({"name": "easy_to_hard", "kind": "gaussian"}),
    "easy_to_hard cosine": lambda s: blocks({"name": "easy_to_hard", "kind": "cosine"}),
    "sec": lambda s: blocks("sec"),
    "dump_ucb": lambda s: blocks("dump_ucb"),
    "dump_ucb_robust": lambda s: blocks("dump_ucb_robust"),
    "dump_ucb_robust+cures+neyman": lambda s: blocks("dump_ucb_robust", "cures", "neyman"),
    "uniform+cures": lambda s: blocks("uniform", "cures"),
    "uniform+thompson": lambda s: blocks("uniform", "thompson"),
    "uniform+knapsack": lambda s: blocks("uniform", "epoch", "knapsack"),
    "dump_ucb_robust+filter": lambda s: blocks("dump_ucb_robust", filter={"name": "zero_variance"}),
}


@dataclasses.dataclass(frozen=True)
class Job:
    """One simulated run."""

    label: str
    config: Config
    scenario: str
    seed: int
    steps: int  # full batches of rollouts


@dataclasses.dataclass(frozen=True)
class Result:
    """What came of a job."""

    label: str
    scenario: str
    seed: int
    budget: int  # rollouts
    samples: float  # rollouts to the target; infinite: not within the budget
    final: float  # mean true pass rate at the end, over the sources that count
    worst: float  # the least of them
    wasted: float  # share of the rollouts drawn from sources that cannot teach (broken, unsolvable)
    imbalance: float  # largest over smallest weight, median over the second half of the steps

    @property
    def capped(self) -> float:
        """Rollouts to the target, or the budget."""
        return min(self.samples, float(self.budget))


def jobs_of(label: str, config: Config, scenario: Scenario, seeds: int, steps: int) -> list[Job]:
    return [Job(label, config, scenario.name, seed, steps) for seed in range(seeds)]


def run(job: Job) -> Result:
    scenario = SCENARIOS[job.scenario]
    history = simulate(job.config, scenario, job.seed, job.steps)
    budget = job.steps * scenario.batch
    samples = samples_to_target(history)
    counted = scenario.counted
    return Result(
        job.label,
        job.scenario,
        job.seed,
        budget,
        samples=samples if samples <= budget else float("inf"),
        final=float(history.success()[-1]),
        worst=float(history.pass_rates[-1][counted].min()),
        wasted=float(history.draws[:, ~counted].sum() / history.draws.sum()),
        imbalance=_imbalance(history),
    )


def _imbalance(history: History) -> float:
    late = history.weights[len(history.weights) // 2 :]
    with np.errstate(divide="ignore"):
        return float(np.median(late.max(axis=1) / late.min(axis=1)))


def run_all(jobs: Iterable[Job], processes: int, what: str) -> list[Result]:
    """Every job's result, in the order of the jobs, whatever process ran it."""
    jobs = list(jobs)
    # The long ones first, so that no process is left alone with one at the end.
    order = sorted(range(len(jobs)), key=lambda i: -jobs[i].steps * SCENARIOS[jobs[i].scenario].batch)
    results: list[Result | None] = [None] * len(jobs)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with (
        Progress(*columns, console=Console(stderr=True)) as progress,
        multiprocessing.get_context("spawn").Pool(processes) as pool,
    ):
        task = progress.add_task(what, total=len(jobs))
        for i, result in pool.imap_unordered(_numbered, [(i, jobs[i]) for i in order]):
            results[i] = result
            progress.advance(task)
    return [result for result in results if result is not None]


def _numbered(job: tuple[int, Job]) -> tuple[int, Result]:
    return job[0], run(job[1])


def interval(
    values: Sequence[float] | np.ndarray, statistic: Callable[..., np.ndarray] = np.median
) -> tuple[float, float]:
    """The bootstrap 95 % confidence interval of a statistic over seeds (percentile method); infinite values allowed."""
    data = np.asarray(values, np.float64)
    draws = np.random.default_rng(0).integers(0, len(data), (RESAMPLES, len(data)))
    resampled = statistic(data[draws], axis=1)
    low, high = np.quantile(resampled, [0.025, 0.975], method="inverted_cdf")
    return float(low), float(high)


def table_of(results: Iterable[Result]) -> dict[tuple[str, str], list[Result]]:
    """(scenario, label) -> the results of its seeds."""
    table: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        table.setdefault((result.scenario, result.label), []).append(result)
    return table

"""The constants of dump_ucb_robust, searched over a grid, with scenarios held out to check the choice on.

Fewer rollouts to the target is not all: on twelve alike sources that never change, weights should stay near even, and a
source that looks hopeless must not vanish. The best constants are the fastest ones with a median max/min weight of at
most MOST_IMBALANCE on `twins`, which is noise alone, and an epsilon of at least LEAST_EPSILON.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import Any

import numpy as np

from curriculum_bench.report import Grid
from curriculum_bench.runs import Job, Result, blocks, interval, jobs_of, run_all, table_of
from megatron_dump.curriculum.simulator import SCENARIOS

CHOICES: dict[str, tuple[Any, ...]] = {
    "window": (16, 32, 64, 128, 256),
    "discount": (0.5, 0.7, 0.8, 0.9, 0.95, 1.0),
    "exploration": (0.0, 0.1, 0.25, 0.5, 1.0),
    "temperature": (0.05, 0.1, 0.2, 0.4),
    "epsilon": (0.0, 0.05, 0.1, 0.2),
    "learnability": ("posterior", "advantage"),
}
MOST_IMBALANCE = 3.0
LEAST_EPSILON = 0.05
ROUNDS = 4  # of the search around the best
HELD_OUT = ("late_bloomer", "unequal", "thousand")
REFERENCES = {"defaults": {"name": "dump_ucb_robust"}, "dump_ucb": {"name": "dump_ucb"}, "uniform": {"name": "uniform"}}


Point = tuple[Any, ...]  # a value of each of CHOICES


def candidates(n: int, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Label -> sources block: what is known, and `n` different points of the grid."""
    grid = list(itertools.product(*CHOICES.values()))
    points = random.Random(seed).sample(grid, min(n, len(grid)))
    return {**REFERENCES, **dict(map(_labelled, points))}


def _labelled(point: Point) -> tuple[str, dict[str, Any]]:
    return " ".join(map(str, point)), {"name": "dump_ucb_robust", **dict(zip(CHOICES, point, strict=True))}


def neighbours(block: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The points one step away in one constant, with an epsilon that may be chosen."""
    point = tuple(block[name] for name in CHOICES)
    found = {}
    for place, values in enumerate(CHOICES.values()):
        here = values.index(point[place])
        for value in values[max(here - 1, 0) : here + 2]:
            label, near = _labelled((*point[:place], value, *point[place + 1 :]))
            if near["epsilon"] >= LEAST_EPSILON:
                found[label] = near
    return found


def scores(results: Sequence[Result]) -> dict[str, np.ndarray]:
    """Label -> [seeds]: rollouts to the target over those of uniform sources, geometric mean over scenarios.

    A run that does not get there counts as its whole budget, so a ratio is never overstated.
    """
    table = table_of(results)
    names = sorted({scenario for scenario, _ in table if SCENARIOS[scenario].target <= 1.0})
    scored = {}
    for label in dict.fromkeys(label for _, label in table):
        ratios = [
            [
                np.log(mine.capped / plain.capped)
                for mine, plain in zip(table[s, label], table[s, "uniform"], strict=True)
            ]
            for s in names
        ]
        scored[label] = np.exp(np.mean(ratios, axis=0))
    return scored


def search(trials: int, seeds: int, held_out: Sequence[str], processes: int, quick: bool) -> list[Grid]:
    """The ranking on the scenarios searched on, and the best ones (and the references) on those held out."""
    known = candidates(trials)
    seen = [name for name in SCENARIOS if name not in held_out]
    results = run_all(_jobs(known, seen, seeds, quick), processes, "search")
    for number in range(1, ROUNDS + 1):
        best = _best(results, known)
        new = {k: v for k, v in neighbours(known[best]).items() if k not in known} if best else {}
        if not new:
            break
        known |= new
        results += run_all(_jobs(new, seen, seeds, quick), processes, f"round {number} around {best}")
    ranking = sorted(scores(results).items(), key=lambda entry: float(np.mean(entry[1])))
    even = _imbalances(results)
    rows = [
        [label, f"{np.mean(v):.3f}", "{:.3f} – {:.3f}".format(*interval(v, np.mean)), f"{even.get(label, np.nan):.2f}"]
        for label, v in ranking
    ]
    title = f"dump_ucb_robust ({' '.join(CHOICES)}) on {', '.join(seen)}; {seeds} seeds; best: {_best(results, known)}"
    columns = ["constants", "rollouts to target / uniform's", "95 % interval", "twins: max/min weight"]
    grids = [Grid(title, columns, rows)]
    if held_out:
        fastest = [label for label, _ in ranking if label not in REFERENCES][:3]
        chosen = [label for label in (_best(results, known), *fastest, *REFERENCES) if label]
        grids.append(_check({label: known[label] for label in chosen}, held_out, seeds, processes, quick))
    return grids


def _imbalances(results: Sequence[Result]) -> dict[str, float]:
    runs = {label: r for (scenario, label), r in table_of(results).items() if scenario == "twins"}
    return {label: float(np.median([r.imbalance for r in of_label])) for label, of_label in runs.items()}


def _best(results: Sequence[Result], known: dict[str, dict[str, Any]]) -> str | None:
    """The fastest constants that noise does not move and that keep a floor; None if there are none."""
    even = _imbalances(results)
    fit = {
        label: float(np.mean(score))
        for label, score in scores(results).items()
        if label not in REFERENCES
        and even.get(label, np.inf) <= MOST_IMBALANCE
        and known[label]["epsilon"] >= LEAST_EPSILON
    }
    return min(fit, key=fit.__getitem__) if fit else None


def _check(kept: dict[str, dict[str, Any]], names: Sequence[str], seeds: int, processes: int, quick: bool) -> Grid:
    checked = scores(run_all(_jobs(kept, names, seeds, quick), processes, "held out"))
    rows = [[k, f"{np.mean(v):.3f}", "{:.3f} – {:.3f}".format(*interval(v, np.mean))] for k, v in checked.items()]
    title = f"The best, the fastest and the references on the scenarios held out ({', '.join(names)})"
    return Grid(title, ["constants", "rollouts to target / uniform's", "95 % interval"], rows)


def _jobs(known: dict[str, dict[str, Any]], names: Sequence[str], seeds: int, quick: bool) -> list[Job]:
    jobs = []
    for name in names:
        scenario = SCENARIOS[name]
        for label, block in known.items():
            jobs += jobs_of(label, blocks(block), scenario, seeds, min(3, scenario.steps) if quick else scenario.steps)
    return jobs

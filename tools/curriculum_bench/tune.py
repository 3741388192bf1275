"""The constants of dump_ucb_robust, searched at random over a grid, with scenarios held out to check the choice on."""

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
HELD_OUT = ("late_bloomer", "unequal", "thousand")
REFERENCES = {"defaults": {"name": "dump_ucb_robust"}, "dump_ucb": {"name": "dump_ucb"}, "uniform": {"name": "uniform"}}


def candidates(n: int, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Label -> sources block: what is known, and `n` different points of the grid."""
    grid = list(itertools.product(*CHOICES.values()))
    points = random.Random(seed).sample(grid, min(n, len(grid)))
    found = {
        " ".join(map(str, point)): {"name": "dump_ucb_robust", **dict(zip(CHOICES, point, strict=True))}
        for point in points
    }
    return {**REFERENCES, **found}


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
    ranking = sorted(scores(results).items(), key=lambda entry: float(np.mean(entry[1])))
    imbalance = {label: runs for (scenario, label), runs in table_of(results).items() if scenario == "twins"}
    rows = []
    for label, score in ranking:
        twins = f"{np.median([r.imbalance for r in imbalance[label]]):.2f}" if label in imbalance else ""
        rows.append([label, f"{np.mean(score):.3f}", "{:.3f} – {:.3f}".format(*interval(score, np.mean)), twins])
    title = f"dump_ucb_robust ({' '.join(CHOICES)}) on {', '.join(seen)}; {seeds} seeds"
    columns = ["constants", "rollouts to target / uniform's", "95 % interval", "twins: max/min weight"]
    grids = [Grid(title, columns, rows)]
    if held_out:
        best = [label for label, _ in ranking if label not in REFERENCES][:5]
        kept = {label: known[label] for label in (*best, *REFERENCES)}
        grids.append(_check(kept, held_out, seeds, processes, quick))
    return grids


def _check(kept: dict[str, dict[str, Any]], names: Sequence[str], seeds: int, processes: int, quick: bool) -> Grid:
    checked = scores(run_all(_jobs(kept, names, seeds, quick), processes, "held out"))
    rows = [[k, f"{np.mean(v):.3f}", "{:.3f} – {:.3f}".format(*interval(v, np.mean))] for k, v in checked.items()]
    title = f"The five best and the references on the scenarios held out ({', '.join(names)})"
    return Grid(title, ["constants", "rollouts to target / uniform's", "95 % interval"], rows)


def _jobs(known: dict[str, dict[str, Any]], names: Sequence[str], seeds: int, quick: bool) -> list[Job]:
    jobs = []
    for name in names:
        scenario = SCENARIOS[name]
        for label, block in known.items():
            jobs += jobs_of(label, blocks(block), scenario, seeds, min(3, scenario.steps) if quick else scenario.steps)
    return jobs

"""What a curriculum costs at the size of a large run: 1 M prompts of 1,000 sources, 1,024 prompts x 16 rollouts."""

from __future__ import annotations

import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

import numpy as np
from rich.console import Console
from rich.progress import Progress

from curriculum_bench.published import Items, PublishedSampler
from curriculum_bench.report import Grid
from curriculum_bench.runs import POLICIES, Config
from megatron_dump.batches import share_of_draw
from megatron_dump.curriculum import Curriculum
from megatron_dump.curriculum.simulator import Learner, Scenario
from megatron_dump.types import Draw, Outcomes

LOGGED = "dump_ucb"  # also measured with its log, as in a run
PUBLISHED = "published sampler's way"
WORLD = Scenario(
    "cost",
    "",
    names=tuple(f"source_{k:04d}" for k in range(1000)),
    sizes=(1000,) * 1000,
    difficulties=tuple(np.linspace(-2.0, 5.0, 1000).tolist()),
    transfer=0.3,
    learning_rate=200.0,
    prompts_per_step=1024,
)
SMALL = dataclasses.replace(
    WORLD, names=WORLD.names[:50], sizes=(100,) * 50, difficulties=WORLD.difficulties[:50], prompts_per_step=64
)
GOAL = "goals: start < 2 s, draw < 5 ms, observe < 5 ms"


class Clock:
    """Seconds of each step, by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds.setdefault(phase, []).append(time.perf_counter() - start)

    def cell(self, phase: str) -> str:
        """Median and worst, in ms."""
        values = self.seconds[phase]
        return f"{1e3 * statistics.median(values):.2f} / {1e3 * max(values):.2f}"


class Shuffled:
    """A data set whose rows come in random order, and the learner that answers its prompts."""

    def __init__(self, scenario: Scenario):
        self.learner = Learner(scenario, 0)
        n_rows = sum(scenario.sizes)
        shuffle = np.random.default_rng(0).permutation(n_rows)  # data row -> the learner's row
        self._to_learner = shuffle
        self._source_of_row = np.repeat(np.arange(len(scenario.names)), scenario.sizes)[shuffle]

    def names(self) -> list[str]:
        """[R]: a string object of its own for every row, as a file's reader makes them."""
        return [f"source_{k:04d}" for k in self._source_of_row.tolist()]

    def answer(self, draw: Draw) -> Outcomes:
        outcomes = self.learner.roll_out(dataclasses.replace(draw, prompt_ids=self._to_learner[draw.prompt_ids]))
        self.learner.train(outcomes)
        return dataclasses.replace(outcomes, prompt_ids=np.repeat(draw.prompt_ids, draw.rollouts))


def measure(
    config: Config, scenario: Scenario, data: Shuffled, steps: int, ranks: int, log: TextIO | None = None
) -> Clock:
    """Start-up once, then `steps` steps; the learner's own time is left out. A filter's refills count as drawing.

    With `log` every draw and outcome is written there as in a run, and a step's metrics are made as well.
    """
    clock = Clock()
    names = data.names()
    data.learner.skill[:] = 0.0  # every policy meets the same learner
    with clock("start"):
        curriculum = Curriculum(
            names, scenario.prompts_per_step, scenario.samples_per_prompt, 0, config, "cost", max_steps=steps
        )
        if log is not None:
            curriculum.on_event = lambda event: print(json.dumps(event), file=log)
            print(json.dumps(curriculum.header()), file=log)
    for step in range(steps):
        drawing = 0.0
        with clock("draw"):
            draw: Draw | None = curriculum.draw(step)
        with clock("shares"):
            assert draw is not None
            share_of_draw(draw, 1, ranks, ranks // 2)
        rounds = []
        while draw is not None:
            rounds.append(data.answer(draw))
            start = time.perf_counter()
            rejected = curriculum.filter.rejected(rounds[-1])
            draw = curriculum.refill(step, rejected) if rejected.size else None
            drawing += time.perf_counter() - start
        clock.seconds["draw"][-1] += drawing
        outcomes = Outcomes.joined(rounds)
        with clock("observe"):
            curriculum.observe(outcomes)
        with clock("metrics"):
            curriculum.metrics()
    return clock


def measure_logged(config: Config, scenario: Scenario, data: Shuffled, steps: int, ranks: int) -> Clock:
    with tempfile.TemporaryFile("w") as log:
        return measure(config, scenario, data, steps, ranks, log)


def measure_published(scenario: Scenario, data: Shuffled, steps: int, ranks: int) -> Clock:
    clock = Clock()
    items = Items(data.names())
    with clock("start"):
        sampler = PublishedSampler(items, 0)
    sampler.fill_windows()
    g = scenario.samples_per_prompt
    advantages = np.sin(np.arange(scenario.batch)).tolist()
    for _ in range(steps):
        with clock("draw"):
            batch = sampler.draw(scenario.prompts_per_step)
        with clock("shares"):
            rows = [row for _, row in batch for _ in range(g)]
            assert rows[(ranks // 2) * len(rows) // ranks : (ranks // 2 + 1) * len(rows) // ranks]
        sources = [source for source, _ in batch for _ in range(g)]
        with clock("observe"):
            sampler.observe(sources, advantages)
        clock.seconds.setdefault("metrics", []).append(0.0)
    return clock


def grid(quick: bool, only: Sequence[str]) -> Grid:
    """Time every policy, one after the other on one core, and the published way beside them."""
    scenario, steps, slow_steps, ranks = (SMALL, 5, 2, 64) if quick else (WORLD, 50, 3, 1024)
    data = Shuffled(scenario)
    policies = {label: make for label, make in POLICIES.items() if label in only}
    todo: dict[str, tuple[int, Callable[[int], Clock]]] = {
        label: (steps, lambda n, make=make: measure(make(scenario), scenario, data, n, ranks))
        for label, make in policies.items()
    }
    if LOGGED in policies:
        config = policies[LOGGED](scenario)
        todo[f"{LOGGED}, logged"] = steps, lambda n: measure_logged(config, scenario, data, n, ranks)
    todo[PUBLISHED] = (slow_steps, lambda n: measure_published(scenario, data, n, ranks))
    rows = []
    with Progress(console=Console(stderr=True)) as progress:
        for label, (n, timed) in progress.track(todo.items(), description="cost"):
            clock = timed(n)
            phases = map(clock.cell, ("draw", "shares", "observe", "metrics"))
            rows.append([label, str(n), f"{clock.seconds['start'][0]:.2f}", *phases])
    title = (
        f"Cost: {sum(scenario.sizes):,} prompts of {len(scenario.names):,} sources; a step of "
        f"{scenario.prompts_per_step:,} prompts x {scenario.samples_per_prompt} rollouts for {ranks:,} data-parallel "
        f"ranks ({GOAL})"
    )
    columns = [
        "policy",
        "steps",
        "start, s",
        "draw, ms: median / worst",
        f"a rank's share of {ranks}, ms",
        "observe, ms",
        "metrics for the log, ms",
    ]
    return Grid(title, columns, rows)

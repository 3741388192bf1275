"""Results as tables: on the console, as Markdown and as JSON."""

from __future__ import annotations

import dataclasses
import math
import os
import platform
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from curriculum_bench.runs import Result, interval, table_of
from megatron_dump.curriculum.simulator import SCENARIOS, Scenario


@dataclasses.dataclass(frozen=True)
class Grid:
    """A table of text; the first column is left-aligned."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def show(self, console: Console) -> None:
        table = Table(box=box.SIMPLE_HEAD)
        for i, column in enumerate(self.columns):
            table.add_column(column, justify="right" if i else "left", no_wrap=True)
        for row in self.rows:
            table.add_row(*(cell.replace("**", "") for cell in row))
        console.print(self.title, style="bold", highlight=False)
        console.print(table)

    def markdown(self) -> str:
        lines = ["| " + " | ".join(row) + " |" for row in (self.columns, *self.rows)]
        lines.insert(1, "|" + "|".join("--" if i == 0 else "--:" for i in range(len(self.columns))) + "|")
        return f"**{self.title}**\n\n" + "\n".join(lines) + "\n"


def thousands(samples: float, budget: int) -> str:
    """Rollouts in thousands; past the budget nothing is known."""
    return f">{budget / 1000:.1f}k" if math.isinf(samples) else f"{samples / 1000:.1f}k"


def scenario_grid(scenario: Scenario, results: Sequence[Result]) -> Grid:
    """All policies on one scenario; medians (samples) and means (pass rates) over seeds."""
    policies = table_of(results)
    some = results[0]
    has_target, has_waste = scenario.target <= 1.0, not scenario.counted.all()
    columns = ["policy"]
    columns += ["samples to target", "95 % interval", "censored"] if has_target else ["max/min weight", "95 % interval"]
    columns += ["final mean", "95 % interval", "worst source"] if has_target else []
    columns += ["wasted"] if has_waste else []
    rows = []
    for (_, label), runs in policies.items():
        row = [label]
        if has_target:
            samples = [r.samples for r in runs]
            low, high = (thousands(x, some.budget) for x in interval(samples))
            n_censored = sum(map(math.isinf, samples))
            row += [thousands(float(np.median(samples)), some.budget), f"{low} – {high}", f"{n_censored}/{len(runs)}"]
            final = [r.final for r in runs]
            row += [f"{np.mean(final):.3f}", "{:.3f} – {:.3f}".format(*interval(final, np.mean))]
            row += [f"{np.mean([r.worst for r in runs]):.3f}"]
        else:
            ratios = [r.imbalance for r in runs]
            row += [f"{np.median(ratios):.2f}", "{:.2f} – {:.2f}".format(*interval(ratios))]
        row += [f"{np.mean([r.wasted for r in runs]):.1%}"] if has_waste else []
        rows.append(row)
    target = f"target {scenario.target:.2f}, " if has_target else ""
    n_seeds = len(next(iter(policies.values())))
    title = f"{scenario.name}: {scenario.about} ({target}budget {some.budget / 1000:.1f}k rollouts, {n_seeds} seeds)"
    return Grid(title, columns, rows)


def summary_grid(results: Sequence[Result]) -> Grid:
    """Policies by scenarios: median samples to target in thousands, the least in bold."""
    cells = table_of(results)
    scenarios = [name for name in SCENARIOS if any(name == s for s, _ in cells) and SCENARIOS[name].target <= 1.0]
    labels = list(dict.fromkeys(label for _, label in cells))
    medians = {key: float(np.median([r.samples for r in runs])) for key, runs in cells.items()}
    rows = []
    for label in labels:
        row = [label]
        for scenario in scenarios:
            value, best = medians[scenario, label], min(medians[scenario, other] for other in labels)
            text = thousands(value, cells[scenario, label][0].budget)
            row.append(f"**{text}**" if value == best < math.inf else text)
        rows.append(row)
    title = "Median rollouts to the target (the least in bold; > the target was not reached within that budget)"
    return Grid(title, ["policy", *scenarios], rows)


def as_json(results: Sequence[Result], command: str) -> dict[str, Any]:
    """Every run; null for a target that was not reached."""
    rows = []
    for result in results:
        row = dataclasses.asdict(result)
        row.update({key: None for key, value in row.items() if isinstance(value, float) and not math.isfinite(value)})
        rows.append(row)
    return {"command": command, "machine": machine(), "results": rows}


def machine() -> str:
    return f"{os.cpu_count()} cores ({platform.machine()}), Python {platform.python_version()}, NumPy {np.__version__}"


def page(grids: Sequence[Grid], command: str, seconds: float) -> str:
    """docs/results/curriculum.md."""
    text = """# Curricula on a simulated learner

Rollouts that a policy needs until the mean true pass rate over the sources that can be learned reaches the scenario's
target; pre-rollouts and refills are counted. Median over seeds with the bootstrap 95 % interval; *censored*: runs that
did not get there within the budget, which is the same for all policies. *Final mean* and *worst source* are true pass
rates at the end of the budget; *wasted* is the share of rollouts drawn from sources that cannot teach. `static` weighs
sources linearly, the easiest most, and `easy_to_hard` goes from the first to the last: both are told the order of
difficulty, which the others find out for themselves.

The learner is a model, with no forgetting, no interference and a teaching signal that bandits can see
(`megatron_dump/curriculum/simulator.py` says what it leaves out). It shows how policies behave, not which is best for
a language model.

"""
    return text + section(grids, command, seconds)


def section(grids: Sequence[Grid], command: str, seconds: float) -> str:
    """The command, the machine and the tables."""
    head = f"```\n{command}\n```\n\n{machine()}; {seconds / 60:.1f} minutes.\n\n"
    return head + "\n".join(grid.markdown() for grid in grids)

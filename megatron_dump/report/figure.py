"""The curves of a run: report.png."""

from __future__ import annotations

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from megatron_dump.report.heat import draw_source_panels
from megatron_dump.report.panels import (
    draw_alarms,
    draw_bands,
    draw_health,
    draw_phases,
    draw_sources,
    draw_tests,
    set_steps,
)
from megatron_dump.report.run import Run
from megatron_dump.report.style import BLUE, ORANGE, RED, STYLE

__all__ = ["BLUE", "ORANGE", "RED", "STYLE", "draw_figure"]
LINES_SHOWN = 12  # sources that one panel can tell apart by colour; more become rows of heat maps


def draw_figure(run: Run) -> Figure:
    """What the curriculum chose and found, source by source; how training goes; where the time goes."""
    figure = _few_sources(run) if len(run.sources) <= LINES_SHOWN else _many_sources(run)
    if run.window > 1:
        note = f"Lines are means of the last {run.window} steps"
        if len(run.sources) > LINES_SHOWN:
            note += ", as are pass rates and rewards of sources; grey: not drawn"
        figure.supxlabel(note, fontsize=9, color="#666666", x=0.99, ha="right")
    return figure


def _few_sources(run: Run) -> Figure:
    """Twelve cells; the sources' colours are shared, with one legend above."""
    shades = matplotlib.colormaps["viridis"](np.linspace(0.05, 0.88, len(run.sources)))
    figure = Figure(figsize=(12.5, 12.5), layout="constrained")
    patches = [Patch(color=shade, label=source) for source, shade in zip(run.sources, shades, strict=True)]
    figure.legend(handles=patches, loc="outside upper center", ncols=min(6, len(patches)), fontsize=10)
    grid = figure.add_gridspec(4, 3, wspace=0.04, hspace=0.06)
    cells = [figure.add_subplot(grid[row, column]) for row in range(3) for column in range(3)]
    draw_bands(cells[0], run, "Source weights", "curriculum/{}/weight", shades)
    cells[0].set_ylim(0, 1)
    draw_alarms(cells[0], run)
    draw_bands(cells[1], run, "Prompts drawn", "curriculum/{}/n_prompts", shades)
    draw_sources(cells[2], run, "Learnability: mean |A|", "curriculum/{}/mean_abs_adv", shades)
    draw_sources(cells[3], run, "Training pass rate", "train/{}/accuracy", shades)
    draw_sources(cells[4], run, "Training reward", "train/{}/reward/mean", shades, low=None)
    draw_health(cells[5:], run)
    phases = figure.add_subplot(grid[3, 2])
    draw_phases(phases, run)
    for axes in (*cells, phases):
        set_steps(axes, run)
    draw_tests(figure.add_subplot(grid[3, :2]), run, shades)
    return figure


def _many_sources(run: Run) -> Figure:
    """Three rows of two heat maps, then the run as a whole. A row of sources is at least a few pixels high."""
    tall = min(max(3.2, 0.062 * len(run.sources)), 9.0)  # inches
    figure = Figure(figsize=(12.5, 3 * tall + 5.6), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(3 * tall, 5.6))  # each with margins of its own
    maps = [axes for row in upper.subplots(3, 2) for axes in row]
    draw_source_panels(maps, run)
    for axes in maps[:5]:
        axes.set_xlabel("step")
    grid = lower.add_gridspec(2, 3)
    places = [grid[0, 0], grid[0, 1], grid[0, 2], grid[1, 0], grid[1, 1:]]
    cells = [lower.add_subplot(place) for place in places]
    draw_health(cells, run)
    draw_phases(cells[4], run)
    for axes in cells:
        set_steps(axes, run)
    return figure

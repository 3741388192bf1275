"""The benchmark in one picture: curves, tokens to the baseline's accuracy, sources at the end."""

from __future__ import annotations

import math

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from run_comparison.intervals import band

from convergence_bench.arms import BASELINE
from convergence_bench.results import Results

COLOURS = [matplotlib.colormaps["tab10"](k) for k in (0, 1, 2, 3, 4, 5, 6, 8, 9)]  # 7 is the baseline's grey
COLOURS += [matplotlib.colormaps["Dark2"](k) for k in (0, 5, 6)]


def draw(results: Results) -> Figure:
    figure = Figure(figsize=(12.5, 8.6), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.0, 0.9))
    left, right = top.subplots(1, 2, width_ratios=(1.25, 1.0))
    _learning(left, results)
    _tokens(right, results)
    columns = min(len(results.sources), 6)
    for k, axes in enumerate(np.ravel(bottom.subplots(-(-len(results.sources) // columns), columns, squeeze=False))):
        if k < len(results.sources):
            _source(axes, results, k, named=k % columns == 0)
        else:
            axes.set_axis_off()
    return figure


def colour(results: Results, arm: str) -> tuple[float, ...] | str:
    others = [name for name in results.arms if name != BASELINE]
    return "#555555" if arm == BASELINE else COLOURS[others.index(arm) % len(COLOURS)]


def _learning(axes: Axes, results: Results) -> None:
    """Mean curves; the baseline's and the best arm's bands alone: nine would hide each other."""
    best = max(results.arms, key=lambda arm: results.final(arm).mean)
    for arm in results.arms:
        mean, half = band(results.mean(arm))
        width = 2.6 if arm in (BASELINE, best) else 1.4
        axes.plot(results.grid, mean, color=colour(results, arm), linewidth=width, label=arm)
        if arm in (BASELINE, best) and np.isfinite(half).all():
            axes.fill_between(results.grid, mean - half, mean + half, color=colour(results, arm), alpha=0.18, lw=0)
    axes.axhline(results.final(BASELINE).mean, color="#555555", linestyle=":", linewidth=1)
    axes.set(title="Test accuracy, mean over sources", xlabel="generated tokens")
    axes.xaxis.set_major_formatter(FuncFormatter(_thousands))
    axes.legend(loc="lower right", ncols=2)


def _tokens(axes: Axes, results: Results) -> None:
    """Tokens to the baseline's last accuracy, with intervals."""
    budget = float(results.grid[-1])
    for row, arm in enumerate(reversed(results.arms)):
        spent = results.spent[arm]["tokens"]
        ends = [min(end, budget) for end in (spent.low, spent.high)]
        marker = ">" if math.isinf(spent.value) else "o"
        axes.plot(ends, [row, row], color=colour(results, arm), linewidth=3, alpha=0.45, solid_capstyle="butt")
        axes.plot(min(spent.value, budget), row, marker, color=colour(results, arm), markersize=8)
    axes.axvline(results.spent[BASELINE]["tokens"].value, color="#555555", linestyle=":", linewidth=1)
    axes.set(
        title=f"Tokens to {BASELINE}'s last accuracy",
        xlabel="▸: not within the budget",
        xlim=(0, budget * 1.05),
        yticks=range(len(results.arms)),
        yticklabels=list(reversed(results.arms)),
    )
    axes.xaxis.set_major_formatter(FuncFormatter(_thousands))
    axes.grid(axis="y", visible=False)


def _thousands(value: float, _: object) -> str:
    return f"{value / 1000:.0f}k"


def _source(axes: Axes, results: Results, k: int, named: bool) -> None:
    """A source's accuracy at the end; the line is the baseline's, the cross the start."""
    axes.axvline(results.of_source(BASELINE, k)[0].mean, color="#555555", linestyle=":", linewidth=1)
    for row, arm in enumerate(reversed(results.arms)):
        value = results.of_source(arm, k)[0]
        if math.isfinite(value.half):
            low, high = max(value.mean - value.half, 0.0), value.mean + value.half
            axes.plot([low, high], [row, row], color=colour(results, arm), linewidth=2.5, alpha=0.4)
        axes.plot(value.mean, row, "o", color=colour(results, arm), markersize=6)
        axes.plot(results.accuracy[arm][:, 0, k].mean(), row, "x", color="#999999", markersize=5)
    axes.set(title=results.sources[k], yticks=range(len(results.arms)))
    axes.set_yticklabels(list(reversed(results.arms)) if named else [])
    axes.set_xlim(left=0)
    axes.grid(axis="y", visible=False)

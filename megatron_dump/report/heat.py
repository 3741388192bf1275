"""Panels for many sources: a row each, instead of a line each."""

from __future__ import annotations

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, PowerNorm

from megatron_dump.report.run import Run
from megatron_dump.report.style import BLUE, GREY, ORANGE, RED

NAMES_SHOWN = 34  # beside the rows of a panel


def draw_heat(axes: Axes, run: Run, title: str, values: np.ndarray, norm: Normalize) -> None:
    """values [K, S] over source × step; grey where nothing is known. Steps that are missing keep their place."""
    first, last = run.steps[0], run.steps[-1]
    grid = np.full((len(run.sources), last - first + 1), np.nan)
    grid[:, np.array(run.steps) - first] = values
    colours = matplotlib.colormaps["viridis"].with_extremes(bad=GREY)
    extent = (first - 0.5, last + 0.5, len(run.sources) - 0.5, -0.5)
    image = axes.imshow(grid, aspect="auto", cmap=colours, norm=norm, extent=extent)
    bar = axes.figure.colorbar(image, ax=axes, pad=0.015, fraction=0.05, aspect=40)
    bar.outline.set_visible(False)
    axes.grid(visible=False)
    axes.set_title(title)
    name_rows(axes, run.sources)


def name_rows(axes: Axes, names: list[str]) -> None:
    """The sources' names on the vertical axis: all of them, or every n-th."""
    shown = np.arange(0, len(names), -(-len(names) // NAMES_SHOWN))
    axes.set_yticks(shown, [names[k] if len(names[k]) <= 28 else f"{names[k][:27]}…" for k in shown], fontsize=8)


def mark_alarms(axes: Axes, run: Run) -> None:
    """A triangle at the source and the step of every alarm."""
    rows = {source: k for k, source in enumerate(run.sources)}
    raised = [(e["step"], rows[e["source"]]) for e in run.events if e["kind"] == "alarm" and e["source"] in rows]
    if raised:
        steps, places = zip(*raised, strict=True)
        style = {"marker": "v", "markersize": 8, "color": RED, "markeredgecolor": "white", "linestyle": "none"}
        axes.plot(steps, places, **style, clip_on=False, zorder=3)
        axes.set_title("▼ alarm", loc="right", color=RED)


def draw_source_panels(cells: list[Axes], run: Run) -> None:
    """Six panels: weights, draws, learnability, pass rate, reward, test accuracy."""
    weights, draws = (_matrix(run, f"curriculum/{{}}/{name}") for name in ("weight", "n_prompts"))
    draw_heat(cells[0], run, "Source weights", weights, PowerNorm(0.5, 0, _high(weights)))  # small ones are seen too
    mark_alarms(cells[0], run)
    drawn = np.where(draws > 0, draws, np.nan)
    draw_heat(cells[1], run, "Prompts drawn", drawn, PowerNorm(0.5, 0, _high(drawn)))
    learnability = _matrix(run, "curriculum/{}/mean_abs_adv")
    draw_heat(cells[2], run, "Learnability: mean |A|", learnability, Normalize(0, _high(learnability)))
    draw_heat(cells[3], run, "Training pass rate", _matrix(run, "train/{}/accuracy", True), Normalize(0, 1))
    rewards = _matrix(run, "train/{}/reward/mean", True)
    low = float(np.nanmin(rewards)) if np.isfinite(rewards).any() else 0.0
    draw_heat(cells[4], run, "Training reward", rewards, Normalize(low, max(_high(rewards), low + 1e-6)))
    draw_changes(cells[5], run)


def draw_changes(axes: Axes, run: Run) -> None:
    """Test accuracy of each source at the first (hollow) and the last validation; red where it fell."""
    axes.set_title("Test accuracy" if run.validations else "Test accuracy: no validation yet")
    axes.set(ylim=(len(run.sources) - 0.5, -0.5), xlim=(-0.02, 1.02))
    name_rows(axes, run.sources)
    if not run.validations:
        return
    rows = np.arange(len(run.sources))
    before, after = (np.array([run.tested(source, i) for source in run.sources]) for i in (0, -1))
    if len(run.validations) > 1:
        shades = np.where(after < before, RED, BLUE)
        axes.hlines(rows, before, after, colors=shades, linewidth=1.2)
        hollow = {"s": 14, "facecolors": "white", "edgecolors": "#888888", "zorder": 3}
        axes.scatter(before, rows, **hollow, label=f"step {run.validations[0][0]}")
    axes.scatter(after, rows, s=16, color=BLUE, zorder=4, label=f"step {run.validations[-1][0]}")
    axes.axvline(float(np.nanmean(after)), color=ORANGE, linewidth=1.2, linestyle="--", label="mean")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 0.99), ncols=3, columnspacing=1, handlelength=1.2)


def _matrix(run: Run, key: str, smooth: bool = False) -> np.ndarray:
    """float64 [K, S]."""
    return np.array([(run.smooth if smooth else run.series)(key.format(source)) for source in run.sources])


def _high(values: np.ndarray) -> float:
    """The upper end of a colour scale."""
    high = float(np.nanmax(values)) if np.isfinite(values).any() else 0.0
    return high if high > 0 else 1.0

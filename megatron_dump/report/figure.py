"""The curves of a run: report.png."""

from __future__ import annotations

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from megatron_dump.report.run import Run

PHASES = ("draw", "gen", "reward", "old_log_prob", "ref", "adv", "update_actor", "sync")
BLUE, ORANGE, RED = "#2b5c8a", "#d9773b", "#b3261e"
STYLE = {
    "font.size": 10, "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.grid": True,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#888888", "axes.axisbelow": True,
    "grid.color": "#e6e6e6", "legend.frameon": False, "legend.fontsize": 9,
}  # fmt: skip


def draw_figure(run: Run) -> Figure:
    """Eight panels; the sources' colours are shared, with one legend above."""
    shades = matplotlib.colormaps["viridis"](np.linspace(0.05, 0.88, len(run.sources)))
    figure = Figure(figsize=(12.5, 10), layout="constrained")
    patches = [Patch(color=shade, label=source) for source, shade in zip(run.sources, shades, strict=True)]
    figure.legend(handles=patches, loc="outside upper center", ncols=min(6, len(patches)), fontsize=10)
    grid = figure.add_gridspec(3, 3, wspace=0.04, hspace=0.06)
    panels = [figure.add_subplot(grid[place]) for place in ((0, 0), (0, 1), (0, 2), (1, 2), (2, 0), (2, 1), (2, 2))]
    weights = [np.nan_to_num(run.series(f"curriculum/{source}/weight")) for source in run.sources]
    panels[0].stackplot(run.steps, weights, colors=shades, linewidth=0)
    panels[0].set(title="Source weights", ylim=(0, 1))
    draw_alarms(panels[0], run)
    draw_sources(panels[1], run, "Learnability: mean |A|", "curriculum/{}/mean_abs_adv", shades)
    draw_sources(panels[2], run, "Training accuracy", "train/{}/accuracy", shades)
    draw_curve(panels[3], run, "Mean reward", "critic/score/mean", BLUE)
    draw_curve(panels[4], run, "Response tokens", "response_length/mean", BLUE)
    draw_twin(panels[4], run, "cut at the limit", "response_length/clip_ratio")
    draw_curve(panels[5], run, "Gradient norm", "actor/grad_norm", BLUE)
    draw_twin(panels[5], run, "KL", "actor/kl_loss")
    draw_phases(panels[6], run)
    for axes in panels:
        axes.set(xlim=(run.steps[0], max(run.steps[-1], run.steps[0] + 1)), xlabel="step")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    draw_tests(figure.add_subplot(grid[1, :2]), run, shades)
    if run.window > 1:
        figure.supxlabel(
            f"Lines are means of the last {run.window} steps", fontsize=9, color="#666666", x=0.99, ha="right"
        )
    return figure


def draw_sources(axes: Axes, run: Run, title: str, key: str, shades: np.ndarray) -> None:
    """One line a source."""
    for source, shade in zip(run.sources, shades, strict=True):
        axes.plot(run.steps, run.smooth(key.format(source)), color=shade, linewidth=1.7)
    axes.set(title=title, ylim=(0, None))


def draw_alarms(axes: Axes, run: Run) -> None:
    """A triangle at every step at which an alarm was raised."""
    if raised := sorted({event["step"] for event in run.events if event["kind"] == "alarm"} & set(run.steps)):
        style = {"marker": "v", "markersize": 8, "color": RED, "markeredgecolor": "white", "linestyle": "none"}
        axes.plot(raised, [0.965] * len(raised), **style, clip_on=False, zorder=3)
        axes.set_title("▼ alarm", loc="right", color=RED)


def draw_curve(axes: Axes, run: Run, title: str, key: str, colour: str, side: str = "left") -> None:
    """The steps' values, faint, and their moving average; the title has the curve's colour."""
    axes.plot(run.steps, run.series(key), color=colour, alpha=0.25, linewidth=0.8)
    axes.plot(run.steps, run.smooth(key), color=colour, linewidth=1.9)
    axes.set_title(title, loc=side, color=colour)
    axes.tick_params(axis="y", colors=colour)


def draw_twin(axes: Axes, run: Run, title: str, key: str) -> None:
    """A second curve on an axis of its own, if the run has it."""
    if np.isfinite(run.series(key)).any():
        twin = axes.twinx()
        twin.grid(visible=False)
        draw_curve(twin, run, title, key, ORANGE, side="right")


def draw_tests(axes: Axes, run: Run, shades: np.ndarray) -> None:
    """Accuracy on the test sets at the first and the last validation, with standard errors."""
    places = np.arange(len(run.sources))
    axes.set_title("Test accuracy (± standard error)" if run.validations else "Test accuracy: no validation yet")
    axes.set_xticks(places, run.sources, rotation=25 if len(places) > 7 else 0)
    axes.grid(visible=False, axis="x")
    bars = {run.validations[i][0]: (i, alpha) for i, alpha in ((0, 0.35), (-1, 1.0)) if run.validations}
    for offset, (step, (i, alpha)) in zip((-0.2, 0.2) if len(bars) == 2 else (0.0,), bars.items(), strict=False):
        height = [run.tested(source, i) for source in run.sources]
        error = [run.tested(source, i, "accuracy_se") for source in run.sources]
        axes.bar(places + offset, height, 0.4, color=shades, alpha=alpha)
        axes.errorbar(places + offset, height, error, fmt="none", ecolor="#333333", elinewidth=1, capsize=2.5)
        axes.bar(0, 0, color="#555555", alpha=alpha, label=f"step {step}")  # a grey entry for the legend
    if bars:
        axes.legend(loc="lower right", bbox_to_anchor=(1, 0.98), ncols=2)


def draw_phases(axes: Axes, run: Run) -> None:
    """Where the time of a step goes."""
    axes.set_title("Seconds a step")
    phases = [phase for phase in PHASES if np.isfinite(run.series(f"timing_s/{phase}")).any()]
    if phases:
        seconds = [np.nan_to_num(run.smooth(f"timing_s/{phase}")) for phase in phases]
        axes.stackplot(run.steps, seconds, labels=phases, colors=matplotlib.colormaps["Set2"].colors, linewidth=0)
        axes.set_ylim(0, 1.45 * np.sum(seconds, axis=0).max())  # room for the legend
        axes.legend(loc="upper center", ncols=3, columnspacing=1, handlelength=1)

"""Single panels of the picture: curves of the run as a whole, and one line or band a source."""

from __future__ import annotations

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from megatron_dump.report.run import Run
from megatron_dump.report.style import BLUE, ORANGE, RED

PHASES = ("draw", "gen", "reward", "old_log_prob", "ref", "adv", "update_actor", "sync")


def set_steps(axes: Axes, run: Run) -> None:
    """The horizontal axis: steps, the same for every panel."""
    axes.set(xlim=(run.steps[0], max(run.steps[-1], run.steps[0] + 1)), xlabel="step")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))


def draw_bands(axes: Axes, run: Run, title: str, key: str, shades: np.ndarray) -> None:
    """Stacked values of the steps, one band a source."""
    bands = [np.nan_to_num(run.series(key.format(source))) for source in run.sources]
    axes.stackplot(run.steps, bands, colors=shades, linewidth=0)
    axes.set_title(title)


def draw_sources(axes: Axes, run: Run, title: str, key: str, shades: np.ndarray, low: float | None = 0) -> None:
    """One line a source, from one step at which it was drawn to the next."""
    for source, shade in zip(run.sources, shades, strict=True):
        values = run.smooth(key.format(source))
        known = np.isfinite(values)
        alone = known.sum() == 1  # a line of one point would be invisible
        steps = np.array(run.steps)[known]
        axes.plot(steps, values[known], color=shade, linewidth=1.7, marker="o" if alone else None, markersize=4)
    axes.set_title(title)
    if low is not None:
        axes.set_ylim(low, None)


def draw_alarms(axes: Axes, run: Run) -> None:
    """A triangle at every step at which an alarm was raised."""
    if raised := sorted({event["step"] for event in run.events if event["kind"] == "alarm"} & set(run.steps)):
        style = {"marker": "v", "markersize": 8, "color": RED, "markeredgecolor": "white", "linestyle": "none"}
        axes.plot(raised, [0.965] * len(raised), **style, clip_on=False, zorder=3)
        axes.set_title("▼ alarm", loc="right", color=RED)


def draw_curve(axes: Axes, run: Run, title: str, key: str, colour: str = BLUE, side: str = "left") -> None:
    """The steps' values, faint, and their moving average; the title has the curve's colour."""
    axes.plot(run.steps, run.series(key), color=colour, alpha=0.25, linewidth=0.8)
    alone = len(run.steps) == 1
    axes.plot(run.steps, run.smooth(key), color=colour, linewidth=1.9, marker="o" if alone else None, markersize=4)
    axes.set_title(title, loc=side, color=colour)
    axes.tick_params(axis="y", colors=colour)


def draw_twin(axes: Axes, run: Run, title: str, key: str) -> None:
    """A second curve on an axis of its own, if the run has it."""
    if run.has(key):
        twin = axes.twinx()
        twin.grid(visible=False)
        draw_curve(twin, run, title, key, ORANGE, side="right")


def draw_health(cells: list[Axes], run: Run) -> None:
    """Four panels: reward; length; KL and entropy; gradient norm."""
    draw_curve(cells[0], run, "Mean reward", "critic/score/mean")
    draw_curve(cells[1], run, "Response tokens", "response_length/mean")
    draw_twin(cells[1], run, "cut at the limit", "response_length/clip_ratio")
    if run.has("actor/kl_loss"):
        draw_curve(cells[2], run, "KL to the start", "actor/kl_loss")
    else:
        cells[2].set_title("KL: none is measured")
        cells[2].set_yticks([])
    draw_twin(cells[2], run, "entropy", "actor/entropy")
    draw_curve(cells[3], run, "Gradient norm", "actor/grad_norm")


def draw_phases(axes: Axes, run: Run) -> None:
    """Where the time of a step goes."""
    axes.set_title("Seconds a step")
    phases = [phase for phase in PHASES if run.has(f"timing_s/{phase}")]
    if phases:
        seconds = [np.nan_to_num(run.smooth(f"timing_s/{phase}")) for phase in phases]
        axes.stackplot(run.steps, seconds, labels=phases, colors=matplotlib.colormaps["Set2"].colors, linewidth=0)
        axes.set_ylim(0, 1.45 * np.sum(seconds, axis=0).max())  # room for the legend
        axes.legend(loc="upper center", ncols=3, columnspacing=1, handlelength=1)


def draw_tests(axes: Axes, run: Run, shades: np.ndarray) -> None:
    """Accuracy on the test sets at the first and the last validation, with standard errors."""
    places = np.arange(len(run.sources))
    axes.set_title("Test accuracy (± standard error)" if run.validations else "Test accuracy: no validation yet")
    axes.set_xticks(places, run.sources)
    if sum(map(len, run.sources)) > 60:  # characters that fit side by side
        axes.tick_params(axis="x", rotation=25)
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

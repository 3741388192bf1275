"""Groups of runs over one another: compare.png."""

from __future__ import annotations

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from run_comparison.curves import TEST, over_steps, over_tokens, points
from run_comparison.groups import Group
from run_comparison.intervals import CONFIDENCE

ROWS = (("over steps", over_steps), ("over generated tokens", over_tokens))
LEARNING = (
    ("Test accuracy, mean over sources", TEST),
    ("Reward of what was drawn", "critic/score/mean"),
    ("Pass rate of what was drawn", "train/accuracy"),
)
HEALTH = (
    ("Response tokens", "response_length/mean"),
    ("Entropy", "actor/entropy"),
    ("KL to the start", "actor/kl_loss"),
)


def draw_groups(groups: list[Group]) -> Figure:
    """Learning over steps and over tokens, then length, entropy and KL over steps."""
    colours = [matplotlib.colormaps["tab10"](k % 10) for k in range(len(groups))]
    figure = Figure(figsize=(12.5, 10.5), layout="constrained")
    cells = figure.subplots(3, 3)
    for row, (name, curve_of) in zip(cells, ROWS, strict=False):
        for axes, (title, key) in zip(row, LEARNING, strict=True):
            _draw(axes, groups, colours, key, curve_of, faint=curve_of is over_steps)
            axes.set(title=title, xlabel=name.removeprefix("over "))
    for axes in cells[1]:
        axes.xaxis.set_major_formatter(FuncFormatter(_tokens))
    for axes, (title, key) in zip(cells[2], HEALTH, strict=True):
        _draw(axes, groups, colours, key, over_steps, faint=True)
        axes.set(title=title, xlabel="steps")
    for axes in (*cells[0], *cells[2]):
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    lines = [axes for axes in cells[0][1].get_lines() if not str(axes.get_label()).startswith("_")]
    labels = [f"{group.label} ({_seeds(len(group.seeds))})" for group in groups]
    figure.legend(lines, labels, loc="outside upper center", ncols=min(3, len(labels)), fontsize=10)
    note = f"Bands: {CONFIDENCE:.0%} intervals of the mean over seeds (Student's t); faint lines: single runs, smoothed"
    figure.supxlabel(note, fontsize=9, color="#666666", x=0.99, ha="right")
    return figure


def _draw(axes: Axes, groups: list[Group], colours: list, key: str, curve_of, faint: bool) -> None:
    """A mean and a band a group; `faint`: every seed as well."""
    drawn = False
    for group, colour in zip(groups, colours, strict=True):
        curve = curve_of(group, key)
        known = np.isfinite(curve.mean)
        marker = "o" if key == TEST and curve_of is over_steps else None
        axes.plot(curve.x[known], curve.mean[known], color=colour, linewidth=2, label=group.label, marker=marker)
        if np.isfinite(curve.half).any():
            low, high = curve.mean - curve.half, curve.mean + curve.half
            axes.fill_between(curve.x, low, high, color=colour, alpha=0.18, linewidth=0)
        for seed in group.seeds if faint and len(group.seeds) > 1 else ():
            steps, _, values = points(seed, key)
            axes.plot(steps, values, color=colour, linewidth=0.6, alpha=0.35, label="_single")
        drawn |= bool(known.any())
    if not drawn:
        axes.text(0.5, 0.5, "not in these runs", ha="center", va="center", color="#888888", transform=axes.transAxes)


def _tokens(value: float, _: object = None) -> str:
    """1.2M, 340k."""
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{suffix}"
    return f"{value:.0f}"


def _seeds(n: int) -> str:
    return f"{n} seed" + "s" * (n != 1)

"""Plots of collectives, scaling, and predictions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_dump.report.figure import BLUE, ORANGE, RED
from multinode_bench.steps import PHASES, Measured

_COLOURS = matplotlib.colormaps["Set2"].colors  # pyright: ignore[reportAttributeAccessIssue]
_MARKS = {"all_reduce": "o", "broadcast": "s", "p2p": "^"}


def draw_collectives(found: dict[str, Any]) -> Figure:
    """Time and bus bandwidth by size; dashed: alpha + beta × bytes."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    colours = dict(zip(dict.fromkeys(fit["group"] for fit in found["fits"]), _COLOURS, strict=False))
    for fit in found["fits"]:
        rows = [r for r in found["rows"] if (r["group"], r["operation"]) == (fit["group"], fit["operation"])]
        sizes = np.array([r["bytes"] for r in rows])
        style: dict[str, Any] = {"color": colours[fit["group"]], "marker": _MARKS[fit["operation"]]}
        label = f"{fit['group']} ({fit['ranks']}) {fit['operation']}"
        left.plot(sizes, [1e3 * r["seconds"] for r in rows], linestyle="none", label=label, **style)
        predicted = 1e3 * (fit["alpha_s"] + fit["beta_s_per_byte"] * sizes)
        left.plot(sizes, predicted, "--", color=style["color"], linewidth=1)
        right.plot(sizes, [r["busbw"] / 1e9 for r in rows], linewidth=1.3, **style)
    left.set(title="Milliseconds (dashed: α + β bytes)", xscale="log", yscale="log", xlabel="bytes")
    right.set(title="Bus bandwidth, GB/s", xscale="log", xlabel="bytes", ylim=(0, None))
    figure.legend(loc="outside right center", fontsize=8)
    return figure


def draw_scaling(weak: Sequence[dict[str, Any]], strong: Sequence[dict[str, Any]], steps: Sequence[Measured]) -> Figure:
    """Efficiency by layout, and where the time of a step goes."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.4))
    for offset, (name, rows, colour) in enumerate((("strong", strong, BLUE), ("weak", weak, ORANGE))):
        names = [row["name"].removesuffix(f"-{name}") for row in rows]
        places = np.arange(len(rows)) + 0.4 * offset
        left.bar(places, [row["efficiency"] for row in rows], 0.38, color=colour, label=name)
        if rows:
            left.set_xticks(np.arange(len(rows)) + 0.2, names, fontsize=8)
    left.set_title("Efficiency")
    left.legend()
    _stack(right, [m.name for m in steps], [{p: m.median(p) for p in (*PHASES, "other")} for m in steps])
    right.set_title("Seconds a step")
    right.tick_params(axis="x", rotation=40, labelsize=8)
    return figure


def draw_check(rows: Sequence[dict[str, Any]]) -> Figure:
    """Predicted beside measured, phase on phase."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    axes = figure.subplots()
    names = (*PHASES, "other")
    for offset, kind in ((-0.2, "predicted"), (0.2, "measured")):
        _stack(
            axes,
            [r["name"] for r in rows],
            [{p: r["phases"][p][kind] for p in names} for r in rows],
            offset,
            0.36,
            hatch="//" if kind == "predicted" else None,
            legend=offset > 0,
        )
    axes.set_title("Seconds a step: predicted (hatched) and measured")
    axes.tick_params(axis="x", rotation=30, labelsize=8)
    return figure


def draw_simulation(about: dict[str, Any]) -> Figure:
    """Step time by phase, throughput, bubble and communication, memory, over the number of ranks."""
    rows = about["rows"]
    names = [str(r["ranks"]) for r in rows]
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    (step, rate), (share, memory) = figure.subplots(2, 2)
    _stack(step, names, [r["phases"] for r in rows])
    step.set_title("Seconds a step")
    ranks = [r["ranks"] for r in rows]
    rate.plot(ranks, [r["tokens_per_s_per_rank"] for r in rows], "o-", color=BLUE)
    rate.set_title("Tokens a second and rank")
    share.plot(ranks, [100 * r["bubble_of_update"] for r in rows], "o-", color=BLUE, label="bubble, of the update")
    share.plot(ranks, [100 * r["communication"] for r in rows], "s-", color=ORANGE, label="communication, of the step")
    share.set_title("Percent")
    share.legend()
    for axes in (rate, share):
        axes.set_xscale("log", base=2)
        axes.set_xticks(ranks, names)
        axes.set(xlabel="ranks", ylim=(0, 1.15 * axes.get_ylim()[1]))
    parts = ("parameters", "gradients", "optimizer", "activations", "generation")
    _stack(memory, names, [{p: r["memory"][p] / 1e9 for p in parts} for r in rows])
    memory.set_title("GB a rank (activations and generation take turns)")
    if about["memory_bytes"]:
        memory.axhline(about["memory_bytes"] / 1e9, color=RED, linewidth=1)
    for axes in (step, memory):
        axes.set_xlabel("ranks")
    return figure


def _stack(
    axes: Axes,
    names: Sequence[str],
    rows: Sequence[dict[str, float]],
    offset: float = 0.0,
    width: float = 0.7,
    hatch: str | None = None,
    legend: bool = True,
) -> None:
    """Bars of parts on each other."""
    places, bottom = np.arange(len(names)), np.zeros(len(names))
    for i, part in enumerate(rows[0] if rows else ()):
        heights = np.array([row[part] for row in rows])
        if heights.any():
            style: dict[str, Any] = {"color": _COLOURS[i % len(_COLOURS)], "hatch": hatch, "edgecolor": "white"}
            axes.bar(places + offset, heights, width, bottom, label=part if legend else None, **style)
        bottom += heights
    axes.set_xticks(places, names)
    axes.grid(visible=False, axis="x")
    if legend:
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))

"""One small picture for each policy: where it draws from, and what comes of it, on the ladder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from curriculum_bench.runs import Config
from megatron_dump.curriculum.simulator import SCENARIOS, History, Scenario, simulate
from megatron_dump.report.figure import STYLE

SMALL: Any = {**STYLE, "font.size": 8, "axes.titlesize": 9}


def file_name(label: str) -> str:
    """`dump_ucb_robust+cures` -> `dump_ucb_robust_cures.png`."""
    return label.replace("+", "_").replace(" ", "_") + ".png"


def draw(history: History, label: str) -> Figure:
    """700 x 300 pixels: weights stacked, easiest source at the bottom; true pass rates."""
    n_sources = len(history.scenario.names)
    shades = matplotlib.colormaps["viridis"](np.linspace(0.05, 0.92, n_sources))
    figure = Figure(figsize=(7.0, 3.0), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = np.arange(len(history.weights))
    left.stackplot(steps, history.weights.T, colors=shades, linewidth=0)
    left.set(title=label, xlabel="step", ylabel="share of the draws", xlim=(0, steps[-1]), ylim=(0, 1))
    left.grid(False)
    for rates, shade in zip(history.pass_rates.T, shades, strict=True):
        right.plot(rates, color=shade, linewidth=1.3)
    right.plot(history.success(), color="black", linewidth=1.6, linestyle="--")
    right.set(title="true pass rates (dashed: mean)", xlabel="step", xlim=(0, len(steps)), ylim=(0, 1))
    scale = ScalarMappable(Normalize(0, 1), "viridis")
    bar = figure.colorbar(scale, ax=right, ticks=[0.02, 0.98], pad=0.02)
    bar.set_ticklabels(["easy", "hard"])
    bar.outline.set_visible(False)
    return figure


def write(
    folder: Path, policies: Mapping[str, Callable[[Scenario], Config]], steps: int | None, seed: int = 0
) -> list[Path]:
    """A PNG a policy; `steps` None: the whole run."""
    folder.mkdir(parents=True, exist_ok=True)
    scenario = SCENARIOS["ladder"]
    written = []
    for label, make in policies.items():
        history = simulate(make(scenario), scenario, seed, steps)
        with matplotlib.rc_context(SMALL):
            path = folder / file_name(label)
            draw(history, label).savefig(path, dpi=100)
        written.append(path)
    return written

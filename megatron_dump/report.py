"""report.html and report.png of a run, from its metrics.jsonl: `python -m megatron_dump.report RUN_DIR`."""

from __future__ import annotations

import argparse
import base64
import html
import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

PHASES = ("draw", "gen", "reward", "old_log_prob", "ref", "adv", "update_actor", "sync")
BLUE, ORANGE, RED = "#2b5c8a", "#d9773b", "#b3261e"
STYLE = {
    "font.size": 10, "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.grid": True,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#888888", "axes.axisbelow": True,
    "grid.color": "#e6e6e6", "legend.frameon": False, "legend.fontsize": 9,
}  # fmt: skip
SAMPLES_SHOWN, EVENTS_SHOWN = 12, 50
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1120px; margin: 2em auto; padding: 0 1em }}
h1, h2 {{ font-weight: 600 }} h2 {{ margin-top: 2em; border-bottom: 1px solid #ddd }} img {{ width: 100% }}
table {{ border-collapse: collapse }} td, th {{ padding: .3em .9em; text-align: right; border-bottom: 1px solid #eee }}
td:first-child, th:first-child {{ text-align: left }} pre {{ white-space: pre-wrap; background: #f6f7f9; padding: .8em }}
.events td, .events th {{ text-align: left; vertical-align: top }}
summary {{ cursor: pointer; padding: .3em 0 }} .good {{ color: #1a7f37 }} .bad {{ color: #b3261e }}
</style><h1>{title}</h1><p>{summary}</p><img alt="curves of the run" src="data:image/png;base64,{picture}">
<h2>Sources</h2>{sources}{events}<h2>Last step</h2>{final}{samples}</html>
"""


@dataclass(frozen=True)
class Run:
    """What metrics.jsonl says. S training steps, K sources, V validations."""

    name: str
    steps: list[int]  # [S], increasing
    rows: list[dict[str, Any]]  # [S], the metrics of each step
    sources: list[str]  # [K], trained on or tested, natural order
    validations: list[tuple[int, dict[str, Any]]]  # [V], (step, val/* metrics), increasing
    events: list[dict[str, Any]]  # rows of events.jsonl: step, kind, source (None: the whole run), message

    @property
    def window(self) -> int:
        """Steps in a moving average."""
        return max(1, len(self.steps) // 12)

    def series(self, key: str) -> np.ndarray:
        """float64 [S]; NaN where a step does not have the key."""
        return np.array([np.nan if row.get(key) is None else row[key] for row in self.rows], dtype=np.float64)

    def smooth(self, key: str) -> np.ndarray:
        """float64 [S]: mean of the values known among the last `window` steps."""
        values, kernel = self.series(key), np.ones(self.window)
        known = np.isfinite(values)
        total = np.convolve(np.where(known, values, 0.0), kernel)[: len(values)]
        count = np.convolve(known, kernel)[: len(values)]
        return np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0)

    def tested(self, source: str, validation: int, name: str = "accuracy") -> float:
        """A value of one validation (0: the first, -1: the last); NaN when unknown."""
        value = self.validations[validation][1].get(f"val/{source}/{name}") if self.validations else None
        return np.nan if value is None else value


def natural_sort(names: Iterable[str]) -> list[str]:
    """kk_logic_2 before kk_logic_10."""
    return sorted(set(names), key=lambda name: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", name)])


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a file; a last line that is still being written is left out."""
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def read_run(log_dir: Path) -> Run:
    """Read metrics.jsonl and events.jsonl of a finished or running run."""
    path = log_dir / "metrics.jsonl"
    train: dict[int, dict[str, Any]] = {}
    validations: dict[int, dict[str, Any]] = {}
    for row in read_jsonl(path):
        target = validations if any(key.startswith("val/") for key in row) else train
        target.setdefault(row["step"], {}).update(row)
    if not train:
        raise ValueError(f"{path} has no training step yet: there is nothing to report")
    keys = {key for row in (*train.values(), *validations.values()) for key in row}
    matches = (re.fullmatch(r"(?:curriculum|train|val)/(.+)/(?:weight|accuracy)", key) for key in keys)
    steps = sorted(train)
    sources = natural_sort(match[1] for match in matches if match)
    events_path = path.with_name("events.jsonl")
    events = read_jsonl(events_path) if events_path.exists() else []
    rows = [train[step] for step in steps]
    return Run(log_dir.resolve().name, steps, rows, sources, sorted(validations.items()), events)


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


def sources_table(run: Run) -> str:
    """Where every source stands at the end of the run."""
    columns = ("source", "weight", "prompts", "learnability", "train accuracy", "test before", "test after", "gain")
    keys = ("curriculum/{}/weight", "curriculum/{}/mean_abs_adv", "train/{}/accuracy")
    rows = []
    for source in run.sources:
        weight, learnability, accuracy = (_number(run.smooth(key.format(source))[-1]) for key in keys)
        prompts = _number(np.nansum(run.series(f"curriculum/{source}/n_prompts")), ".0f")
        tests = [_with_error(run.tested(source, i), run.tested(source, i, "accuracy_se")) for i in (0, -1)]
        gain = run.tested(source, -1) - run.tested(source, 0) if len(run.validations) > 1 else np.nan
        rows.append((source, weight, prompts, learnability, accuracy, *tests, _number(gain, "+.3f")))
    unreadable = [run.smooth(f"curriculum/{source}/format_failure")[-1] for source in run.sources]
    if np.isfinite(unreadable).any():
        columns = (*columns, "format failures")
        rows = [(*row, _number(share, ".3f")) for row, share in zip(rows, unreadable, strict=True)]
    return _table(columns, rows)


def events_section(events: list[dict[str, Any]]) -> str:
    """What was out of the ordinary, the latest first; nothing for a run without events."""
    if not events:
        return ""
    latest, earlier = events[: -EVENTS_SHOWN - 1 : -1], events[:-EVENTS_SHOWN]
    rows = [(str(e["step"]), e["kind"].replace("_", " "), e["source"] or "–", e["message"]) for e in latest]
    counts = Counter(event["kind"].replace("_", " ") for event in earlier)
    rest = ", ".join(f"{n} × {kind}" for kind, n in counts.most_common())
    table = _table(("step", "kind", "source", "message"), rows, "events")
    return f"<h2>Events</h2>{table}" + (f"<p>Earlier, in events.jsonl: {html.escape(rest)}.</p>" if rest else "")


def final_table(run: Run) -> str:
    """The metrics of the last step that do not belong to a source."""
    keys = sorted(key for key in run.rows[-1] if key != "step" and not key.startswith(("curriculum/", "train/")))
    rows = [(key, _number(run.series(key)[-1]), _number(run.smooth(key)[-1])) for key in keys]
    return _table(("metric", "value", f"mean of {run.window} steps"), rows)


def samples_section(path: Path) -> str:
    """The latest completions of samples.jsonl; nothing if the run keeps none."""
    parts = []
    for sample in read_jsonl(path)[-SAMPLES_SHOWN:] if path.exists() else ():
        mark = '<b class="good">right</b>' if sample["correct"] else '<b class="bad">wrong</b>'
        title = f"step {sample['step']}, {html.escape(sample['source'])}, reward {sample['reward']:g}, {mark}"
        texts = "".join(f"<pre>{html.escape(sample[name])}</pre>" for name in ("prompt", "completion"))
        parts.append(f"<details><summary>{title}</summary>{texts}</details>")
    return f"<h2>Sample completions</h2>{''.join(parts)}" if parts else ""


def write_report(log_dir: str | Path) -> tuple[Path, Path]:
    """Write report.html and report.png into the run's folder; returns their paths."""
    run = read_run(Path(log_dir))
    html_path, png_path = (Path(log_dir) / name for name in ("report.html", "report.png"))
    with matplotlib.rc_context(STYLE):
        draw_figure(run).savefig(png_path, dpi=130)
    page = PAGE.format(
        title=html.escape(run.name),
        summary=f"{len(run.steps)} steps ({run.steps[0]} to {run.steps[-1]}), {len(run.sources)} sources.",
        picture=base64.b64encode(png_path.read_bytes()).decode(),
        sources=sources_table(run),
        events=events_section(run.events),
        final=final_table(run),
        samples=samples_section(html_path.with_name("samples.jsonl")),
    )
    html_path.write_text(page, encoding="utf-8")
    return html_path, png_path


def _number(value: float, spec: str = ".4g") -> str:
    return format(value, spec) if np.isfinite(value) else "–"


def _with_error(value: float, error: float) -> str:
    return _number(value, ".3f") + (f" ± {error:.3f}" if np.isfinite(error) else "")


def _table(columns: Iterable[str], rows: Iterable[Iterable[str]], style: str = "") -> str:
    lines = [f"<tr>{''.join(f'<th>{html.escape(name)}</th>' for name in columns)}</tr>"]
    lines += [f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows]
    return f'<table class="{style}">{"".join(lines)}</table>'


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path, help="the run's explicit_log_dir")
    try:
        print(*write_report(parser.parse_args().run_dir), sep="\n")
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(f"no report: {error}") from error

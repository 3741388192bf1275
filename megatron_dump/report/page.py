"""report.html: the picture, tables, events and completions on one page that needs no other file."""

from __future__ import annotations

import datetime
import html
import math
import os
from collections import Counter
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from megatron_dump.report.figure import STYLE, draw_figure
from megatron_dump.report.markup import CSS, data_url, table
from megatron_dump.report.run import Run, natural_sort, read_run
from megatron_dump.report.settings import changes, read_settings

COLUMNS = (
    "source",
    "weight",
    "prompts",
    "learnability",
    "reward",
    "pass rate",
    "test before",
    "test after",
    "gain",
)
EVENTS_SHOWN = 50
ROWS_SHOWN = 30  # sources of the table that the page shows at a time
SAMPLES_SHOWN = 36  # completions in all, and at least the latest of each source
SAMPLES_OF_A_SOURCE = 4
CHARACTERS_SHOWN = 8000  # of a prompt or a completion
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title><link rel="icon" href="data:,"><style>{css}</style>{refresh}
<h1>{title}</h1><p>{summary}</p><img alt="curves of the run" src="{picture}">
<h2>Sources</h2>{sources}{events}{settings}<h2>Last step</h2>{final}{samples}</html>
"""
# A reader of a completion, or of a selection, is not interrupted.
REFRESH = """<script>setInterval(() => {{
if (!document.querySelector("details[open]") && getSelection().isCollapsed) location.reload() }}, {ms})</script>
<noscript><meta http-equiv="refresh" content="{seconds}"></noscript>"""


def write_report(log_dir: str | Path, refresh_s: float | None = None) -> tuple[Path, Path]:
    """Write report.html and report.png into the run's folder, each at once; returns their paths.

    refresh_s: the page loads itself again after so many seconds; None: it stays as it is.
    """
    run = read_run(Path(log_dir))
    html_path, png_path = (Path(log_dir) / name for name in ("report.html", "report.png"))
    unfinished = png_path.with_name(".report.png")  # a reader never sees half a file
    with matplotlib.rc_context(STYLE):
        draw_figure(run).savefig(unfinished, dpi=130)
    picture = unfinished.read_bytes()
    os.replace(unfinished, png_path)
    settings = read_settings(Path(log_dir))
    page = PAGE.format(
        title=html.escape(run.name),
        refresh="" if refresh_s is None else REFRESH.format(ms=round(1000 * refresh_s), seconds=math.ceil(refresh_s)),
        summary=summary(run, (settings or {}).get("trainer.grpo.max_steps"), refresh_s),
        css=CSS,
        picture=data_url(picture),
        sources=sources_table(run),
        events=events_section(run.events),
        settings=settings_section(settings),
        final=final_table(run),
        samples=samples_section(run.samples),
    )
    unfinished = html_path.with_name(".report.html")
    unfinished.write_text(page, encoding="utf-8")
    os.replace(unfinished, html_path)
    return html_path, png_path


def summary(run: Run, max_steps: Any, refresh_s: float | None) -> str:
    """How far the run is, and what is missing from its files."""
    of_all = f" of {max_steps}" if isinstance(max_steps, int) and max_steps > 0 else ""
    parts = [f"{len(run.steps)} steps ({run.steps[0]} to {run.steps[-1]}{of_all}), {len(run.sources)} sources."]
    tokens = float(np.nansum(run.series("perf/generated_tokens")))
    seconds = float(np.nansum(run.series("timing_s/step")))
    if tokens > 0:
        parts.append(f"{tokens:,.0f} tokens generated.")
    if seconds > 0:
        parts.append(f"{datetime.timedelta(seconds=round(seconds))} (h:mm:ss) of training steps.")
    if run.cut:
        parts.append(f'<span class="bad">The last line of {" and ".join(run.cut)} is cut short and left out.</span>')
    if refresh_s is not None:
        written = f"Written at {datetime.datetime.now():%H:%M:%S}; the page refreshes itself."
        parts.append(f'<span class="quiet">{written}</span>')
    return " ".join(parts)


def sources_table(run: Run) -> str:
    """Where every source stands at the end of the run."""
    columns: list[str] = [*COLUMNS]
    keys = ("curriculum/{}/weight", "curriculum/{}/mean_abs_adv", "train/{}/reward/mean", "train/{}/accuracy")
    rows = []
    for source in run.sources:
        weight, learnability, reward, rate = (_number(run.smooth(key.format(source))[-1], ".3f") for key in keys)
        prompts = _number(np.nansum(run.series(f"curriculum/{source}/n_prompts")), ".0f")
        tests = [_with_error(run.tested(source, i), run.tested(source, i, "accuracy_se")) for i in (0, -1)]
        gain = run.tested(source, -1) - run.tested(source, 0) if len(run.validations) > 1 else np.nan
        rows.append([source, weight, prompts, learnability, reward, rate, *tests, _number(gain, "+.3f")])
    for title, name in (("format failures", "format_failure"), ("alarms", None)):
        raised = Counter(event["source"] for event in run.events if event["kind"] == "alarm")
        values = [run.smooth(f"curriculum/{s}/{name}")[-1] if name else raised[s] or np.nan for s in run.sources]
        if np.isfinite(values).any():
            columns.append(title)
            for row, value in zip(rows, values, strict=True):
                row.append(_number(value, ".3f" if name else ".0f"))
    note = f'<p class="quiet">Weight, learnability, reward and pass rate: means of the last {run.window} steps.</p>'
    return table(columns, rows, "tall" * (len(rows) > ROWS_SHOWN)) + (note if run.window > 1 else "")


def events_section(events: list[dict[str, Any]]) -> str:
    """What was out of the ordinary, the latest first; nothing for a run without events."""
    if not events:
        return ""
    latest, earlier = events[: -EVENTS_SHOWN - 1 : -1], events[:-EVENTS_SHOWN]
    rows = [(str(e["step"]), e["kind"].replace("_", " "), e["source"] or "–", e["message"]) for e in latest]
    counts = Counter(event["kind"].replace("_", " ") for event in earlier)
    rest = ", ".join(f"{n} × {kind}" for kind, n in counts.most_common())
    shown = table(("step", "kind", "source", "message"), rows, "text events")
    return f"<h2>Events</h2>{shown}" + (f"<p>Earlier, in events.jsonl: {html.escape(rest)}.</p>" if rest else "")


def settings_section(settings: dict[str, Any] | None) -> str:
    """What config.yaml changes against gpt_grpo.yaml; nothing for a folder without one."""
    if settings is None:
        return ""
    shown = table(("key", "run", "default"), changes(settings), "text")
    return f"<h2>Settings that differ from gpt_grpo.yaml</h2>{shown}"


def final_table(run: Run) -> str:
    """The metrics of the last step that do not belong to a source."""
    of_sources = tuple(f"{kind}/{source}/" for kind in ("curriculum", "train") for source in run.sources)
    keys = sorted(key for key in run.rows[-1] if key != "step" and not key.startswith(of_sources))
    columns = ("metric", "value", f"mean of {run.window} steps")[: 2 + (run.window > 1)]
    rows = [(key, _number(run.series(key)[-1]), _number(run.smooth(key)[-1]))[: len(columns)] for key in keys]
    return table(columns, rows)


def samples_section(samples: list[dict[str, Any]]) -> str:
    """The latest completions of each source; nothing if the run keeps none."""
    by_source: dict[str, list[dict[str, Any]]] = {}
    for sample in samples:
        by_source.setdefault(sample["source"], []).append(sample)
    shown = min(max(SAMPLES_SHOWN // max(len(by_source), 1), 1), SAMPLES_OF_A_SOURCE)
    parts = []
    for source in natural_sort(by_source):
        parts.append(f"<h3>{html.escape(source)}</h3>")
        parts += [_sample(sample) for sample in by_source[source][: -shown - 1 : -1]]
    return f"<h2>Sample completions</h2>{''.join(parts)}" if parts else ""


def _sample(sample: dict[str, Any]) -> str:
    verdict = "right" if sample["correct"] else "wrong"
    mark = f'<b class="{"good" if sample["correct"] else "bad"}">{verdict}</b>'
    reward = "–" if sample["reward"] is None else format(sample["reward"], "g")
    said = sample.get("reason") or verdict
    reason = f' <span class="quiet">({html.escape(said)})</span>' if said != verdict else ""
    texts = "".join(f"<pre>{html.escape(_clip(sample[name]))}</pre>" for name in ("prompt", "completion"))
    return f"<details><summary>step {sample['step']}: {mark}, reward {reward}{reason}</summary>{texts}</details>"


def _clip(text: str) -> str:
    rest = len(text) - CHARACTERS_SHOWN
    return text if rest <= 0 else f"{text[:CHARACTERS_SHOWN]}\n… {rest:,} more characters in samples.jsonl"


def _number(value: float, spec: str = ".4g") -> str:
    return format(value, spec) if np.isfinite(value) else "–"


def _with_error(value: float, error: float) -> str:
    return _number(value, ".3f") + (f" ± {error:.3f}" if np.isfinite(error) else "")

"""report.html: the picture, tables, events and completions on one page that needs no other file."""

from __future__ import annotations

import base64
import html
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from megatron_dump.report.figure import STYLE, draw_figure
from megatron_dump.report.run import Run, read_jsonl, read_run

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


def _number(value: float, spec: str = ".4g") -> str:
    return format(value, spec) if np.isfinite(value) else "–"


def _with_error(value: float, error: float) -> str:
    return _number(value, ".3f") + (f" ± {error:.3f}" if np.isfinite(error) else "")


def _table(columns: Iterable[str], rows: Iterable[Iterable[str]], style: str = "") -> str:
    lines = [f"<tr>{''.join(f'<th>{html.escape(name)}</th>' for name in columns)}</tr>"]
    lines += [f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows]
    return f'<table class="{style}">{"".join(lines)}</table>'

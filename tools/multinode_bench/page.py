"""report.html of a folder of results: tables and plots on one page that needs no other file."""

from __future__ import annotations

import base64
import html
import io
import pathlib
from collections.abc import Iterator
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from megatron_dump.report.figure import STYLE
from multinode_bench import figures, tables
from multinode_bench.files import machine_line, read_json
from multinode_bench.scaling import efficiencies
from multinode_bench.steps import read_steps

_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Benchmark on many ranks</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1120px; margin: 2em auto; padding: 0 1em }}
h1, h2, h3 {{ font-weight: 600 }} h2 {{ margin-top: 2em; border-bottom: 1px solid #ddd }} img {{ width: 100% }}
table {{ border-collapse: collapse }} td, th {{ padding: .2em .8em; text-align: right; border-bottom: 1px solid #eee }}
td:first-child, th:first-child {{ text-align: left }} details {{ margin: 1em 0 }}
</style><h1>Benchmark on many ranks</h1>{body}</html>
"""


def write_report(folder: pathlib.Path) -> pathlib.Path:
    """FOLDER/report.html, and each figure as a PNG beside it. ValueError if there is nothing to show."""
    style: Any = STYLE
    with matplotlib.rc_context(style):
        sections = [*_collectives(folder), *_steps(folder), *_check(folder), *_simulation(folder)]
    if not sections:
        raise ValueError(f"--out={folder}: nothing was measured or simulated there")
    path = folder / "report.html"
    path.write_text(_PAGE.format(body="".join(sections)), encoding="utf-8")
    return path


def _collectives(folder: pathlib.Path) -> Iterator[str]:
    for path in sorted((folder / "collectives").glob("*.json")):
        found = read_json(path, "--out")
        yield f"<h2>Collectives, {html.escape(found['name'])}</h2><p>{html.escape(machine_line(found['machine']))}</p>"
        yield _picture(figures.draw_collectives(found), folder / f"collectives-{found['name']}.png")
        yield tables.collectives(found["fits"]).html()
        yield f"<details><summary>every size</summary>{tables.bandwidths(found).html()}</details>"


def _steps(folder: pathlib.Path) -> Iterator[str]:
    measured = read_steps(folder)
    if not measured:
        return
    weak, strong = efficiencies(measured, "weak"), efficiencies(measured, "strong")
    yield "<h2>Steps</h2>"
    yield _picture(figures.draw_scaling(weak, strong, measured), folder / "scaling.png")
    for mode, rows in (("strong", strong), ("weak", weak)):
        if rows:
            yield tables.scaling(mode, rows).html()
    yield tables.phases(measured).html()


def _check(folder: pathlib.Path) -> Iterator[str]:
    if not (folder / "check.json").exists():
        return
    found = read_json(folder / "check.json", "--out")
    yield "<h2>Predicted and measured</h2>"
    yield _picture(figures.draw_check(found["seconds"]), folder / "check.png")
    for table in (tables.check(found["seconds"]), tables.fits(found["fits"]), tables.held(found["bytes"])):
        yield table.html()


def _simulation(folder: pathlib.Path) -> Iterator[str]:
    if not (folder / "simulation.json").exists():
        return
    about = read_json(folder / "simulation.json", "--out")
    yield f"<h2>Simulation</h2><p><b>{html.escape(tables.extrapolated(about))}</b></p>"
    yield f"<p><code>{html.escape(' '.join(about['arguments']))}</code></p>"
    yield _picture(figures.draw_simulation(about), folder / "simulation.png")
    yield tables.simulation(about).html()
    rows = [(name, text) for name, text in about["sources"].items()]
    yield tables.Table("Where the constants come from", ("constant", "source"), rows).html()


def _picture(figure: Figure, path: pathlib.Path) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120, format="png")
    path.write_bytes(buffer.getvalue())
    content = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(path.stem)}" src="data:image/png;base64,{content}">'

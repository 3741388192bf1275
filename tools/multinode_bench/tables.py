"""Results as tables: text for a console, HTML for the page."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Sequence
from typing import Any

from multinode_bench.steps import PHASES


@dataclasses.dataclass(frozen=True)
class Table:
    """Cells of text; the first column is left-aligned."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def text(self) -> str:
        lines = [self.columns, *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.columns))]
        cells = [
            [c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
            for line in lines
        ]
        return "\n".join([f"\n{self.title}", *("  ".join(line) for line in cells)])

    def html(self) -> str:
        head = "".join(f"<th>{html.escape(name)}</th>" for name in self.columns)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in self.rows)
        return f"<h3>{html.escape(self.title)}</h3><table><tr>{head}</tr>{body}</table>"


def collectives(fits: Sequence[dict[str, Any]]) -> Table:
    rows = [
        (
            f"{f['group']}, {f['ranks']} ranks, {f['nodes']} node{'s' * (f['nodes'] > 1)}",
            f["operation"],
            f"{1e6 * f['alpha_s']:.1f}",
            f"{1e9 * f['beta_s_per_byte']:.3f}",
            _rate(f["beta_s_per_byte"]),
            f"{f['rms_error']:.0%}",
            f"{f['largest_error']:.0%}",
        )
        for f in fits
    ]
    columns = ("group", "operation", "alpha, µs", "beta, ns/byte", "1/beta, GB/s", "error, rms", "largest")
    return Table("seconds = alpha + beta × bytes", columns, rows)


def bandwidths(found: dict[str, Any]) -> Table:
    rows = [
        (
            f"{r['group']}, {r['ranks']} ranks",
            r["operation"],
            size(r["bytes"]),
            f"{1e3 * r['seconds']:.3f}",
            f"{1e3 * r['fastest']:.3f} – {1e3 * r['slowest']:.3f}",
            f"{r['algbw'] / 1e9:.3f}",
            f"{r['busbw'] / 1e9:.3f}",
        )
        for r in found["rows"]
    ]
    columns = ("group", "operation", "bytes", "median, ms", "range", "algbw, GB/s", "busbw, GB/s")
    return Table(f"Collectives, {found['name']} ({found['backend']})", columns, rows)


def scaling(mode: str, found: Sequence[dict[str, Any]]) -> Table:
    rows = [
        (
            r["name"],
            str(r["ranks"]),
            str(r["prompts"]),
            f"{r['step_s']:.2f}",
            f"{r['tokens_per_s_per_rank']:,.0f}",
            f"{r['efficiency']:.0%}",
        )
        for r in found
    ]
    what = "rollouts a rank stay the same" if mode == "weak" else "rollouts in all stay the same"
    columns = ("layout", "ranks", "prompts", "step, s", "tokens/s a rank", "efficiency")
    return Table(f"{mode.capitalize()} scaling: {what}", columns, rows)


def phases(found: Sequence[Any]) -> Table:
    names = (*PHASES, "other", "step")
    rows = [(m.name, *(f"{m.median(name):.2f}" for name in names)) for m in found]
    return Table("Seconds of a step, medians", ("layout", *names), rows)


def simulation(about: dict[str, Any]) -> Table:
    rows = []
    for r in about["rows"]:
        memory = f"{r['memory']['peak'] / 1e9:.1f}" + ("" if r["fits"] else " (too much)")
        rows.append(
            (
                str(r["ranks"]),
                str(r["nodes"]),
                str(r["prompts"]),
                f"{r['step_s']:.1f}",
                f"{r['tokens_per_s_per_rank']:,.0f}",
                f"{r['bubble_of_update']:.1%}",
                f"{r['communication']:.1%}",
                memory,
            )
        )
    columns = (
        "ranks",
        "nodes",
        "prompts",
        "step, s",
        "tokens/s a rank",
        "bubble of the update",
        "communication",
        "memory, GB",
    )
    return Table(f"Predicted, {about['mode']} scaling; {about['constants']}", columns, rows)


def extrapolated(about: dict[str, Any]) -> str:
    """What of a simulation lies beyond what was measured."""
    rows, measured = about["rows"], about["measured_ranks"]
    beyond = [str(r["ranks"]) for r in rows if r["extrapolated"]]
    if not measured:
        return "All of it is extrapolated: no constant was measured."
    if not beyond:
        return f"Within what the constants were measured on ({measured} ranks)."
    return f"Extrapolated: {', '.join(beyond)} ranks; the constants were measured on at most {measured}."


def fits(found: dict[str, Any]) -> Table:
    rows = [
        (name, "  ".join(f"{c:.3g}" for c in fit["coefficients"]), f"{fit['error']:.0%}", f"{fit['worst']:.0%}")
        for name, fit in found.items()
    ]
    columns = ("constants", "seconds a message, layer or position; a byte or operation", "error, rms", "largest")
    return Table("Fitted constants", columns, rows)


def check(found: Sequence[dict[str, Any]]) -> Table:
    names = (*PHASES, "step")
    rows = []
    for r in found:
        cells = [_ratio(r["phases"][name]) for name in names]
        step = r["phases"]["step"]
        kind = "fitted" if r["fitted"] else "predicted"
        rows.append((r["name"], str(r["ranks"]), kind, f"{step['predicted']:.2f}", f"{step['measured']:.2f}", *cells))
    columns = ("layout", "ranks", "", "predicted, s", "measured, s", *(f"{name}: ratio" for name in names))
    return Table("Predicted : measured (one rank is what the constants are fitted to)", columns, rows)


def held(found: Sequence[dict[str, Any]]) -> Table:
    rows = [
        (r["name"], r["part"], f"{r['predicted']:,}", f"{r['measured']:,}", "same" if r["exact"] else "differs")
        for r in found
    ]
    return Table("Bytes of all ranks", ("layout", "part", "predicted", "measured", "on every rank"), rows)


def size(n: int) -> str:
    return f"{n // 2**20} MiB" if n >= 2**20 else f"{n // 2**10} KiB"


def _rate(beta: float) -> str:
    return f"{1e-9 / beta:.2f}" if beta else "–"


def _ratio(both: dict[str, float]) -> str:
    return f"{both['predicted'] / both['measured']:.2f}" if both["measured"] > 1e-3 else "–"

"""An evaluation for people: a table of each file and mode."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

LEFT_OUT = ("prompts", "samples", "pass_rates", "finished")


def show(result: Mapping[str, Any], console: Console | None = None) -> None:
    """Print evaluation.evaluate_policy's result: colours and boxes on a terminal, plain lines elsewhere."""
    plain = {"width": 110, "force_terminal": False, "color_system": None, "highlight": False}
    screen = console or (Console() if sys.stdout.isatty() else Console(**plain))
    confidence = result["settings"]["confidence"]
    for name, file in result["files"].items():
        for mode, table in file["modes"].items():
            screen.print(Text(f"{name}, {mode}, with {confidence:.0%} intervals over prompts"), soft_wrap=True)
            rows = [(source, table["sources"][source]) for source in sorted(table["sources"], key=_natural_key)]
            screen.print(_table([*rows, ("mean", table["mean"])], screen.width))


def _table(rows: Sequence[tuple[str, Mapping[str, Any]]], width: int) -> Table:
    """A row a source, the mean last; where the columns do not fit, a row a metric of each."""
    metrics = list(dict.fromkeys(name for _, row in rows for name in row if name not in LEFT_OUT))
    fits = max(len(source) for source, _ in rows) + 10 + 22 * len(metrics) <= width
    columns = metrics if fits else ("metric", "value")
    drawn = Table("source", "prompts", *columns, box=box.SIMPLE, padding=(0, 1, 0, 0))
    for number, (source, row) in enumerate(rows, 1):
        first, style = (Text(source), str(row.get("prompts", ""))), "bold" if number == len(rows) else ""
        if fits:
            drawn.add_row(*first, *(_cell(row.get(metric)) for metric in metrics), style=style)
            continue
        for i, metric in enumerate(metrics):
            drawn.add_row(*(first if i == 0 else ("", "")), metric, _cell(row.get(metric)), style=style)
    return drawn


def _cell(found: Mapping[str, float | None] | None) -> str:
    if found is None or found["value"] is None:
        return "–"
    digits = 1 if abs(found["value"]) >= 10 else 3
    numbers = [f"{found[name]:.{digits}f}" if found[name] is not None else "–" for name in ("value", "low", "high")]
    return f"{numbers[0]} ({numbers[1]}…{numbers[2]})"


def _natural_key(name: str) -> list[str | int]:
    """kk_logic_2 before kk_logic_10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]

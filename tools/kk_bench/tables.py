"""Tables for the console that are Markdown as they stand."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; numbers stand to the right, in all columns but the first."""
    table = Table(box=box.MARKDOWN)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console(width=200, highlight=False)
    console.print(f"**{title}**")
    console.print(table)


def machine() -> str:
    return f"{os.cpu_count()} cores ({platform.machine()}), Python {platform.python_version()}, NumPy {np.__version__}"

"""The progress bar of the commands here."""

from __future__ import annotations

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress


def bar() -> Progress:
    """A bar on stderr that goes when it is done; nothing at all when stderr is not a terminal."""
    console = Console(stderr=True)
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)

"""The progress bar of the commands here, in tools/ and in examples/."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress

Item = TypeVar("Item")
_REDRAW_S = 0.1


def bar(show: bool = True, auto_refresh: bool = True) -> Progress:
    """A bar on stderr that goes when it is done; nothing at all when stderr is not a terminal, or without `show`.

    What is printed to stdout meanwhile appears above it, or stays in the file that stdout is.
    """
    console = Console(stderr=True)
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    return Progress(
        *columns,
        console=console,
        transient=True,
        auto_refresh=auto_refresh,
        redirect_stdout=sys.stdout.isatty(),
        disable=not (show and console.is_terminal),
    )


def each(items: Sequence[Item], what: str, show: bool = True) -> Iterator[Item]:
    """The items, and a bar that is drawn only when the next one is asked for.

    No thread draws while the caller works on an item: it would disturb what is measured, and be there at a fork.
    """
    with bar(show, auto_refresh=False) as progress:
        yield from progress.track(items, description=what)


@contextlib.contextmanager
def meter(what: str, show: bool = True) -> Iterator[Callable[[int, int], None]]:
    """A function that takes how many are done, and of how many; without a thread, too.

    Where fewer are done than before, something else has begun.
    """
    with bar(show, auto_refresh=False) as progress:
        task, drawn = progress.add_task(what, total=None), time.monotonic()
        progress.refresh()

        def tell(done: int, total: int) -> None:
            nonlocal drawn
            if done < progress.tasks[0].completed:
                progress.reset(task)
            now = time.monotonic()
            is_due = done == total or now - drawn > _REDRAW_S
            progress.update(task, completed=done, total=total, refresh=is_due)
            drawn = now if is_due else drawn

        yield tell

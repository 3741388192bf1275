"""The progress bars of the commands: on a terminal alone, and never in the way of what is printed or measured."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import threading

import pytest

from kk.progress import each, meter

SCRIPT = """
import threading
from kk.progress import each, meter
show = {show}
for i in each([10, 20, 30], "items", show):
    print(i, threading.active_count(), flush=True)
with meter("parts", show) as tell:
    for done in (0, 1, 2, 0, 5):
        tell(done, 5)
        print(done, threading.active_count(), flush=True)
"""
PRINTED = "10 1\n20 1\n30 1\n0 1\n1 1\n2 1\n0 1\n5 1\n"


def _run(show: bool, on_terminal: bool) -> tuple[str, str]:
    """What a process printed to a pipe, and what its stderr, a terminal or a pipe, got."""
    ours, theirs = pty.openpty() if on_terminal else os.pipe()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "PYTHONPATH": os.pathsep.join(sys.path)}
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "NO_COLOR"):
        environment.pop(name, None)
    shown = []

    def read() -> None:
        try:
            while text := os.read(ours, 65536):
                shown.append(text)
        except OSError:  # how a terminal ends
            pass

    reader = threading.Thread(target=read)
    reader.start()
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(show=show)],
        stdout=subprocess.PIPE,
        stderr=theirs,
        env=environment,
        timeout=120,
        check=False,
    )
    os.close(theirs)
    reader.join()
    os.close(ours)
    assert done.returncode == 0, b"".join(shown)
    return done.stdout.decode(), b"".join(shown).decode()


def test_a_terminal_gets_the_bar_and_a_file_gets_what_is_printed():
    """And no thread draws: there is one thread in every loop."""
    printed, shown = _run(show=True, on_terminal=True)
    assert printed == PRINTED
    assert all(text in shown for text in ("items", "1/3", "2/3", "3/3", "parts", "5/5"))


@pytest.mark.parametrize(("show", "on_terminal"), [(True, False), (False, True)])
def test_a_log_and_other_ranks_get_nothing(show, on_terminal):
    assert _run(show, on_terminal) == (PRINTED, "")


def test_items_and_errors_pass_through():
    assert list(each(range(3), "x")) == [0, 1, 2]
    with pytest.raises(ValueError, match="bad"), meter("x"):
        raise ValueError("bad")

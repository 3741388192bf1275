"""Until something is so."""

from __future__ import annotations

import time


def wait_for(condition, within_s=60.0):
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)

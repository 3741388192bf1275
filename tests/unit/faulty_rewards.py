"""Reward functions for the tests of the reward processes: they do what the text tells them to."""

from __future__ import annotations

import ctypes
import math
import os
import signal
import subprocess
import sys
import time

from megatron_dump.rewards import GroundTruthError
from megatron_dump.types import Score


def obey(text: str, ground_truth: str) -> Score:
    """`text`: an order and its arguments, or a number, which becomes the reward."""
    order, _, argument = text.partition(" ")
    if order in ORDERS:
        ORDERS[order](argument)
        return Score(0.0, False, False, f"survived {order}")
    return Score(float(order), True, True, argument, {"truth": float(len(ground_truth))})


def _loaded(modules: str) -> None:
    raise RuntimeError(" ".join(name for name in modules.split() if name in sys.modules) or "none of them")


def _grandchild(path: str) -> None:
    child = subprocess.Popen(["sleep", "600"])
    with open(path, "w") as file:
        file.write(str(child.pid))
    time.sleep(600)


def _ground_truth(words: str) -> None:
    raise GroundTruthError(words)


def _raise(words: str) -> None:
    raise KeyError(words)


def _late(words: str) -> None:
    raise TimeoutError(words)


def _write_everywhere(words: str) -> None:
    for fd in range(3, 64):
        try:
            os.write(fd, words.encode() + b"\n")
        except OSError:
            continue


ORDERS = {
    "sleep": lambda seconds: time.sleep(float(seconds)),
    "spin": lambda _: math.factorial(10**8),  # holds the interpreter's lock, and no Python signal gets through
    "deaf": lambda _: (signal.signal(signal.SIGTERM, signal.SIG_IGN), time.sleep(600)),
    "segfault": lambda _: ctypes.string_at(0),
    "exit": lambda code: os._exit(int(code)),
    "quit": lambda code: sys.exit(int(code)),
    "devour": lambda _: [bytearray(2**28) for _ in range(10**6)],
    "print": lambda words: print(words, flush=True),
    "read": lambda _: sys.stdin.read(),
    "loaded": _loaded,
    "grandchild": _grandchild,
    "truth": _ground_truth,
    "raise": _raise,
    "late": _late,
    "garble": _write_everywhere,
    "wrong": lambda _: None,
}


def no_score(text: str, ground_truth: str) -> float:
    return 1.0


def make_constant(*, value: float = 1.0):
    """A factory: its options are its keyword-only parameters."""
    return lambda text, ground_truth: Score(value, True, True, text)


def with_option(text: str, ground_truth: str, *, bonus: float = 0.0) -> Score:
    """No factory, but with an option."""
    return Score(1.0 + bonus, True, True)


class Stateful:
    """A class as a factory."""

    def __init__(self, *, start: int = 0) -> None:
        if start < 0:
            raise ValueError(f"start: {start} must not be negative")
        self.count = start

    def __call__(self, text: str, ground_truth: str) -> Score:
        self.count += 1
        return Score(float(self.count), True, True)

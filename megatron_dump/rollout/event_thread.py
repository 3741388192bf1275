"""A thread that owns some state: what others want of it is posted, and run there one thing at a time."""

from __future__ import annotations

import abc
import logging
import queue
import threading
import time
from collections.abc import Callable

log = logging.getLogger(__name__)


class EventThread(threading.Thread, abc.ABC):
    """Subclasses say what follows from an event (`advance`), and when the clock alone matters (`deadline`)."""

    def __init__(self, name: str) -> None:
        super().__init__(name=name, daemon=True)
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._lock, self._ended = threading.Lock(), False

    def post(self, action: Callable[[], None]) -> None:
        """From any thread. After the end it is run at once, by the caller."""
        with self._lock:
            if not self._ended:
                self._inbox.put(action)
                return
        action()

    def stop(self) -> None:
        """After what was posted before; returns when the thread has ended."""
        self.post(self._end)
        self.join()

    @abc.abstractmethod
    def advance(self) -> None:
        """Called after events, and at the deadline."""

    @abc.abstractmethod
    def deadline(self) -> float | None:
        """When to call `advance` though nothing happened, in time.monotonic's seconds."""

    @abc.abstractmethod
    def broken(self, error: Exception) -> None:
        """An event or `advance` raised: a fault of the program, which must leave nobody waiting."""

    def run(self) -> None:
        while not self._ended:
            try:
                self._next()
                self.advance()
            except Exception as error:
                log.exception("the thread %r failed", self.name)
                self.broken(error)
        while not self._inbox.empty():
            self._inbox.get()()

    def _next(self) -> None:
        """Run what is there, or wait for the first."""
        deadline = self.deadline()
        try:
            self._inbox.get(timeout=None if deadline is None else max(0.001, deadline - time.monotonic()))()
            while not self._inbox.empty():
                self._inbox.get()()
        except queue.Empty:
            pass

    def _end(self) -> None:
        with self._lock:
            self._ended = True

"""One engine of a pool: what it is up to, and the thread that talks to it."""

from __future__ import annotations

import enum
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from megatron_dump.rollout.engine import EngineHandle


class State(enum.Enum):
    SERVING = "serving"
    BARE = "without weights"
    STARTING = "starting"  # restarted, and given weights where the pool can do that
    DOWN = "down"  # dead while the pool sleeps; `wake` restarts it


class Member:
    """Belongs to the pool's thread, but for the calls on the handle: those are made, in order, by a thread of its own.

    So no engine's full pipe or slow start holds up the others. The thread lasts as long as the member: on Linux a
    process may be made to die with the thread that started it.
    """

    def __init__(self, index: int, name: str, handle: EngineHandle) -> None:
        self.index, self.name, self.handle = index, name, handle
        self.state = State.SERVING
        self.asleep = False
        self.will_serve = False  # STARTING, and will have its weights then
        self.restarts = 0
        self.last_words = ""
        self.suspected = False  # it said it was not alive, but its calls have not failed yet
        self.deadline: float | None = None  # of what it is doing, in time.monotonic's seconds
        self._life = 0  # answers of an earlier life are dropped
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    @property
    def useful(self) -> bool:
        """It serves, or will without being given weights by a `load_weights`."""
        return self.state is State.SERVING or (self.state is State.STARTING and self.will_serve)

    def ask(
        self, call: Callable[[], Future[Any] | None], post: Callable[[Callable[[], None]], None], then: Callable
    ) -> None:
        """Have `call` made; `post` a call of then(self, value, error) when it is answered and this life still lasts."""
        life = self._life

        def answered(value: Any, error: BaseException | None) -> None:
            post(lambda: then(self, value, error) if life == self._life else None)

        def job() -> None:
            try:
                future = call()
            except Exception as error:  # noqa: BLE001  the pool's thread judges it
                answered(None, error)
                return
            if future is None:
                answered(None, None)
            else:
                future.add_done_callback(lambda f: answered(*_outcome(f)))

        self._jobs.put(job)

    def given_up(self, words: str) -> None:
        """What it was asked is nobody's business any more."""
        self._life += 1
        self.state, self.last_words = State.DOWN, words
        self.deadline, self.suspected, self.asleep = None, False, False

    def within(self, seconds: float) -> None:
        self.deadline = time.monotonic() + seconds

    def close(self) -> None:
        """Have the handle closed after what the thread is doing."""
        self._life += 1
        self._jobs.put(self.handle.close)
        self._jobs.put(None)

    def join(self, seconds: float) -> None:
        """Wait for the end of `close`; a thread that is stuck in a call gets the handle closed under it."""
        self._thread.join(seconds)
        if self._thread.is_alive():
            self.handle.close()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()


def _outcome(future: Future[Any]) -> tuple[Any, BaseException | None]:
    try:
        return future.result(), None
    except BaseException as error:  # noqa: BLE001  a cancelled future raises no Exception
        return None, error

"""One life of an engine's process, from start to end, as its parent sees it."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
import select
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dump.rollout import frames
from megatron_dump.rollout.engine import EngineDied, EngineRefused

_LOOK_S = 0.5  # how often a silent process is looked at: its own children may hold its socket open
_GRACE_S = 10.0  # for an engine that is told to close
_LAST_WORDS = 4  # lines


@dataclasses.dataclass
class _Call:
    parse: Callable[[list[np.ndarray]], Any]
    limit_s: float
    starts: bool = False  # done when the engine is up
    future: Future[Any] = dataclasses.field(default_factory=Future)

    def __post_init__(self) -> None:
        self.future.set_running_or_notify_cancel()


class EngineChild:
    """Starts at once, on a thread that takes its answers; each call's future is done by that thread."""

    def __init__(
        self, command: Sequence[str], setup: dict[str, Any], log: Path, env: Mapping[str, str], start_timeout_s: float
    ) -> None:
        self._log, self._log_start = log, log.stat().st_size if log.exists() else 0
        self._process: subprocess.Popen[bytes] | None = None
        self._failure: Exception | None = None  # the answer to every call from now on
        self._state, self._sending = threading.Lock(), threading.Lock()
        self._calls: collections.deque[_Call] = collections.deque()  # not answered yet; the first is being worked on
        self._since = time.monotonic()  # when it was begun
        self._socket, theirs = socket.socketpair()
        self._thread = threading.Thread(target=self._live, args=(command, env, theirs), name="engine", daemon=True)
        self._killed = False
        self._ask(setup, (), _Call(lambda _: None, start_timeout_s, starts=True))

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    @property
    def alive(self) -> bool:
        return self._failure is None

    def call(
        self,
        head: dict[str, Any],
        arrays: Sequence[np.ndarray],
        parse: Callable[[list[np.ndarray]], Any],
        limit_s: float,
    ) -> Future[Any]:
        """Ask for something. The future's exception is EngineDied or EngineRefused."""
        return self._ask(head, arrays, _Call(parse, limit_s))

    def end(self, why: str) -> None:
        """Kill it with all its children, and reap it; calls not answered fail with `why`."""
        self._fail(EngineDied(f"the engine was ended: {why}"))
        if self._thread is not threading.current_thread():
            self._thread.join()

    def close(self) -> None:
        """Let it end by itself if it is idle, so that it can tidy up; otherwise `end`."""
        with self._state:
            idle = self._failure is None and not self._calls
        if idle and self._process:
            with contextlib.suppress(OSError), self._sending:
                frames.send(self._socket, {"call": "close"})
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_GRACE_S)
        self.end("it is closed")

    def _ask(self, head: dict[str, Any], arrays: Sequence[np.ndarray], call: _Call) -> Future[Any]:
        with self._sending:  # answers come in the order of what is sent
            with self._state:
                if self._failure is not None:
                    call.future.set_exception(_again(self._failure))
                    return call.future
                if not self._calls:
                    self._since = time.monotonic()
                self._calls.append(call)
                self._socket.settimeout(call.limit_s)
            if call.starts:
                self._thread.start()
            try:
                frames.send(self._socket, head, arrays)
            except OSError as error:  # it is dead or stopped: the thread says which, if it knows
                if isinstance(error, TimeoutError):
                    self._fail(EngineDied(f"the engine took no call for {call.limit_s:g} s"))
        return call.future

    def _live(self, command: Sequence[str], env: Mapping[str, str], theirs: socket.socket) -> None:
        """The thread: start it, take its answers, tell everybody when it is over."""
        try:
            with theirs, open(self._log, "ab") as log:
                self._process = subprocess.Popen(
                    [*command, str(theirs.fileno()), str(os.getpid())],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=dict(env),
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,
                )
            while self._failure is None:
                self._take()
        except (EOFError, ConnectionError):
            self._fail(self._died())
        except Exception as error:  # noqa: BLE001  whatever it is, nobody may be left waiting
            self._fail(EngineDied(f"the engine's connection failed: {type(error).__name__}: {error}"))
        finally:
            self._kill()
            self._socket.close()

    def _take(self) -> None:
        """Wait for an answer, a death or a deadline, for a moment at most."""
        assert self._process is not None
        poller = select.poll()  # select knows no file number above 1023
        poller.register(self._socket, select.POLLIN)
        if not poller.poll(1000 * _LOOK_S):
            if self._process.poll() is not None:
                raise EOFError
            with self._state:
                call = self._calls[0] if self._calls else None
            if call is not None and time.monotonic() > self._since + call.limit_s:
                what = "was not up" if call.starts else "gave no answer"
                self._fail(EngineDied(f"the engine {what} after {call.limit_s:g} s; {self._words()}"))
            return
        head, arrays = frames.receive(self._socket)
        call = self._calls[0]
        answer = None if "error" in head else call.parse(arrays)
        with self._state:
            if not self._calls:
                return  # ended meanwhile
            self._calls.popleft()
            self._since = time.monotonic()
        if "error" not in head:
            call.future.set_result(answer)
            return
        if not head["refused"]:
            failure: Exception = EngineDied(f"the engine failed: {head['error']} (log: {self._log})")
        else:
            failure = EngineRefused(head["error"])
        if not head["refused"] or call.starts:
            self._fail(failure)
        call.future.set_exception(_again(failure))

    def _fail(self, failure: Exception) -> None:
        """Everybody who waits, now or later, is told; the thread ends the process."""
        with self._state:
            if self._failure is not None:
                return
            self._failure = failure
            waiting = list(self._calls)
            self._calls.clear()
        self._kill()
        for call in waiting:
            call.future.set_exception(_again(failure))

    def _died(self) -> EngineDied:
        assert self._process is not None
        try:
            code = self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            return EngineDied(f"the engine closed its connection; {self._words()}")
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return EngineDied(f"the engine {how}; {self._words()}")

    def _words(self) -> str:
        with open(self._log, "rb") as log:
            log.seek(max(self._log_start, self._log.stat().st_size - 4000))
            lines = [line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()]
        return f"its last words: {' | '.join(lines[-_LAST_WORDS:]) or 'none'} (log: {self._log})"

    def _kill(self) -> None:
        with self._state:
            if self._process is None or self._killed:  # its number may be another process's by now
                return
            self._killed = True
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def _again(failure: Exception) -> Exception:
    """For every caller an exception of its own: raising one adds to its traceback."""
    return type(failure)(str(failure))

"""One reward process as its parent sees it: a pipe to it, a pipe from it, and the jobs it has in hand."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from megatron_dump.rewards.child import FAILED, OUT_OF_MEMORY, READY, VERDICTS

JobFields = tuple[str, str, str]  # source, text, ground truth

# A fresh interpreter, neither a fork (threads, CUDA) nor multiprocessing's spawn (imports the main script, so torch).
_PROGRAM = "import sys; sys.path[:] = sys.argv[2:]; from megatron_dump.rewards.child import main; main()"
_READ = 1 << 18  # bytes


class Garbled(Exception):
    """A process wrote something else than an answer."""


class Worker:
    """Starts at once; `ready` when its first line has arrived. Never blocks.

    On Linux it dies with the thread that made it, at the latest with the thread's process.
    """

    def __init__(self, setup: bytes) -> None:
        """setup: what `child.main` reads first, pickled."""
        path = [entry or os.getcwd() for entry in sys.path]
        self.process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, str(os.getpid()), *path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,  # Ctrl-C is the parent's business; and its own children can be killed with it
            env={"OMP_NUM_THREADS": "1", **os.environ},
        )
        assert self.process.stdin and self.process.stdout
        self.jobs_fd, self.answers_fd = self.process.stdin.fileno(), self.process.stdout.fileno()
        os.set_blocking(self.jobs_fd, False)
        os.set_blocking(self.answers_fd, False)
        self.outbox, self.inbox = memoryview(setup), b""
        self.jobs: collections.deque[int] = collections.deque()  # numbers of the jobs in hand, in their order
        self.ready = False
        self.since = time.monotonic()  # when it began what it is doing: starting, or the first of `jobs`
        self.flush()

    @property
    def idle(self) -> bool:
        return self.ready and not self.jobs

    def give(self, numbers: Sequence[int], jobs: Sequence[JobFields]) -> None:
        """Hand over jobs to an idle worker."""
        self.jobs.extend(numbers)
        self.outbox = memoryview(pickle.dumps([tuple(job) for job in jobs], protocol=pickle.HIGHEST_PROTOCOL))
        self.since = time.monotonic()
        self.flush()

    def flush(self) -> None:
        """Write as much of what is to be said as the pipe takes."""
        # a dead process is noticed when it is read from
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            while self.outbox:
                self.outbox = self.outbox[os.write(self.jobs_fd, self.outbox) :]
                self.since = time.monotonic()

    def read(self) -> list[Any] | None:
        """The answers that have arrived since; None when the process is gone and nothing is left to read. Garbled."""
        try:
            data = os.read(self.answers_fd, _READ)
        except BlockingIOError:
            return []
        if not data:
            return None
        *lines, self.inbox = (self.inbox + data).split(b"\n")
        if lines:
            self.since = time.monotonic()
        try:
            answers = [json.loads(line) for line in lines]
            expected = VERDICTS if self.ready else (READY, FAILED)
            if len(answers) > max(1, len(self.jobs)) or any(answer[0] not in expected for answer in answers):
                raise ValueError
        except (ValueError, TypeError, LookupError):
            raise Garbled("the process wrote something else than an answer") from None
        return answers

    def kill(self, dying: bool = False) -> str:
        """End it with all its children, and reap it: how it ended, in words. dying: it is about to end by itself."""
        if self.process.stdout and self.process.stdout.closed:
            return "killed"  # before; its number may be another process's by now
        ended = self.process.poll()
        if dying:
            with contextlib.suppress(subprocess.TimeoutExpired):
                ended = self.process.wait(timeout=1.0)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        code = self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe:
                with contextlib.suppress(OSError):
                    pipe.close()
        if ended is None:
            return "killed"
        if code == OUT_OF_MEMORY:
            return "out of memory"
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

"""A fixed number of reward processes: work dealt out, late and dead ones replaced, answers in order."""

from __future__ import annotations

import collections
import concurrent.futures
import os
import selectors
import time
import weakref
from collections.abc import Sequence
from typing import Any

from megatron_dump.rewards.child import CRASH, FAILED, TIMEOUT
from megatron_dump.rewards.worker import Garbled, JobFields, Worker

_LARGEST_CHUNK, _LARGEST_TEXT = 128, 4_000_000  # jobs and characters that one message to a process may have
_PAUSE = 0.0005  # seconds; lets answers gather, instead of waking up for each


class Processes:
    """Used by one thread at a time, from the process that made it."""

    def __init__(self, size: int, setup: bytes, timeout_s: float, start_timeout_s: float) -> None:
        """setup: as `child.main` reads it. Waits until all are ready; ValueError when they cannot be."""
        self.size, self.setup, self.timeout_s, self.start_timeout_s = size, setup, timeout_s, start_timeout_s
        self._workers: list[Worker] = []
        # Linux's parent-death signal comes at the end of the thread that started a process: one that lasts starts all
        self._starter = concurrent.futures.ThreadPoolExecutor(1, "reward-processes")
        self._selector = selectors.DefaultSelector()
        self._finalize = weakref.finalize(self, _kill_all, self._workers, os.getpid())  # at the interpreter's exit too
        self._run(_Batch(()), all_ready=True)

    def run(self, jobs: Sequence[JobFields]) -> list[tuple[Any, ...]]:
        """What `child.judge` says of each job, in order; (CRASH or TIMEOUT, why) where a process did not survive it."""
        batch = _Batch(jobs)
        self._run(batch)
        return batch.answers

    def close(self) -> None:
        """Kill and reap them."""
        if self._finalize.alive:
            self._finalize()
            self._starter.shutdown()
            self._selector.close()

    def _run(self, batch: _Batch, all_ready: bool = False) -> None:
        """Until every job has its answer and, if asked for, every process is ready."""
        if not self._finalize.alive:
            raise RuntimeError("the reward processes are closed")
        try:
            for worker in [w for w in self._workers if w.process.poll() is not None]:
                self._remove(worker)  # it died with nothing to do: nobody's fault
            while len(self._workers) < self.size:
                self._start()
            while batch.waiting or any(w.jobs or (all_ready and not w.ready) for w in self._workers):
                self._step(batch)
        except BaseException:
            for worker in [w for w in self._workers if not w.idle]:
                self._remove(worker)  # its answers to these jobs must not be taken for the next ones'
            raise

    def _step(self, batch: _Batch) -> None:
        """Hand out work, wait for something to happen, take what came, and see who is late."""
        for worker in self._workers:
            if worker.idle and batch.waiting:
                numbers = batch.next_chunk(self.size)
                worker.give(numbers, [batch.jobs[n] for n in numbers])
            self._watch(worker)
        busy = [worker for worker in self._workers if not worker.idle]
        next_deadline = min(worker.since + self._limit(worker) for worker in busy)
        for key, mask in self._selector.select(max(0.0, next_deadline - time.monotonic())):
            worker: Worker = key.data
            if mask & selectors.EVENT_WRITE:
                worker.flush()
            if mask & selectors.EVENT_READ:
                self._take(worker, batch)
        for worker in busy:
            if worker in self._workers and not worker.idle and time.monotonic() > worker.since + self._limit(worker):
                self._late(worker, batch)
        if any(worker.jobs for worker in self._workers):
            time.sleep(_PAUSE)

    def _limit(self, worker: Worker) -> float:
        return self.timeout_s if worker.ready else self.start_timeout_s

    def _take(self, worker: Worker, batch: _Batch) -> None:
        try:
            answers = worker.read()
        except Garbled as error:
            self._remove(worker)
            self._give_up(worker, batch, CRASH, str(error))
            return
        if answers is None:
            how = self._remove(worker, dying=True)
            if not worker.ready:
                raise RuntimeError(f"a reward process died while it started ({how}); see its words above")
            self._give_up(worker, batch, CRASH, f"the process died: {how}")
            return
        for answer in answers:
            if worker.ready:
                batch.answers[worker.jobs.popleft()] = tuple(answer)
            elif answer[0] == FAILED:
                raise ValueError(answer[1])
            else:
                worker.ready = True

    def _late(self, worker: Worker, batch: _Batch) -> None:
        self._remove(worker)
        if not worker.ready:
            raise RuntimeError(f"a reward process was not ready after {self.start_timeout_s:g} s")
        self._give_up(worker, batch, TIMEOUT, f"over {self.timeout_s:g} s")

    def _give_up(self, worker: Worker, batch: _Batch, kind: str, why: str) -> None:
        """The first of its jobs is to blame; the others go to other processes."""
        if worker.jobs:
            batch.answers[worker.jobs.popleft()] = kind, why
            batch.waiting.extendleft(reversed(worker.jobs))
        self._start()

    def _start(self) -> None:
        worker = self._starter.submit(Worker, self.setup).result()
        self._workers.append(worker)
        self._selector.register(worker.answers_fd, selectors.EVENT_READ, worker)

    def _watch(self, worker: Worker) -> None:
        """For room in its pipe only while there is something to write."""
        watched = worker.jobs_fd in self._selector.get_map()
        if worker.outbox and not watched:
            self._selector.register(worker.jobs_fd, selectors.EVENT_WRITE, worker)
        elif watched and not worker.outbox:
            self._selector.unregister(worker.jobs_fd)

    def _remove(self, worker: Worker, dying: bool = False) -> str:
        for fd in (worker.answers_fd, worker.jobs_fd):
            if fd in self._selector.get_map():
                self._selector.unregister(fd)
        how = worker.kill(dying)
        self._workers.remove(worker)
        return how


class _Batch:
    """Jobs, their answers by number, and the numbers of those that no process has in hand."""

    def __init__(self, jobs: Sequence[JobFields]) -> None:
        self.jobs, self.waiting = jobs, collections.deque(range(len(jobs)))
        self.answers: list[tuple[Any, ...]] = [()] * len(jobs)

    def next_chunk(self, n_workers: int) -> list[int]:
        """Fewer and fewer, so that the processes finish together."""
        most, characters = min(_LARGEST_CHUNK, max(1, len(self.waiting) // (2 * n_workers))), 0
        chunk: list[int] = []
        while self.waiting and len(chunk) < most and characters < _LARGEST_TEXT:
            chunk.append(self.waiting.popleft())
            characters += len(self.jobs[chunk[-1]][1])
        return chunk


def _kill_all(workers: list[Worker], owner: int) -> None:
    if os.getpid() != owner:  # in a fork, they are the parent's
        return
    while workers:
        workers.pop().kill()

"""What may end a run before its last step, as one rank sees it, and how it ended: a signal, the time, files, a metric.

The ranks agree on it in course.py. Standard library only: it is at work before anything heavy is imported.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import signal
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from megatron_dump.early_stopping import EarlyStopping

SAVE, STOP = "SAVE", "STOP"  # files in the run's folder


class StopSignal:
    """SIGUSR1: stop after the step in progress. Slurm sends it to every process of a job's step.

    It is blocked, not handled: it stays pending, interrupts no call, and all threads and processes that this one starts
    from then on (reward processes, engines, Ray, wandb) inherit the mask, over exec too, and live on. Threads that are
    older, such as a BLAS library's, take it instead; therefore the handler.
    """

    def __init__(self) -> None:
        self.since = time.time()  # when the run began
        self._taken = False

    def hold(self) -> None:
        """Install it; whatever was inherited (ignored under a launcher's `trap ''`, or blocked). Main thread only."""
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
        signal.signal(signal.SIGUSR1, self._take)

    @property
    def received(self) -> bool:
        return self._taken or signal.SIGUSR1 in signal.sigpending()

    def _take(self, *_: object) -> None:
        self._taken = True


class Asked(NamedTuple):
    """What one rank sees, or any of them."""

    signal: bool  # SIGUSR1 was received
    time: bool  # another step and a checkpoint may not fit in
    late: bool  # a checkpoint would not fit in
    save: bool  # the file SAVE is there
    stop: bool  # the file STOP is there
    early: bool  # the monitored metric no longer improves

    @property
    def ends(self) -> bool:
        return self.signal or self.time or self.stop or self.early


@dataclasses.dataclass
class Stopping:
    """When this run must end. The default: at its last step only."""

    signal: StopSignal | None = None
    folder: pathlib.Path | None = None  # of SAVE and STOP; None: this rank is not the one that looks
    end: float | None = None  # seconds since the epoch
    reserve_s: float = 120.0  # kept for the last checkpoint
    early: EarlyStopping | None = None  # rank 0's
    longest_step_s: float = 0.0  # with its validation, without its checkpoint
    _begun: float = dataclasses.field(default_factory=time.monotonic)

    def step_begins(self) -> None:
        self._begun = time.monotonic()

    def step_ends(self) -> None:
        self.longest_step_s = max(self.longest_step_s, time.monotonic() - self._begun)

    def look(self, longest_save_s: float) -> Asked:
        """longest_save_s: of this run's checkpoints so far."""
        left = float("inf") if self.end is None else self.end - time.time()
        needed = self.longest_step_s + max(self.reserve_s, 2 * longest_save_s)
        return Asked(
            signal=self.signal is not None and self.signal.received,
            time=left <= needed,
            late=left < longest_save_s or left <= 0,
            save=self._has(SAVE),
            stop=self._has(STOP),
            early=self.early is not None and self.early.is_over,
        )

    def clear_save(self) -> None:
        """Before the checkpoint: whoever asks again from now on gets another one."""
        if self.folder is not None:
            (self.folder / SAVE).unlink(missing_ok=True)

    def why(self, asked: Asked) -> str:
        """In words for people."""
        if asked.stop:
            return f"the file {STOP} is in exp_manager.explicit_log_dir: remove it before the run is to go on"
        if asked.early:
            return self.early.why if self.early is not None else "the monitored metric no longer improves"
        if asked.signal:
            return "SIGUSR1 was received"
        end = "" if self.end is None else f" before {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(self.end))}"
        return f"no time is left for another step and a checkpoint{end}"

    def _has(self, name: str) -> bool:
        # os.path.exists: a folder that cannot be read for a moment is an error of none of the ranks
        return self.folder is not None and os.path.exists(self.folder / name)


def run_end(since: float, limit_s: float | None, environ: Mapping[str, str] = os.environ) -> float | None:
    """The earlier of `limit_s` after `since` and the Slurm job's end, in seconds since the epoch; None: there is none.

    ValueError for a SLURM_JOB_END_TIME that is no such number.
    """
    ends = [since + limit_s] if limit_s is not None else []
    if text := environ.get("SLURM_JOB_END_TIME", "").strip():
        if not text.isdecimal() or int(text) == 0:
            raise ValueError(f"SLURM_JOB_END_TIME={text}: expected seconds since the epoch; correct it or unset it")
        ends.append(float(text))
    return min(ends, default=None)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended, for what started it."""

    state: str  # finished; stopped: to be continued; ended: by STOP; refused: trying again would not help
    step: int  # steps done
    max_steps: int
    reason: str = ""

    def write(self, path: str | pathlib.Path) -> None:
        """As one line of JSON, atomically."""
        path = pathlib.Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.tmp")
        line: dict[str, Any] = dataclasses.asdict(self)
        with temporary.open("w") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)

"""Judging responses in processes: a time limit on each, and a run that outlives a reward function's worst day."""

from __future__ import annotations

import dataclasses
import math
import pickle
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from megatron_dump.rewards.child import BAD_TRUTH, CRASH, SCORE, TIMEOUT, judge
from megatron_dump.rewards.processes import Processes
from megatron_dump.rewards.registry import GroundTruthError, importable_targets, reward_functions
from megatron_dump.types import Score


class Job(NamedTuple):
    source: str
    text: str  # the completion
    ground_truth: str


@dataclasses.dataclass
class Faults:
    """Responses of one source that could not be judged."""

    timeouts: int = 0
    crashes: int = 0


class RewardPool:
    """Judges responses in `workers` processes, or in this one when there are none.

    A response whose judgement takes over `timeout_s`, or whose reward function raises or takes its process down, is
    scored `on_timeout` or `on_crash` and counted; the process is replaced, and the others' responses are not lost. By
    default such a response is dropped (reward NaN): it is the verifier that failed, so nothing should be learned from
    it, neither for nor against; a policy cannot gain by provoking it. Give a number to punish it instead.

    Without processes the limit is not kept, nor is a process taken down replaced; exceptions are counted all the same.
    """

    def __init__(
        self,
        mapping: Mapping[str, Any],
        sources: Sequence[str],
        *,
        workers: int = 0,
        timeout_s: float = 5.0,
        on_timeout: float | None = None,
        on_crash: float | None = None,
        memory_gb: float | None = 4.0,
        start_timeout_s: float = 120.0,
    ) -> None:
        """mapping: `model.data.rewards`; sources: every data source there may be; timeout_s: of the wall clock;
        memory_gb: what a process may allocate, in 2^30 bytes, None for no limit.

        Waits until all processes are ready. ValueError for anything here, or in the mapping, that cannot be used.
        """
        _check(workers=workers, timeout_s=timeout_s, start_timeout_s=start_timeout_s, memory_gb=memory_gb)
        self.sources = list(dict.fromkeys(sources))
        self._rewards = {TIMEOUT: _reward("on_timeout", on_timeout), CRASH: _reward("on_crash", on_crash)}
        self._lock = threading.Lock()  # one batch at a time
        self._processes, self._functions = None, {}
        if not workers:
            self._functions = reward_functions(mapping, self.sources)
            return
        setup = {
            "mapping": {pattern: dict(v) if isinstance(v, Mapping) else v for pattern, v in mapping.items()},
            "sources": self.sources,
            "registered": importable_targets(mapping),
            "memory_gb": memory_gb,
        }
        self._processes = Processes(workers, pickle.dumps(setup), timeout_s, start_timeout_s)

    def score_all(self, jobs: Sequence[Job]) -> tuple[list[Score], dict[str, Faults]]:
        """(a Score for each job in order, the faults of every source). GroundTruthError for a row nobody can judge."""
        if unknown := {job.source for job in jobs} - {*self.sources}:
            raise ValueError(f"source {min(unknown)!r} has no reward function; known: {', '.join(self.sources)}")
        with self._lock:
            answers = self._processes.run(jobs) if self._processes else [self._judge(job) for job in jobs]
        scores, faults = [], {source: Faults() for source in self.sources}
        for job, (kind, *fields) in zip(jobs, answers, strict=True):
            if kind == SCORE:
                scores.append(Score(*fields))
                continue
            if kind == BAD_TRUTH:
                raise GroundTruthError(f"a row of {job.source}: {fields[0]}")
            if kind == TIMEOUT:
                faults[job.source].timeouts += 1
            else:
                faults[job.source].crashes += 1
            scores.append(Score(self._rewards[kind], False, False, f"{kind}: {fields[0]}"))
        return scores, faults

    def close(self) -> None:
        """End the processes. The pool cannot be used afterwards."""
        if self._processes:
            with self._lock:
                self._processes.close()

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _judge(self, job: Job) -> tuple[Any, ...]:
        try:
            return judge(self._functions[job.source], job.text, job.ground_truth)
        except MemoryError as error:
            return CRASH, f"MemoryError: {error}"


def _reward(key: str, value: float | None) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isinf(value):
        raise ValueError(f"{key}: {value!r} must be a reward, or null to drop the rollout")
    return float(value)


def _check(*, workers: int, **positive: float | None) -> None:
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 0:
        raise ValueError(f"workers: {workers!r} must be a number of processes, 0 for none")
    for key, value in positive.items():
        if value is None and key == "memory_gb":
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ValueError(f"{key}: {value!r} must be a number above 0")

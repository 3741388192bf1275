"""Judging responses on the CPUs of a Ray cluster: a RewardPool in each of several actors."""

from __future__ import annotations

import collections
import math
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_dump.ray_cluster import Cluster, actor_options, forget_launcher, import_ray, one_line
from megatron_dump.rewards.registry import importable_targets, register_reward
from megatron_dump.rewards.workers import Faults, Job, RewardPool
from megatron_dump.types import Score

_RESTARTS = 3  # of an actor that is lost with its node; its jobs are judged again
_ROUNDS = 4  # messages that an actor gets of one batch


class RayRewardPool:
    """As RewardPool, whose time limits and faults are counted in the actors: `actors` of `workers` processes each."""

    def __init__(
        self, cluster: Cluster, mapping: Mapping[str, Any], sources: Sequence[str], *, actors: int, **options: Any
    ) -> None:
        """options: RewardPool's; an actor reserves a CPU for each of its `workers`.

        Waits until all are ready. ValueError as from RewardPool, RuntimeError when the cluster has not enough.
        """
        workers = options.get("workers", 0)
        if isinstance(actors, bool) or not isinstance(actors, int) or actors < 1:
            raise ValueError(f"ray_actors: {actors!r} must be a number of actors")
        if not workers:
            raise ValueError("workers: 0 keeps no time limit in an actor; give each at least one")
        ray = import_ray()
        self.sources = list(dict.fromkeys(sources))
        self._timeout_s, self._start_s = options.get("timeout_s", 5.0), cluster.options.start_timeout_s
        needs = {"CPU": float(workers)}
        group = cluster.reserve([needs] * actors, "SPREAD", f"{actors} reward actors")
        self._release = lambda: cluster.release(group)
        setup = {pattern: dict(v) if isinstance(v, Mapping) else v for pattern, v in mapping.items()}
        self._actors = [
            ray.remote(_RewardActor)
            .options(**actor_options(group, i, needs, {}), max_restarts=_RESTARTS, max_task_retries=_RESTARTS)
            .remote(setup, importable_targets(mapping), self.sources, options)
            for i in range(actors)
        ]
        try:
            for actor in self._actors:
                self._answer(actor.start.remote(), self._start_s)
        except BaseException:
            self.close()
            raise

    def score_all(self, jobs: Sequence[Job]) -> tuple[list[Score], dict[str, Faults]]:
        """As RewardPool.score_all. RuntimeError when an actor cannot be brought back."""
        import ray

        size = max(1, math.ceil(len(jobs) / (len(self._actors) * _ROUNDS)))
        waiting = collections.deque(range(0, len(jobs), size))
        limit = self._start_s + size * self._timeout_s
        scores: list[Score | None] = [None] * len(jobs)
        faults = {source: Faults() for source in self.sources}
        under_way: dict[Any, tuple[int, Any]] = {}  # answer -> (its first job, who is judging)
        free = collections.deque(self._actors)
        while waiting or under_way:
            while waiting and free:
                actor, first = free.popleft(), waiting.popleft()
                under_way[actor.score_all.remote(list(jobs[first : first + size]))] = first, actor
            ready, _ = ray.wait([*under_way], timeout=limit)
            if not ready:
                raise RuntimeError(f"no reward actor answered within {limit:g} s: is the Ray cluster alive?")
            for answer in ready:
                first, actor = under_way.pop(answer)
                judged, counts = self._answer(answer, limit)
                scores[first : first + size] = judged
                free.append(actor)
                for source, (timeouts, crashes) in counts.items():
                    faults[source].timeouts += timeouts
                    faults[source].crashes += crashes
        return [score for score in scores if score is not None], faults

    def close(self) -> None:
        """End the actors, and their processes with them. The pool cannot be used afterwards."""
        self._release()
        self._actors = []

    def _answer(self, reference: Any, timeout_s: float) -> Any:
        """What an actor raised as it raised it; one line for what Ray has to say."""
        import ray

        try:
            return ray.get(reference, timeout=timeout_s)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except ray.exceptions.RayError as error:
            raise RuntimeError(f"a reward actor was lost: {one_line(error)}") from error


class _RewardActor:
    """What Ray runs, and runs again elsewhere when a node is lost."""

    def __init__(
        self, mapping: dict[str, Any], registered: dict[str, str], sources: list[str], options: dict[str, Any]
    ) -> None:
        forget_launcher()
        self._setup, self._registered, self._pool = (mapping, sources, options), registered, None

    def start(self) -> None:
        if self._pool is None:  # not in __init__: from there Ray does not bring the error to the caller
            for name, path in self._registered.items():
                register_reward(name, path)
            mapping, sources, options = self._setup
            self._pool = RewardPool(mapping, sources, **options)

    def score_all(self, jobs: Sequence[Job]) -> tuple[list[Score], dict[str, tuple[int, int]]]:
        self.start()
        assert self._pool is not None
        scores, faults = self._pool.score_all(jobs)
        return scores, {source: (f.timeouts, f.crashes) for source, f in faults.items()}

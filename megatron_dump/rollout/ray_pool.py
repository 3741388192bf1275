"""Engines in Ray actors, on this node or others."""

from __future__ import annotations

import contextlib
import importlib
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any

from megatron_dump.ray_cluster import Cluster, actor_options, forget_launcher, import_ray, one_line
from megatron_dump.rollout.engine import Engine, EngineDied, EngineOutput, EngineRefused, EngineRequest

_GRACE_S = 10.0  # for an engine that is told to close


def ray_engines(
    cluster: Cluster, n: int, factory: str, options: Mapping[str, Any], env: Mapping[str, str] | None = None
) -> list[RayEngine]:
    """n engines, each with the resources of `cluster.options` in a bundle of one placement group; they come up at once.

    factory: "module:Class" of an Engine; options: its keyword arguments; env: of its process. Waits for all.
    EngineRefused or EngineDied when one does not come up, RuntimeError when the cluster has not enough. What is
    reserved is given back when the cluster is closed.
    """
    needs = {"CPU": cluster.options.cpus_per_engine}
    if cluster.options.gpus_per_engine:
        needs["GPU"] = cluster.options.gpus_per_engine
    group = cluster.reserve([needs] * n, cluster.options.strategy, f"{n} engines")
    engines = [
        RayEngine(factory, options, actor_options(group, i, needs, env or {}), cluster.options.start_timeout_s)
        for i in range(n)
    ]
    try:
        for engine in engines:
            engine.wait_up()
    except BaseException:
        cluster.release(group)  # with the engines in it
        raise
    return engines


class EngineActor:
    """Holds the engine; what Ray runs. Calls are made one after the other."""

    def __init__(self) -> None:
        forget_launcher()
        self.engine: Engine | None = None

    def build(self, factory: str, options: dict[str, Any]) -> dict[str, Any]:
        """Where it is."""
        import ray

        module, _, name = factory.partition(":")
        self.engine = getattr(importlib.import_module(module), name)(**options)
        log = os.readlink("/proc/self/fd/2") if os.path.islink("/proc/self/fd/2") else "Ray's logs"
        node = ray.get_runtime_context().get_node_id()
        return {"host": ray.util.get_node_ip_address(), "node": node, "pid": os.getpid(), "log": log}

    def generate(self, requests: Sequence[EngineRequest]) -> list[list[EngineOutput]]:
        assert self.engine is not None
        return self.engine.generate(requests)

    def load_weights(self, version: int, link: dict[str, Any]) -> None:
        from megatron_dump.weight_sync import receive

        assert self.engine is not None
        self.engine.load_weights(version, receive(link))

    def sleep(self) -> None:
        assert self.engine is not None
        self.engine.sleep()

    def wake(self) -> None:
        assert self.engine is not None
        self.engine.wake()

    def ping(self) -> None: ...

    def close(self) -> None:
        if self.engine is not None:
            self.engine.close()


class RayEngine:
    """An EngineHandle. Starts at once; calls made before it is up wait for it."""

    def __init__(
        self, factory: str, options: Mapping[str, Any], placed: Mapping[str, Any], start_timeout_s: float
    ) -> None:
        """placed: options of the actor, ray_cluster.actor_options'. A restart goes to the same bundle, which Ray puts
        on another node when it has lost the first."""
        self._new = lambda: _Life(factory, dict(options), dict(placed), start_timeout_s)
        self._life = self._new()

    @property
    def place(self) -> dict[str, Any]:
        """Where it is, once it is up: its node's address (`host`) and Ray's name of it (`node`), `pid` and `log`."""
        return self._life.place

    def wait_up(self) -> None:
        """EngineRefused or EngineDied when it does not come up in time."""
        self._life.wait_up()

    def generate(self, requests: Sequence[EngineRequest]) -> Future[list[list[EngineOutput]]]:
        return self._life.call("generate", list(requests))

    def load_weights(self, version: int, link: dict[str, Any]) -> Future[None]:
        return self._life.call("load_weights", version, link)

    def sleep(self) -> Future[None]:
        return self._life.call("sleep")

    def wake(self) -> Future[None]:
        return self._life.call("wake")

    def alive(self) -> bool:
        return self._life.alive()

    def restart(self) -> None:
        """Waits until the fresh engine is up. EngineDied or EngineRefused when it does not come up."""
        self._life.end("it is restarted")
        self._life = self._new()
        self._life.wait_up()

    def close(self) -> None:
        """End it, gently when it has nothing to do. Calls without an answer raise EngineDied."""
        self._life.close()


class _Life:
    """One actor, from start to end."""

    def __init__(self, factory: str, options: dict[str, Any], placed: dict[str, Any], start_timeout_s: float) -> None:
        ray = import_ray()
        self._failure: Exception | None = None  # the answer to every call from now on
        self._lock = threading.Lock()
        self._waiting: set[Future[Any]] = set()
        self._ping: Future[None] | None = None
        self._start_timeout_s = start_timeout_s
        self.place: dict[str, Any] = {"host": "", "node": "", "pid": 0, "log": "Ray's logs"}
        # Ray's own restarts would bring up an engine without weights behind our back
        self._actor = ray.remote(EngineActor).options(**placed, max_restarts=0, max_task_retries=0).remote()
        self._built = self.call("build", factory, options)

    def wait_up(self) -> None:
        try:
            self.place = self._built.result(self._start_timeout_s)
        except FutureTimeoutError:
            self.end(f"it was not up after {self._start_timeout_s:g} s ({self._where()})")
            self._built.result()

    def call(self, method: str, *args: Any) -> Future[Any]:
        """The future's exception is EngineDied or EngineRefused."""
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()
        with self._lock:
            if self._failure is not None:
                future.set_exception(_again(self._failure))
                return future
            self._waiting.add(future)
        try:
            answer = getattr(self._actor, method).remote(*args).future()
        except Exception as error:  # noqa: BLE001  Ray refuses calls to an actor that it knows to be dead
            self._fail(EngineDied(f"the engine's actor takes no calls: {one_line(error)} ({self._where()})"))
            return future
        answer.add_done_callback(lambda done: self._settle(future, done, method))
        return future

    def alive(self) -> bool:
        """As far as is known: asks, and does not wait for the answer."""
        if self._ping is None or self._ping.done():
            self._ping = self.call("ping")
        return self._failure is None

    def close(self) -> None:
        with self._lock:
            idle = self._failure is None and not self._waiting
        if idle:
            with contextlib.suppress(FutureTimeoutError, EngineDied, EngineRefused):
                self.call("close").result(_GRACE_S)
        self.end("it is closed")

    def end(self, why: str) -> None:
        import ray

        self._fail(EngineDied(f"the engine was ended: {why}"))
        if ray.is_initialized():  # else it has ended with the connection
            ray.kill(self._actor, no_restart=True)

    def _settle(self, future: Future[Any], done: Future[Any], method: str) -> None:
        error = done.exception()
        cause = getattr(error, "cause", None)  # of a RayTaskError: what the engine raised
        if error is not None and not (isinstance(cause, EngineRefused) and method != "build"):
            if isinstance(cause, EngineRefused):
                self._fail(cause)
            elif isinstance(cause, Exception):
                self._fail(EngineDied(f"the engine failed: {type(cause).__name__}: {cause} ({self._where()})"))
            else:
                self._fail(EngineDied(f"the engine's actor died: {one_line(error)} ({self._where()})"))
            return
        with self._lock:
            mine = future in self._waiting
            self._waiting.discard(future)
        if not mine:
            return
        if cause is not None:
            future.set_exception(cause)
        else:
            future.set_result(done.result())

    def _fail(self, failure: Exception) -> None:
        """Everybody who waits, now or later, is told. Runs in a thread of Ray's, which must not be kept: no kill."""
        with self._lock:
            if self._failure is not None:
                return
            self._failure = failure
            waiting = [*self._waiting]
            self._waiting.clear()
        for future in waiting:
            future.set_exception(_again(failure))

    def _where(self) -> str:
        """Its last words, where this process can read them, and where the others are."""
        log, host = self.place["log"], self.place["host"]
        words = ""
        if os.path.isfile(log):
            with open(log, errors="replace") as file:
                words = next((line.strip() for line in reversed(file.readlines()) if line.strip()), "")
        return f"last words: {words or 'unknown here'}; log: {log}" + (f" on {host}" if host else "")


def _again(failure: Exception) -> Exception:
    """For every caller an exception of its own: raising one adds to its traceback."""
    return type(failure)(str(failure))

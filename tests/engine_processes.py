"""An EngineHandle for tests: the engine in a forked process behind a pipe."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pathlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_dump.rollout.engine import EngineDied
from megatron_dump.weight_sync import receive


class ProcessEngine:
    """`make()` builds the engine inside the process; `call` runs any of its methods there."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make
        self.starts = 0
        self.restart()

    def load_weights(self, version: int, link: dict[str, Any]) -> Future[None]:
        return self.call("load_weights", version, link)

    def call(self, method: str, *args: Any) -> Future[Any]:
        future: Future[Any] = Future()
        threading.Thread(target=self._run, args=(future, self._pipe, (method, args)), daemon=True).start()
        return future

    def alive(self) -> bool:
        return self.process.is_alive()

    def restart(self) -> None:
        if self.starts:
            self.close()
        context = multiprocessing.get_context("fork")
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=_main, args=(self._make, theirs, self._pipe), daemon=True)
        self.process.start()
        theirs.close()
        self.starts += 1

    def close(self) -> None:
        self.process.kill()
        self.process.join()
        self._pipe.close()

    def _run(self, future: Future[Any], pipe: Any, message: Any) -> None:
        try:
            pipe.send(message)
            fine, result = pipe.recv()
        except (EOFError, OSError) as error:
            future.set_exception(EngineDied(f"the test's engine ended: {error!r}"))
            return
        if fine:
            future.set_result(result)
        else:
            future.set_exception(RuntimeError(result))


def _main(make: Callable[[], Any], pipe: Any, other: Any) -> None:
    other.close()  # or the parent's death would not be an end of file here
    torch.set_num_threads(1)
    engine = make()
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            method, args = pipe.recv()
            try:
                if method == "load_weights":
                    result = engine.load_weights(args[0], receive(args[1]))
                else:
                    result = getattr(engine, method)(*args)
                pipe.send((True, result))
            except Exception as error:  # noqa: BLE001 - the parent raises it
                pipe.send((False, f"{type(error).__name__}: {error}"))
    os._exit(0)


class Collector:
    """An engine that keeps what it is sent."""

    def __init__(self) -> None:
        self.version, self.weights = -1, dict[str, Tensor]()

    def load_weights(self, version: int, weights: Iterator[tuple[str, Tensor]]) -> None:
        self.version, self.weights = version, {name: tensor.clone() for name, tensor in weights}

    def result(self) -> tuple[int, dict[str, Any]]:
        """numpy, as bytes: torch's own pickling of tensors would open shared files."""
        return self.version, {
            name: (str(t.dtype), tuple(t.shape), t.contiguous().view(torch.uint8).numpy())
            for name, t in self.weights.items()
        }


def assert_equal(result: Any, version: int, expected: dict[str, Tensor], dtype: torch.dtype | None = None) -> None:
    """A Collector's result, to the last byte."""
    has, got = result
    assert has == version and sorted(got) == sorted(expected)
    for name, tensor in expected.items():
        tensor = tensor.to(dtype or tensor.dtype)
        kind, shape, raw = got[name]
        assert (kind, shape) == (str(tensor.dtype), tuple(tensor.shape)), name
        assert np.array_equal(raw, tensor.contiguous().view(torch.uint8).numpy()), name


class Mishap(Collector):
    """Fails in the middle of the stream: by an error, by death, or by standing still, in its first `times` lives."""

    def __init__(self, kind, lives, times=1):
        super().__init__()
        self.kind, self.lives, self.times = kind, pathlib.Path(lives), times
        self.life = len(list(self.lives.iterdir()))
        (self.lives / str(self.life)).touch()

    def load_weights(self, version, weights):
        if self.life >= self.times:
            return super().load_weights(version, weights)
        for i, _ in enumerate(weights):
            if i == 2 and self.kind == "error":
                raise ValueError("cannot load this")
            if i == 2 and self.kind == "death":
                os._exit(9)
            if i == 2 and self.kind == "leaves":
                return None
            if i == 2 and self.kind == "hangs":
                time.sleep(1000)
        return None

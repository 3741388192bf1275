"""Buckets over the network, to engines on any machine: a broadcast in a process group of its own.

A TCP store carries everything but the weights: who is there, what is in the buckets, digests, why it was given up.
"""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import TCPStore

from megatron_dump.weight_sync import contents, rendezvous
from megatron_dump.weight_sync.contents import Entry
from megatron_dump.weight_sync.rendezvous import POLL_S


class Sender:
    """One stream to `n` receivers; `peer` is the host of one of them. All fail when one does."""

    def __init__(
        self, n: int, buckets: Sequence[Sequence[Entry]], pool: BufferPool, peer: str, backend: str, timeout_s: float
    ) -> None:
        self._pool, self._backend, self._timeout_s, self._size = pool, backend, timeout_s, n + 1
        self._address = rendezvous.own_address(peer)
        timeout = datetime.timedelta(seconds=timeout_s)
        self._store = TCPStore(self._address, 0, is_master=True, wait_for_workers=False, timeout=timeout)
        self._store.set("contents", json.dumps([contents.to_json(entries) for entries in buckets]))
        self._group, self._works, self._n_sent = None, list[tuple[Tensor, Any]](), 0
        self._ended: Callable[[int], bool] = lambda i: False
        self.finished: set[int] = set()
        self.links = [
            {
                "transport": "broadcast",
                "host": self._address,
                "port": self._store.port,
                "rank": i + 1,
                "size": self._size,
                "backend": backend,
                "timeout_s": 2 * timeout_s,
            }
            for i in range(n)
        ]

    def connect(self, ended: Callable[[int], bool]) -> None:
        """Wait for the receivers; ConnectionError when `ended` says of one that it will not come."""
        self._ended = ended
        self._wait("joined")
        self._store.set("go", "")
        self._group = rendezvous.make_group(self._store, 0, self._size, self._backend, self._address, self._timeout_s)

    def room(self) -> Tensor:
        """uint8 [bytes] that is not being sent."""
        while len(self._works) >= self._pool.n:
            rendezvous.complete(self._works[0][1], self._check, self._timeout_s)
            del self._works[0]
        return self._pool.buffer(self._n_sent)

    def publish(self, buffer: Tensor, nbytes: int, digests: list[str] | None) -> None:
        """Begin sending the first `nbytes`."""
        self._store.set(f"digests/{self._n_sent}", json.dumps(digests))
        if buffer.is_cuda:
            torch.cuda.synchronize(buffer.device)
        sent = buffer[:nbytes]
        self._works.append((sent, rendezvous.broadcast(self._group, sent)))
        self._n_sent += 1

    def finish(self) -> None:
        for _, work in self._works:
            rendezvous.complete(work, self._check, self._timeout_s)
        self._works.clear()
        self._wait("done")
        self.finished = set(range(self._size - 1))

    def close(self, failure: str | None = None) -> None:
        """Receivers that are not finished get a ConnectionError with `failure`."""
        if failure is not None:
            self._store.set("failure", failure)
            time.sleep(2 * POLL_S)  # so that they find it before the store goes
        if self._group is not None:
            self._group.shutdown() if self._backend == "gloo" else self._group.abort()
        self._works.clear()
        self._group = None
        del self._store

    def _wait(self, what: str) -> None:
        deadline = time.monotonic() + self._timeout_s
        for i in range(self._size - 1):
            while not rendezvous.appears(self._store, f"{what}/{i}"):
                self._check()
                if time.monotonic() > deadline:
                    raise TimeoutError(f"an engine did nothing with its weight_sync link for {self._timeout_s:.0f} s")

    def _check(self) -> None:
        for i in range(self._size - 1):
            if self._ended(i) and not self._store.check([f"done/{i}"]):
                raise ConnectionError("an engine is gone that takes part in the broadcast of the weights")


class BufferPool:
    """`n` buffers of `size` bytes that come into being when they are needed."""

    def __init__(self, size: int, device: torch.device, n: int = 2) -> None:
        self.size, self.n, self._device = size, n, device
        self._buffers: list[Tensor] = []

    def buffer(self, i: int) -> Tensor:
        if len(self._buffers) < self.n:
            self._buffers.append(torch.empty(self.size, dtype=torch.uint8, device=self._device))
        return self._buffers[i % self.n]

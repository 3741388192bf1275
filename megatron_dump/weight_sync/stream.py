"""One lead's stream to its engines: transport, buckets, and what the engines answer."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, wait
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_dump.engine_options import WeightSyncOptions
from megatron_dump.weight_sync import broadcast, shared_memory
from megatron_dump.weight_sync.plan import Bucket
from megatron_dump.weight_sync.segments import Place

_LAST_WORDS_S = 30.0  # that an engine gets to say why it left the stream


class EngineHandle(Protocol):
    """What the sync asks of rollout's EngineHandle."""

    def load_weights(self, version: int, link: dict[str, Any]) -> Future[None]: ...

    def alive(self) -> bool: ...

    def restart(self) -> None: ...


class Outlet:
    """The buffers of a lead; they are kept from one stream to the next."""

    def __init__(
        self, plan: Sequence[Bucket], peer: str | None, options: WeightSyncOptions, device: torch.device
    ) -> None:
        self.plan, self.peer, self.options = plan, peer, options
        size = max(bucket.nbytes for bucket in plan)
        self.backend = options.backend
        if self.backend == "auto":
            self.backend = "nccl" if device.type == "cuda" else "gloo"
        self.segments = shared_memory.SegmentPool(size) if peer is None else None
        self.buffers = broadcast.BufferPool(size, device if self.backend == "nccl" else torch.device("cpu"))

    def close(self) -> None:
        if self.segments is not None:
            self.segments.close()


class Stream:
    """One version's way to some engines."""

    def __init__(self, outlet: Outlet, handles: Sequence[EngineHandle], version: int) -> None:
        self._outlet, options = outlet, outlet.options
        self._checksum, self._timeout_s = options.checksum, options.timeout_s
        self._segment: shared_memory.Segment | None = None
        if outlet.segments is not None:
            self._sender = shared_memory.Sender(len(handles), outlet.segments, options.timeout_s)
        else:
            assert outlet.peer is not None
            entries = [bucket.entries for bucket in outlet.plan]
            self._sender = broadcast.Sender(
                len(handles), entries, outlet.buffers, outlet.peer, outlet.backend, options.timeout_s
            )
        self._futures: list[Future[None]] = []
        try:
            for handle, link in zip(handles, self._sender.links, strict=True):
                self._futures.append(handle.load_weights(version, link))
        except BaseException as error:
            self._sender.close(str(error))
            raise
        self._connected = False

    def room(self) -> tuple[Tensor, Place | None]:
        """Where the next bucket goes."""
        if not self._connected:
            self._sender.connect(lambda i: self._futures[i].done())
            self._connected = True
        if isinstance(self._sender, shared_memory.Sender):
            self._segment = self._sender.room()
            return self._segment.bytes, self._segment.place
        return self._sender.room(), None

    def send(self, bucket: Bucket, memory: Tensor) -> None:
        digests = [entry.digest(memory) for entry in bucket.entries] if self._checksum else None
        if isinstance(self._sender, shared_memory.Sender):
            assert self._segment is not None
            self._sender.publish(self._segment, bucket.entries, digests, last=bucket is self._outlet.plan[-1])
        else:
            self._sender.publish(memory, bucket.nbytes, digests)

    def end(self, failure: str | None) -> dict[int, str]:
        """Finish, or give up with `failure`; which engines have not loaded the weights, and why."""
        try:
            if failure is None:
                self._sender.finish()
        except (OSError, RuntimeError) as error:
            failure = f"{type(error).__name__}: {error}"
        finished = self._sender.finished
        self._sender.close(failure)
        return {i: why for i in range(len(self._futures)) if (why := self._why(i, i in finished, failure))}

    def _why(self, i: int, finished: bool, failure: str | None) -> str | None:
        limit_s = self._timeout_s if finished else min(self._timeout_s, _LAST_WORDS_S)
        if not wait([self._futures[i]], limit_s).done:
            return failure or f"the engine loaded nothing for {self._timeout_s:.0f} s"
        try:
            self._futures[i].result()
        except Exception as error:  # noqa: BLE001 - an engine may raise anything; it is restarted
            # The engine's own error says more than the stream's, which follows from it.
            followed = failure is not None and "the sender gave up" in str(error)
            return failure if followed else f"{type(error).__name__}: {error}"
        return None if finished else f"the engine did not load all of the weights ({failure or 'it left the stream'})"

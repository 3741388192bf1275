"""The engine's end of shared_memory.py."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from megatron_dump.weight_sync import contents, segments, wire
from megatron_dump.weight_sync.contents import Lease


def receive(link: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """See `receiving.receive`."""
    with contextlib.closing(_Reader(link)) as reader:
        n = 0
        while (message := reader.next_bucket()) is not None:
            entries = contents.from_json(message["entries"])
            bucket = reader.lend(message)
            if message["digests"] is not None:
                contents.verify(entries, bucket, message["digests"])
            for i, entry in enumerate(entries):
                tensor = entry.view(bucket)
                if i == len(entries) - 1:
                    del bucket
                    if message["last"]:  # behind it nobody could tell whether the engine keeps it
                        tensor = tensor.clone()
                yield entry.name, tensor
                del tensor
                reader.hand_back(current=i == len(entries) - 1)
            n += len(entries)
        reader.finish(n)


class _Reader:
    """The socket and the segments. A segment goes back when nothing of it is in use any more.

    A loop over the stream still has a bucket's last tensor when it asks for the next bucket, so only what is in use one
    bucket later is taken to be kept.
    """

    def __init__(self, link: dict[str, Any]) -> None:
        self._leases: dict[int, Lease] = {}
        self._taken: list[int] = []  # segments that the sender waits for, oldest first
        self._end: dict[str, Any] = {}
        self._timeout_s = float(link["timeout_s"])
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(self._timeout_s)
        try:
            self._socket.connect("\0" + link["address"])
            wire.send(self._socket, {"receiver": link["receiver"]})
        except OSError as error:
            self._socket.close()
            raise ConnectionError(
                "weight_sync: nobody sends weights on this link: the trainer has given up, or runs on another machine "
                "(weight_sync.transport=broadcast reaches those)"
            ) from error

    def next_bucket(self) -> dict[str, Any] | None:
        self._tell(kept=[serial for serial in self._taken[:-1] if self._leases[serial].lent])
        message, fd = self._read()
        if "end" in message:
            self._end = message
            return None
        serial = message["segment"]
        if fd is not None:
            try:
                self._leases[serial] = Lease(segments.map_file(fd, message["size"]), message["size"])
            finally:
                os.close(fd)
        return message

    def lend(self, message: dict[str, Any]) -> Tensor:
        self._taken.append(message["segment"])
        return self._leases[message["segment"]].lend(message["size"])

    def hand_back(self, current: bool) -> None:
        """Tell the sender what is no longer in use; the current bucket is until all of it was yielded."""
        self._tell(kept=[], candidates=self._taken if current else self._taken[:-1])

    def finish(self, n: int) -> None:
        if n != self._end["end"]:
            raise ConnectionError(f"weight_sync: {n} tensors came of {self._end['end']}")
        self._tell(kept=[serial for serial in self._taken if self._leases[serial].lent], end=True)

    def close(self) -> None:
        self._socket.close()

    def _tell(self, kept: list[int], candidates: list[int] | None = None, end: bool = False) -> None:
        candidates = self._taken if candidates is None else candidates
        read = [serial for serial in candidates if serial not in kept and not self._leases[serial].lent]
        self._taken = [serial for serial in self._taken if serial not in read and serial not in kept]
        for serial in kept:
            del self._leases[serial]
        if end:
            with self._explained():
                wire.send(self._socket, {"read": read, "kept": kept, "end": True})
        elif read or kept:
            with contextlib.suppress(OSError):  # the next read says why the sender is gone
                wire.send(self._socket, {"read": read, "kept": kept})

    def _read(self) -> tuple[dict[str, Any], int | None]:
        with self._explained():
            message, fd = wire.read(self._socket)
        if "failed" in message:
            raise ConnectionError(f"weight_sync: the sender gave up: {message['failed']}")
        return message, fd

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except TimeoutError as error:
            raise TimeoutError(f"weight_sync: no weights came for {self._timeout_s:.0f} s") from error
        except OSError as error:
            raise ConnectionError(f"weight_sync: the sender ended in the middle of the weights ({error})") from error

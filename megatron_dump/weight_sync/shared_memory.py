"""Buckets in shared memory, for engines on the trainer's machine.

The sender fills one segment while the engines load from another. Segments are anonymous files, handed over on a Unix
socket without a file either: nothing is left behind by a crash. The socket's end tells each side of the other's death.
A segment whose tensors an engine keeps is left to it, and replaced.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from megatron_dump.weight_sync import contents, wire
from megatron_dump.weight_sync.contents import Entry
from megatron_dump.weight_sync.segments import Segment

_POLL_S = 0.05


class Sender:
    """One stream to `n` receivers; `pool` keeps the segments for the next stream."""

    def __init__(self, n: int, pool: SegmentPool, timeout_s: float) -> None:
        self._pool, self._timeout_s, self._n_sent = pool, timeout_s, 0
        self._token = secrets.token_hex(16)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        address = f"megatron_dump.weight_sync.{self._token}"
        self._listener.bind("\0" + address)  # in Linux's abstract namespace: no file
        self._listener.listen(n)
        # A receiver waits longer than the sender waits for the others.
        self.links = [
            {"transport": "shared_memory", "address": address, "receiver": i, "timeout_s": 2 * timeout_s}
            for i in range(n)
        ]
        self._peers: dict[int, _Peer] = {}
        self._order: list[int] = []  # segments as they were published, the oldest first
        self._ended: Callable[[int], bool] = lambda i: False

    @property
    def finished(self) -> set[int]:
        """Receivers that consumed everything."""
        return {i for i, peer in self._peers.items() if peer.finished}

    def connect(self, ended: Callable[[int], bool]) -> None:
        """Wait for the receivers, except those of which `ended` says that they will not come."""
        deadline = time.monotonic() + self._timeout_s
        while any(i not in self._peers and not ended(i) for i in range(len(self.links))):
            if time.monotonic() > deadline:
                raise TimeoutError(f"an engine did not open its weight_sync link for {self._timeout_s:.0f} s")
            if select.select([self._listener], [], [], _POLL_S)[0]:
                self._accept()
        self._ended = ended
        self._check()

    def room(self) -> Segment:
        """A segment that nobody reads. Engines that read nothing for too long are given up."""
        deadline = time.monotonic() + self._timeout_s
        while (segment := self._pool.free()) is None:
            self._check()
            self._hear(_POLL_S)
            if time.monotonic() > deadline and (waiting := [n for n in self._order if self._pool.readers.get(n)]):
                for i in list(self._pool.readers[waiting[0]]):
                    self._lose(i)
        return segment

    def publish(self, segment: Segment, entries: Sequence[Entry], digests: list[str] | None, last: bool) -> None:
        message = {
            "segment": segment.serial,
            "size": segment.size,
            "entries": contents.to_json(entries),
            "digests": digests,
            "last": last,
        }
        self._n_sent += len(entries)
        self._hear(0.0)
        for i, peer in list(self._peers.items()):
            with self._losing(i):
                wire.send(peer.connection, message, None if segment.serial in peer.known else segment.fd)
                peer.known.add(segment.serial)
                self._pool.readers[segment.serial].add(i)
        self._order = [*(serial for serial in self._order if serial != segment.serial), segment.serial][-2:]
        self._check()

    def finish(self) -> None:
        """All is sent: wait until the receivers say which segments they keep."""
        for i, peer in list(self._peers.items()):
            with self._losing(i):
                wire.send(peer.connection, {"end": self._n_sent})
        deadline = time.monotonic() + self._timeout_s
        while any(not peer.finished for peer in self._peers.values()):
            self._hear(_POLL_S)
            if time.monotonic() > deadline:
                for i in [i for i, peer in self._peers.items() if not peer.finished]:
                    self._lose(i)

    def close(self, failure: str | None = None) -> None:
        """Every receiver that is not finished gets a ConnectionError with `failure`."""
        for i, peer in list(self._peers.items()):
            if failure is not None and not peer.finished:
                with self._losing(i):
                    wire.send(peer.connection, {"failed": failure})
            unread = [serial for serial, readers in self._pool.readers.items() if i in readers]
            for serial in unread:  # nobody knows what the engine still has of it
                self._pool.replace(serial)
            peer.connection.close()
        self._peers.clear()
        self._listener.close()

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        _, user, _ = struct.unpack("3i", credentials)
        connection.settimeout(self._timeout_s)
        try:
            hello, _ = wire.read(connection) if user == os.getuid() else ({}, None)
        except (OSError, ValueError):
            hello = {}
        receiver = hello.get("receiver")
        if isinstance(receiver, int) and 0 <= receiver < len(self.links) and receiver not in self._peers:
            self._peers[receiver] = _Peer(connection)
        else:
            connection.close()

    def _hear(self, timeout_s: float) -> None:
        """Take what the receivers say."""
        ended = [i for i in self._peers if self._ended(i)]  # asked first: its last words come before its end
        by_socket = {peer.connection: i for i, peer in self._peers.items() if not peer.finished}
        while ready := select.select(list(by_socket), [], [], timeout_s)[0]:
            for connection in ready:
                i = by_socket[connection]
                with self._losing(i):
                    self._take(i, wire.read(connection)[0])
                if i not in self._peers or self._peers[i].finished:
                    del by_socket[connection]
            timeout_s = 0.0
        for i in ended:
            if i in self._peers and not self._peers[i].finished:
                self._lose(i)

    def _take(self, i: int, message: dict[str, Any]) -> None:
        for serial in message["kept"]:
            self._pool.replace(serial)
        for serial in message["read"]:
            self._pool.readers.get(serial, set()).discard(i)  # another engine may have kept it
        self._peers[i].finished = bool(message.get("end"))

    @contextlib.contextmanager
    def _losing(self, i: int) -> Iterator[None]:
        """A receiver that is gone does not stop the others; its engine says why."""
        try:
            yield
        except (OSError, ValueError, KeyError, TypeError):
            self._lose(i)

    def _lose(self, i: int) -> None:
        if (peer := self._peers.pop(i, None)) is not None:
            peer.connection.close()
            for serial in [serial for serial, readers in self._pool.readers.items() if i in readers]:
                self._pool.replace(serial)

    def _check(self) -> None:
        if not self._peers:
            raise ConnectionError("no engine is left that loads the weights")


class _Peer:
    def __init__(self, connection: socket.socket) -> None:
        self.connection, self.known, self.finished = connection, set[int](), False


class SegmentPool:
    """Two segments of `size` bytes that come into being when they are needed."""

    def __init__(self, size: int, n: int = 2) -> None:
        self.size, self._n, self._serial = size, n, 0
        self._segments: dict[int, Segment] = {}
        self.readers: dict[int, set[int]] = {}

    def free(self) -> Segment | None:
        for serial, readers in self.readers.items():
            if not readers:
                return self._segments[serial]
        if len(self._segments) == self._n:
            return None
        segment = Segment(self.size, self._serial)
        self._segments[self._serial], self.readers[self._serial] = segment, set()
        self._serial += 1
        return segment

    def replace(self, serial: int) -> None:
        """Leave a segment to those who have it."""
        if serial in self._segments:
            self._segments.pop(serial).close()
            del self.readers[serial]

    def close(self) -> None:
        for serial in list(self._segments):
            self.replace(serial)

"""The engine's end of broadcast.py."""

from __future__ import annotations

import contextlib
import datetime
import json
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed import TCPStore

from megatron_dump.weight_sync import contents, rendezvous
from megatron_dump.weight_sync.contents import Entry, Lease


def receive(link: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """See `receiving.receive`."""
    with contextlib.closing(_Reader(link)) as reader:
        for index, entries in enumerate(reader.buckets):
            bucket = reader.take(index)
            if (digests := reader.digests(index)) is not None:
                contents.verify(entries, bucket, digests)
            for entry in entries:
                yield entry.name, entry.view(bucket)
            del bucket
        reader.finish()


class _Reader:
    """The store, the group, and the transfer that goes on while the engine loads the bucket before it."""

    def __init__(self, link: dict[str, Any]) -> None:
        self._timeout_s, self._index = float(link["timeout_s"]), int(link["rank"]) - 1
        self._group, self._coming = None, list[tuple[Tensor, Any]]()
        self._leases: list[Lease] = []
        self._cuda = link["backend"] == "nccl"
        timeout = datetime.timedelta(seconds=self._timeout_s)
        address = rendezvous.own_address(link["host"])
        with self._explained():
            self._store = TCPStore(link["host"], link["port"], is_master=False, timeout=timeout)
            self._store.set(f"joined/{self._index}", "")
            self._wait("go")
            self.buckets: list[list[Entry]] = [
                contents.from_json(rows) for rows in json.loads(self._store.get("contents"))
            ]
            self._group = rendezvous.make_group(
                self._store, self._index + 1, link["size"], link["backend"], address, self._timeout_s
            )
            self._begin(0)

    def take(self, index: int) -> Tensor:
        """The bucket's bytes; the next one is under way from here on."""
        with self._explained():
            bucket, work = self._coming.pop()
            rendezvous.complete(work, self._check, self._timeout_s)
            self._begin(index + 1)
        return bucket

    def digests(self, index: int) -> list[str] | None:
        with self._explained():
            return json.loads(self._store.get(f"digests/{index}"))

    def finish(self) -> None:
        with self._explained():
            self._store.set(f"done/{self._index}", "")

    def close(self) -> None:
        if self._group is not None:
            self._group.shutdown() if not self._cuda else self._group.abort()

    def _begin(self, index: int) -> None:
        if index < len(self.buckets):
            last = self.buckets[index][-1]
            bucket = self._memory(last.offset + last.nbytes)
            self._coming.append((bucket, rendezvous.broadcast(self._group, bucket)))

    def _memory(self, nbytes: int) -> Tensor:
        """uint8 [nbytes] of which nothing is in use."""
        if self._cuda:
            return torch.empty(nbytes, dtype=torch.uint8, device="cuda")
        for lease in self._leases:
            if not lease.lent and lease.size >= nbytes:
                return lease.lend(nbytes)
        self._leases = [*self._leases[-2:], Lease(np.empty(nbytes, np.uint8), nbytes)]  # what is kept is the engine's
        return self._leases[-1].lend(nbytes)

    def _wait(self, key: str) -> None:
        deadline = time.monotonic() + self._timeout_s
        while not rendezvous.appears(self._store, key):
            self._check()
            if time.monotonic() > deadline:
                raise TimeoutError(f"weight_sync: no weights came for {self._timeout_s:.0f} s")

    def _check(self) -> None:
        if self._store.check(["failure"]):
            raise _GivenUp(self._store.get("failure").decode(errors="replace"))

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Whatever a broken connection raises, as the ConnectionError that it is."""
        try:
            yield
        except _GivenUp as error:
            raise ConnectionError(f"weight_sync: the sender gave up: {error}") from None
        except TimeoutError:
            raise
        except (RuntimeError, OSError) as error:  # torch's own errors of stores and groups are RuntimeErrors
            with contextlib.suppress(RuntimeError, AttributeError):
                if self._store.check(["failure"]):
                    said = self._store.get("failure").decode(errors="replace")
                    raise ConnectionError(f"weight_sync: the sender gave up: {said}") from error
            raise ConnectionError(f"weight_sync: the sender ended in the middle of the weights ({error})") from error


class _GivenUp(Exception):
    pass

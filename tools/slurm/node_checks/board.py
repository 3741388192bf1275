"""How nodes tell each other: JSON values in a torch.distributed store that the head node hosts."""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Iterable
from typing import Any

import torch.distributed as dist


class Board:
    """Node 0 hosts it. Every wait has its end; a lost head node raises DistError (a RuntimeError) at once."""

    def __init__(self, head: str, node: int, timeout_s: float) -> None:
        self.node = node
        self._host, _, port = head.rpartition(":")
        self._port, self._timeout = int(port), datetime.timedelta(seconds=timeout_s)
        self._store = self.connect(is_host=node == 0)

    def connect(self, is_host: bool = False) -> dist.TCPStore:
        """A connection of its own: one that waits holds up whoever shares it."""
        return dist.TCPStore(self._host, self._port, is_master=is_host, timeout=self._timeout, wait_for_workers=False)

    def post(self, subject: str, value: Any) -> None:
        """This node's word on a subject."""
        self._store.set(f"{subject}/{self.node}", json.dumps(value))

    def gather(self, subject: str, nodes: Iterable[int], end: float) -> dict[int, Any]:
        """{node: its word} of those that came before `end`, in time.monotonic's seconds."""
        found: dict[int, Any] = {}
        nodes = list(nodes)
        while True:
            for node in nodes:
                if node not in found and self._store.check([f"{subject}/{node}"]):
                    found[node] = json.loads(self._store.get(f"{subject}/{node}"))
            if len(found) == len(nodes) or time.monotonic() > end:
                return found
            time.sleep(0.05)

    def word_of_head(self, subject: str, limit_s: float) -> Any:
        """Wait for node 0's word."""
        self._store.wait([f"{subject}/0"], datetime.timedelta(seconds=limit_s))
        return json.loads(self._store.get(f"{subject}/0"))

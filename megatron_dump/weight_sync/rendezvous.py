"""A process group of one sender and its receivers, apart from torch.distributed's default group."""

from __future__ import annotations

import datetime
import socket
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch.distributed import ProcessGroup, TCPStore

POLL_S = 0.05


def own_address(peer: str) -> str:
    """This machine's address on the interface that reaches `peer`, a host's name or address."""
    family, _, _, _, address = socket.getaddrinfo(peer, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)  # sends nothing: the kernel looks the route up
        return probe.getsockname()[0]


def is_here(host: str) -> bool:
    """Whether a host's name or address is this machine's."""
    _, _, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    return own_address(host) == address[0]


def make_group(store: TCPStore, rank: int, size: int, backend: str, address: str, timeout_s: float) -> Any:
    """A gloo or nccl group whose members meet in `store`; gloo talks on the interface of `address`."""
    timeout = datetime.timedelta(seconds=timeout_s)
    if backend == "nccl":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        return dist.ProcessGroupNCCL(store, rank, size, options)
    options = dist.ProcessGroupGloo._Options()
    options._timeout = timeout
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
    return dist.ProcessGroupGloo(store, rank, size, options)


def broadcast(group: ProcessGroup, tensor: Any) -> Any:
    """Begin sending or receiving rank 0's tensor."""
    options = dist.BroadcastOptions()
    options.rootRank, options.rootTensor = 0, 0
    return group.broadcast([tensor], options)


def appears(store: TCPStore, key: str) -> bool:
    """Wait for a key, POLL_S at most. A store that is gone raises RuntimeError."""
    deadline = time.monotonic() + POLL_S
    while not store.check([key]):
        if time.monotonic() > deadline:
            return False
        time.sleep(5e-4)
    return True


def complete(work: Any, check: Callable[[], None], timeout_s: float) -> None:
    """Wait for a transfer; `check` is called from time to time and raises when the other side is gone."""
    start = time.monotonic()
    pause, checked = 2e-5, start
    while not work.is_completed():
        time.sleep(pause)
        pause, now = min(pause * 2, 1e-3), time.monotonic()
        if now - checked > POLL_S:
            checked = now
            check()
        if now - start > timeout_s:
            raise TimeoutError(f"weight_sync: no weights went over the network for {timeout_s:.0f} s")
    work.wait()

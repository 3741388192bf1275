"""Which of a node's addresses and network interfaces lead to the head node."""

from __future__ import annotations

import os
import socket

import psutil


def own_address(head: str) -> str:
    """The address from which this node speaks to `head`."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((head, 9))  # a datagram socket: nothing is sent
        return probe.getsockname()[0]


def choose_interface(head: str) -> None:
    """Tell NCCL and gloo which interface has that address, unless the environment does already."""
    own = own_address(head)
    named = [name for name, addresses in psutil.net_if_addrs().items() if own in {a.address for a in addresses}]
    if named:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", named[0])
        if not own.startswith("127."):
            os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={named[0]}")  # =: this name, not names that begin so

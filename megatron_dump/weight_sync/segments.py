"""Memory that processes of one machine share, without a name: it is freed with its last user, however that ends."""

from __future__ import annotations

import dataclasses
import mmap
import os

import numpy as np
import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Place:
    """Where another process of this user and machine finds a segment."""

    pid: int
    fd: int
    serial: int  # no two segments of a process have the same


class Segment:
    """`size` bytes of shared memory: `bytes` is uint8 [size]."""

    def __init__(self, size: int, serial: int) -> None:
        self.size, self.serial = size, serial
        self.fd = os.memfd_create("weight_sync", os.MFD_CLOEXEC)
        try:
            os.posix_fallocate(self.fd, 0, size)  # a full machine is an error here, not a bus error later
            self.bytes = view(self.fd, size)
        except BaseException:
            os.close(self.fd)
            raise

    @property
    def place(self) -> Place:
        return Place(os.getpid(), self.fd, self.serial)

    def close(self) -> None:
        """Leave it to those who still have it open."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
            del self.bytes


def view(fd: int, size: int) -> Tensor:
    """uint8 [size] of an open segment."""
    return torch.from_numpy(np.frombuffer(map_file(fd, size), np.uint8))


def map_file(fd: int, size: int) -> mmap.mmap:
    """An open file's memory, all pages of it at once where Python can ask for that."""
    return mmap.mmap(fd, size, mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0))


def visit(place: Place, size: int) -> Tensor:
    """Another process's segment as uint8 [size]. OSError when it cannot be reached."""
    fd = os.open(f"/proc/{place.pid}/fd/{place.fd}", os.O_RDWR | os.O_CLOEXEC)
    try:
        return view(fd, size)
    finally:
        os.close(fd)

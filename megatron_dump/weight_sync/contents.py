"""What is in a bucket: tensors side by side in one stretch of bytes, and their digests."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 64  # bytes: of a tensor's place in its bucket


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor's place in a bucket."""

    name: str
    dtype: str  # torch's name, as "bfloat16"
    shape: tuple[int, ...]
    offset: int  # bytes from the bucket's start

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * dtype_of(self.dtype).itemsize

    def view(self, bucket: Tensor) -> Tensor:
        """The tensor inside uint8 [bytes]."""
        raw = bucket[self.offset : self.offset + self.nbytes]
        return raw.view(dtype_of(self.dtype)).view(self.shape)

    def digest(self, bucket: Tensor) -> str:
        """SHA-256 (hex) of name, dtype, shape and bytes."""
        whole = hashlib.sha256(f"{self.name} {self.dtype} {list(self.shape)}\n".encode())
        whole.update(bucket[self.offset : self.offset + self.nbytes].cpu().numpy().data)
        return whole.hexdigest()


def dtype_of(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} is no torch dtype")
    return dtype


def to_json(entries: Sequence[Entry]) -> list[list[Any]]:
    return [list(dataclasses.astuple(entry)) for entry in entries]


def from_json(rows: Sequence[Sequence[Any]]) -> list[Entry]:
    return [Entry(str(name), str(dtype), tuple(map(int, shape)), int(offset)) for name, dtype, shape, offset in rows]


def verify(entries: Sequence[Entry], bucket: Tensor, digests: Sequence[str]) -> None:
    """ValueError naming the first tensor whose digest here is not the sender's."""
    for entry, digest in zip(entries, digests, strict=True):
        if entry.digest(bucket) != digest:
            raise ValueError(
                f"weight_sync.checksum: {entry.name} {entry.dtype}{list(entry.shape)} is not what was sent"
            )


class Lease:
    """A stretch of host memory that is lent as tensors, and knows whether any of them is still there."""

    def __init__(self, memory: Any, size: int) -> None:
        self._memory, self.size = memory, size  # an mmap or an array
        self._window: weakref.ref[np.ndarray] | None = None

    def lend(self, nbytes: int) -> Tensor:
        """uint8 [nbytes]; every view of it keeps the memory lent."""
        window = np.frombuffer(self._memory, np.uint8, nbytes)
        self._window = weakref.ref(window)
        return torch.from_numpy(window)

    @property
    def lent(self) -> bool:
        return self._window is not None and self._window() is not None

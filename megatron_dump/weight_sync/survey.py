"""What the ranks tell each other once: who drives engines, who has which pieces, who shares memory with whom."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import secrets
import socket
import zlib
from collections.abc import Sequence

import numpy as np
import torch

from megatron_dump.distributed import all_gather_array
from megatron_dump.weight_sync.plan import Piece, Weights
from megatron_dump.weight_sync.segments import Place, Segment, visit

_TOKEN_BYTES = 8


@dataclasses.dataclass(frozen=True)
class Survey:
    """The same on every rank."""

    leads: list[int]  # the ranks that drive engines
    pieces: list[list[Piece]]  # of every rank
    machine: list[int]  # a number a machine, of every rank
    replica: list[int]
    shares: np.ndarray  # bool [leads, ranks]: the rank can write to the lead's memory

    def distance(self, lead: int, rank: int) -> int:
        """Rank itself, then its machine, then its replica."""
        elsewhere = self.machine[rank] != self.machine[lead]
        return 0 if rank == lead else 1 + 2 * elsewhere + (self.replica[rank] != self.replica[lead])


def survey(weights: Weights, drives: bool, replica: int, device: torch.device) -> Survey:
    """A collective of all ranks."""
    rows = all_gather_array(np.array([drives, replica, _machine()]), None, device)
    leads = np.flatnonzero(rows[:, 0]).tolist()
    packed = np.frombuffer(zlib.compress(json.dumps([list(p) for p in weights.pieces]).encode()), np.uint8)
    sizes = all_gather_array(np.array([len(packed)]), None, device)[:, 0]
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(packed)] = packed
    gathered = all_gather_array(padded, None, device)
    pieces = [_unpack(row[:n]) for row, n in zip(gathered, sizes, strict=True)]
    return Survey(leads, pieces, rows[:, 2].tolist(), rows[:, 1].tolist(), _shares(leads, device))


def _unpack(packed: np.ndarray) -> list[Piece]:
    rows = json.loads(zlib.decompress(packed.tobytes()))
    return [Piece(name, tuple(shape), *rest) for name, shape, *rest in rows]


def _machine() -> int:
    name = socket.gethostname() + pathlib.Path("/proc/sys/kernel/random/boot_id").read_text()
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")


def _shares(leads: Sequence[int], device: torch.device) -> np.ndarray:
    """Whether each rank reaches each lead's memory: tried, since containers and users decide it."""
    probe, token = Segment(_TOKEN_BYTES, 0), secrets.token_bytes(_TOKEN_BYTES)
    try:
        probe.bytes.copy_(torch.frombuffer(bytearray(token), dtype=torch.uint8))
        own = np.array([os.getpid(), probe.fd, int.from_bytes(token, "little", signed=True)])
        probes = all_gather_array(own, None, device)[leads]  # [leads, 3]
        reached = np.array([_reaches(*row) for row in probes.tolist()], np.uint8).reshape(len(leads))
        return all_gather_array(reached, None, device).T.astype(bool)  # everyone has tried when this returns
    finally:
        probe.close()


def _reaches(pid: int, fd: int, token: int) -> bool:
    try:
        found = visit(Place(pid, fd, 0), _TOKEN_BYTES).numpy().tobytes()
    except (OSError, ValueError):  # no such process here, not ours, or another file
        return False
    return int.from_bytes(found, "little", signed=True) == token

"""The ranks that fill one lead's buckets, and the two ways their pieces take.

On the lead's machine every rank writes its pieces to their places in the shared bucket; otherwise each rank sends the
lead one message a bucket. Neither gathers a tensor anywhere but in the bucket.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dump.weight_sync.plan import Bucket, Move, Weights
from megatron_dump.weight_sync.segments import Place, visit


class Crew:
    """One lead's plan as one of its ranks sees it. Creating it is a collective of all ranks, members or not."""

    def __init__(
        self,
        lead: int,
        rank: int,
        plan: list[Bucket],
        shared: bool,
        weights: Weights,
        device: torch.device,
        timeout_s: float,
    ) -> None:
        self.lead, self.rank, self.plan, self.shared = lead, rank, plan, shared
        self._weights, self._device = weights, device
        self.size = max(bucket.nbytes for bucket in plan)
        self.ranks = sorted({lead, *(r for bucket in plan for r in bucket.ranks)})
        self._group = None
        if len(self.ranks) > 1:
            self._group = dist.new_group(self.ranks, datetime.timedelta(seconds=timeout_s), backend="gloo")
        self._visited: dict[int, Tensor] = {}  # the lead's segments

    def fill(self, bucket: Bucket, room: Callable[[], tuple[Tensor, Place | None]]) -> Tensor | None:
        """Bring a bucket's pieces together in what `room` gives the lead: the lead's return value.

        A collective of the crew. Raises on a rank whose part fails, ConnectionError on the others.
        """
        place = torch.zeros(4, dtype=torch.int64)
        memory, error = None, None
        if self.rank == self.lead:
            try:
                memory, where = room()
                place = torch.tensor([1, *((where.pid, where.fd, where.serial) if where else (0, 0, 0))])
            except Exception as caught:  # noqa: BLE001 - raised below, once the others know
                error = caught
        if self._group is not None:
            dist.broadcast(place, self.lead, group=self._group)
        self._agree(bool(place[0]), error)
        own = [move for move in bucket.moves if move.rank == self.rank]
        message = None
        try:
            if self.rank == self.lead or self.shared:
                memory = memory if memory is not None else self._visit(Place(*place[1:].tolist()))
                for move in own:
                    move.place(memory).copy_(self._weights.read(move.index))
            elif own:
                message = self._pack(own)
        except Exception as caught:  # noqa: BLE001 - raised below, once the others know
            error = caught
        fine = torch.tensor(int(error is None))
        if self._group is not None:
            dist.all_reduce(fine, dist.ReduceOp.MIN, group=self._group)
        self._agree(bool(fine), error)
        if message is not None:
            dist.send(message, self.lead)
        if self.rank != self.lead:
            return None
        assert memory is not None
        if not self.shared:
            self._receive(bucket, memory)
        return memory

    def _agree(self, fine: bool, error: Exception | None) -> None:
        if error is not None:
            raise error
        if not fine:
            raise ConnectionError(f"the weights of rank {self.lead}'s engines were given up by another rank")

    def _visit(self, place: Place) -> Tensor:
        if place.serial not in self._visited:
            self._visited[place.serial] = visit(place, self.size)
            for old in sorted(self._visited)[:-2]:
                del self._visited[old]
        return self._visited[place.serial]

    def _pack(self, moves: list[Move]) -> Tensor:
        """This rank's pieces of a bucket behind each other: uint8 [bytes]."""
        message = self._message(moves)
        for move, raw in zip(moves, message.split([move.room for move in moves]), strict=True):
            piece = self._weights.read(move.index)
            move.values(raw).view(piece.shape).copy_(piece)
        return message

    def _receive(self, bucket: Bucket, memory: Tensor) -> None:
        """The other ranks' messages, one at a time."""
        for rank in bucket.ranks:
            if rank == self.lead:
                continue
            moves = [move for move in bucket.moves if move.rank == rank]
            message = self._message(moves)
            dist.recv(message, rank)
            for move, raw in zip(moves, message.split([move.room for move in moves]), strict=True):
                place = move.place(memory)
                place.copy_(move.values(raw).view(place.shape))

    def _message(self, moves: list[Move]) -> Tensor:
        return torch.empty(sum(move.room for move in moves), dtype=torch.uint8, device=self._device)

"""Which rank contributes what to which bucket: worked out once, from what every rank says it has."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from torch import Tensor

from megatron_dump.weight_sync.contents import ALIGNMENT, Entry, dtype_of

_BUCKETS = 8  # at least, where that leaves them larger than
_SMALLEST = 16 * 2**20  # bytes


@dataclasses.dataclass(frozen=True)
class Piece:
    """A rank's part of a Hugging Face tensor: `length` rows of dimension `dim`, from `start` on."""

    name: str
    shape: tuple[int, ...]  # of the whole tensor
    dtype: str
    order: int  # of the layer: tensors are sent in this order
    dim: int
    start: int
    length: int


class Weights(Protocol):
    """What a rank has of the policy, as the sync wants it (actor/weight_stream.py)."""

    @property
    def pieces(self) -> Sequence[tuple[str, tuple[int, ...], str, int, int, int, int]]:
        """The fields of a `Piece` each; the same at every call."""
        ...

    def read(self, index: int) -> Tensor:
        """The present values of pieces[index], in its shape; not written to."""
        ...


@dataclasses.dataclass(frozen=True)
class Move:
    """One piece's way into its bucket."""

    rank: int
    index: int  # of the piece, on its rank
    piece: Piece
    entry: Entry

    def place(self, bucket: Tensor) -> Tensor:
        """Where in the bucket's bytes its values go."""
        whole = self.entry.view(bucket)
        return whole.narrow(self.piece.dim, self.piece.start, self.piece.length) if self.piece.shape else whole

    def values(self, raw: Tensor) -> Tensor:
        """The piece's values at the start of a message's bytes, flat."""
        return raw[: self._nbytes].view(dtype_of(self.entry.dtype))

    @property
    def room(self) -> int:
        """Bytes that the piece takes in a message."""
        return -(-self._nbytes // ALIGNMENT) * ALIGNMENT

    @property
    def _nbytes(self) -> int:
        whole = self.piece.shape[self.piece.dim] if self.piece.shape else 1
        return self.entry.nbytes // whole * self.piece.length


@dataclasses.dataclass(frozen=True)
class Bucket:
    entries: tuple[Entry, ...]
    moves: tuple[Move, ...]

    @property
    def nbytes(self) -> int:
        return self.entries[-1].offset + self.entries[-1].nbytes

    @property
    def ranks(self) -> list[int]:
        """Those that contribute, sorted."""
        return sorted({move.rank for move in self.moves})


def make_plan(
    pieces: Sequence[Sequence[Piece]],  # of every rank
    distance: Callable[[int], int],  # of a rank from the one that sends: the nearest owner of a piece contributes it
    bucket_bytes: int,
    dtype: str | None,
) -> list[Bucket]:
    """All tensors once, layer by layer, in buckets of at most `bucket_bytes`, or of one larger tensor.

    A small model's are smaller: while one is loaded the next is filled, and both stay in the processors' caches.

    ValueError when the ranks' pieces do not make up a tensor.
    """
    owners: dict[str, dict[int, tuple[int, int]]] = defaultdict(dict)  # name -> start -> rank, index
    first: dict[str, Piece] = {}
    for rank in sorted(range(len(pieces)), key=lambda rank: (distance(rank), rank)):
        for index, piece in enumerate(pieces[rank]):
            first.setdefault(piece.name, piece)
            owners[piece.name].setdefault(piece.start, (rank, index))
    for name, starts in owners.items():
        _check(first[name], [pieces[rank][index] for rank, index in starts.values()])
    names = sorted(first, key=lambda name: first[name].order)  # stable: inside a layer as the ranks have it
    buckets = []
    total = sum(math.prod(first[name].shape) * dtype_of(dtype or first[name].dtype).itemsize for name in names)
    bucket_bytes = min(bucket_bytes, max(total // _BUCKETS, _SMALLEST))
    for chosen in _cut([first[name] for name in names], bucket_bytes, dtype):
        moves = [
            Move(rank, index, pieces[rank][index], entry)
            for entry in chosen
            for rank, index in owners[entry.name].values()
        ]
        buckets.append(Bucket(tuple(chosen), tuple(moves)))
    return buckets


def _check(whole: Piece, parts: Iterable[Piece]) -> None:
    end = 0
    for part in sorted(parts, key=lambda part: part.start):
        if part.start != end or (part.shape, part.dtype, part.dim) != (whole.shape, whole.dtype, whole.dim):
            break
        end += part.length
    if end != (whole.shape[whole.dim] if whole.shape else 1):
        raise ValueError(f"weight_sync: the ranks' parts of {whole.name} {list(whole.shape)} do not fit together")


def _cut(tensors: Sequence[Piece], bucket_bytes: int, dtype: str | None) -> list[list[Entry]]:
    buckets: list[list[Entry]] = [[]]
    for piece in tensors:
        kind = dtype if dtype and dtype_of(piece.dtype).is_floating_point else piece.dtype
        entry = _behind(buckets[-1], Entry(piece.name, kind, piece.shape, 0))
        if buckets[-1] and entry.offset + entry.nbytes > bucket_bytes:
            buckets.append([])
            entry = dataclasses.replace(entry, offset=0)
        buckets[-1].append(entry)
    # A receiver copies the very last tensor: a small one.
    last = buckets.pop()
    smallest = min(last, key=lambda entry: entry.nbytes)
    buckets.append([])
    for entry in [*(entry for entry in last if entry is not smallest), smallest]:
        buckets[-1].append(_behind(buckets[-1], entry))
    return buckets


def _behind(entries: Sequence[Entry], entry: Entry) -> Entry:
    end = entries[-1].offset + entries[-1].nbytes if entries else 0
    return dataclasses.replace(entry, offset=-(-end // ALIGNMENT) * ALIGNMENT)

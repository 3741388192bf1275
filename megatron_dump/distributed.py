"""What ranks tell each other outside the model: draws, arrays, digests and failures; gather.py: their rollouts.

Only tensors travel, never pickles. Every function is a collective over `group` (default: all ranks) and works without
an initialised process group, as one rank. Time-outs are the process group's. `device` is where the group's backend
wants its tensors: "cpu" for gloo, "cuda" for NCCL.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from megatron_dump.types import Draw

_MESSAGE_BYTES = 1024  # of a failing rank's message; the rest is cut


@dataclasses.dataclass(frozen=True)
class Replica:
    """This rank's model replica among the data-parallel ones; `group` connects the same rank of every replica."""

    rank: int
    size: int
    group: dist.ProcessGroup | None
    device: torch.device
    ranks: dist.ProcessGroup | None = None  # this replica's own; None: it is a single rank

    @property
    def world_size(self) -> int:
        """Ranks of all replicas together."""
        return self.size * (1 if self.ranks is None else dist.get_world_size(self.ranks))

    @property
    def is_lead(self) -> bool:
        """The rank that does what one rank of the replica must do for all."""
        return self.ranks is None or dist.get_rank(self.ranks) == 0


class DrawBroadcast:
    """Delivers the draw of the group's first rank to all its ranks: one broadcast of 3 P + K + 5 words of 64 bits."""

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        device: torch.device | str = "cpu",
        *,
        n_prompts: int,  # of the largest round
        n_sources: int,
    ):
        self._group, self._device = group, device
        self._n_prompts, self._n_sources = n_prompts, n_sources
        self.is_source: bool = _rank(group) == 0

    def draw(self, draw: Draw | None) -> Draw:
        """The source passes its draw, the others None. RuntimeError on every rank if the source passes None."""
        words = None if draw is None or not self.is_source else self._pack(draw)
        received = _broadcast_words(words, 4 + 3 * self._n_prompts + self._n_sources, self._group, self._device)
        if received is None:
            raise RuntimeError(
                f"no draw of at most {self._n_prompts} prompts and {self._n_sources} sources came from the "
                "curriculum's rank"
            )
        return self._unpack(received)

    def _pack(self, draw: Draw) -> np.ndarray | None:
        """int64 [4 + 3P + K]; None for a draw of other sizes, so that every rank learns of it."""
        ids = [np.asarray(a, np.int64) for a in (draw.prompt_ids, draw.source_ids, draw.rollouts)]
        weights = np.ascontiguousarray(draw.weights, np.float64)
        n = len(ids[0])
        if n > self._n_prompts or any(len(a) != n for a in ids) or len(weights) != self._n_sources:
            return None
        table = np.zeros((3, self._n_prompts), np.int64)
        table[:, :n] = ids
        return np.concatenate([[draw.step, n, draw.first_group, draw.train], table.reshape(-1), weights.view(np.int64)])

    def _unpack(self, words: np.ndarray) -> Draw:
        step, n, first_group, train = words[:4].tolist()
        table, weights = np.split(words[4:], [3 * self._n_prompts])
        prompt_ids, source_ids, rollouts = table.reshape(3, -1)[:, :n].copy()
        return Draw(step, prompt_ids, source_ids, rollouts, weights.copy().view(np.float64), first_group, bool(train))


def broadcast_array(
    array: np.ndarray | None,
    shape: Sequence[int],
    dtype: npt.DTypeLike,
    src: int = 0,  # rank inside the group
    group: dist.ProcessGroup | None = None,
    device: torch.device | str = "cpu",
) -> np.ndarray:
    """`array` of rank `src`, bit for bit, on every rank; every rank names its shape and dtype.

    Raises RuntimeError on every rank if `array` is not of that shape and dtype on the source.
    """
    dtype = np.dtype(dtype)
    count = int(np.prod(shape))
    words = None
    if _rank(group) == src and array is not None and array.shape == tuple(shape) and array.dtype == dtype:
        raw = array.tobytes()
        words = np.frombuffer(raw + bytes(-len(raw) % 8), np.int64)
    received = _broadcast_words(words, -(-count * dtype.itemsize // 8), group, device, src)
    if received is None:
        have = "nothing" if array is None else f"{array.dtype}{list(array.shape)}"
        raise RuntimeError(f"broadcast_array: rank {src} has no {dtype}{list(shape)} to send; this rank has {have}")
    return np.frombuffer(received.tobytes(), dtype, count).reshape(shape).copy()


def agree(name: str, digest: str, group: dist.ProcessGroup | None = None, device: torch.device | str = "cpu") -> None:
    """Compare a SHA-256 (hex) over all ranks; RuntimeError on every rank, naming those that differ, if any does."""
    own = np.frombuffer(bytes.fromhex(digest), np.uint8)
    if len(own) != 32:
        raise ValueError(f"agree on {name}: {digest!r} is not a SHA-256 in hexadecimal")
    digests = [row.tobytes().hex() for row in all_gather_array(own, group, device)]
    others = {_global_rank(rank, group): d for rank, d in enumerate(digests) if d != digests[0]}
    if others:
        theirs = ", ".join(f"{rank} ({d[:12]})" for rank, d in others.items())
        raise RuntimeError(
            f"ranks disagree on {name}: rank {_global_rank(0, group)} has {digests[0][:12]}, not so ranks {theirs}"
        )


@contextlib.contextmanager
def fail_together(
    what: str, group: dist.ProcessGroup | None = None, device: torch.device | str = "cpu"
) -> Iterator[None]:
    """At the end of the block, RuntimeError on every rank if any rank's block raised, with that rank's message.

    For phases without collectives in them: a rank that fails between two collectives leaves the others waiting there,
    and only the process group's time-out ends that.
    """
    error: BaseException | None = None
    try:
        yield
    except BaseException as caught:  # noqa: BLE001 - raised again below, once the others know
        error = caught
    text = b"" if error is None else f"{type(error).__name__}: {error}".encode()[:_MESSAGE_BYTES]
    own = np.zeros(_MESSAGE_BYTES, np.uint8)
    own[: len(text)] = np.frombuffer(text, np.uint8)
    messages = [row.tobytes().rstrip(b"\0").decode(errors="replace") for row in all_gather_array(own, group, device)]
    if error is not None and not isinstance(error, Exception):
        raise error  # an interrupt stays one on its own rank
    failed = next((rank for rank, message in enumerate(messages) if message), None)
    if failed is not None:
        raise RuntimeError(f"{what}: rank {_global_rank(failed, group)} failed: {messages[failed]}") from error


def _alone() -> bool:
    return not (dist.is_available() and dist.is_initialized())


def _rank(group: dist.ProcessGroup | None) -> int:
    """This process's rank inside the group."""
    rank = 0 if _alone() else dist.get_rank(group)
    if rank < 0:
        raise RuntimeError(f"global rank {dist.get_rank()} is not a member of the group of this collective")
    return rank


def _global_rank(rank: int, group: dist.ProcessGroup | None) -> int:
    return rank if _alone() or group is None else dist.get_global_rank(group, rank)


def all_gather_array(array: np.ndarray, group: dist.ProcessGroup | None, device: torch.device | str) -> np.ndarray:
    """[...] -> [ranks, ...], in the order of the group's ranks; one collective."""
    if _alone():
        return array[None]
    _rank(group)
    own = torch.from_numpy(np.array(array)).to(device)  # a copy: writable, and the caller's stays untouched
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, own, group=group)
    return torch.stack(parts).cpu().numpy()


def _broadcast_words(
    words: np.ndarray | None, n: int, group: dist.ProcessGroup | None, device: torch.device | str, src: int = 0
) -> np.ndarray | None:
    """int64 [n] of rank `src` on every rank; None on every rank if the source has none. One collective.

    The first word sent says whether words follow, so that a source that failed does not leave its peers waiting.
    """
    packed = np.zeros(n + 1, np.int64)
    if words is not None:
        packed[0], packed[1:] = 1, words
    if not _alone():
        _rank(group)
        tensor = torch.from_numpy(packed).to(device)
        dist.broadcast(tensor, src=_global_rank(src, group), group=group)
        packed = tensor.cpu().numpy()
    return packed[1:] if packed[0] else None

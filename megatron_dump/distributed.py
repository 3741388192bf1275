"""What ranks tell each other outside the model: draws, arrays, outcomes, digests and failures.

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

from megatron_dump.types import Completion, Draw, Outcomes

_COLUMNS = {  # of Outcomes, as gathered
    "group_ids": np.int64,
    "samples": np.int64,
    "prompt_ids": np.int64,
    "source_ids": np.int64,
    "rewards": np.float64,
    "advantages": np.float64,
    "correct": np.bool_,
    "well_formed": np.bool_,
    "lengths": np.int64,
    "finished": np.bool_,
    "kept": np.bool_,
    "ages": np.int64,
}
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


def gather_outcomes(
    local: Outcomes, group: dist.ProcessGroup | None = None, device: torch.device | str = "cpu"
) -> Outcomes:
    """Every rank's rollouts as one Outcomes, sorted by (group_id, sample), the same on every rank of the group.

    local: this rank's rollouts in any order, possibly none. Integers travel as float64, exact below 2**53. Raises
    ValueError on every rank if ranks are at different steps or a (group_id, sample) comes twice, as it does when
    `group` is not the data-parallel one.
    """
    table = np.stack([np.asarray(getattr(local, name), np.float64) for name in _COLUMNS], axis=1)  # [N_local, 12]
    sizes = all_gather_array(np.array([len(table), local.step]), group, device)  # [ranks, 2]
    if np.any(sizes[:, 1] != sizes[0, 1]):
        raise ValueError(f"gather_outcomes: the ranks are at different steps: {sizes[:, 1].tolist()}")
    padded = np.zeros((max(1, int(sizes[:, 0].max())), table.shape[1]))  # some backends refuse empty tensors
    padded[: len(table)] = table
    gathered = all_gather_array(padded, group, device)  # [ranks, N_max, 12]
    rows = np.concatenate([part[:n] for part, n in zip(gathered, sizes[:, 0], strict=True)])
    rows = rows[np.lexsort((rows[:, 1], rows[:, 0]))]  # the last key, group_id, sorts first
    repeated = np.all(rows[1:, :2] == rows[:-1, :2], axis=1)
    if repeated.any():
        group_id, sample = rows[1:][repeated][0, :2].astype(int)
        raise ValueError(f"gather_outcomes: sample {sample} of group {group_id} came from two ranks")
    return Outcomes(step=local.step, **{n: rows[:, i].astype(d) for i, (n, d) in enumerate(_COLUMNS.items())})


def gather_completions(
    local: Sequence[Completion], group: dist.ProcessGroup | None = None, device: torch.device | str = "cpu"
) -> list[Completion]:
    """Every rank's completions, sorted by (group_id, sample), the same on every rank; their texts stay behind.

    Four collectives whatever the number of completions, 12 bytes a token, padded to the largest share.
    """
    heads = np.array([(c.group_id, c.sample, c.finished, c.policy_version, len(c.token_ids)) for c in local], np.int64)
    heads = heads.reshape(-1, 5)
    tokens = np.concatenate([np.empty(0, np.int64), *(c.token_ids for c in local)]).astype(np.int64)
    logprobs = np.concatenate([np.empty(0, np.float32), *(c.logprobs for c in local)]).astype(np.float32)
    sizes = all_gather_array(np.array([len(heads), len(tokens)]), group, device)  # [ranks, 2]
    parts = []
    for array, counts in ((heads, sizes[:, 0]), (tokens, sizes[:, 1]), (logprobs, sizes[:, 1])):
        padded = np.zeros((max(1, int(counts.max())), *array.shape[1:]), array.dtype)
        padded[: len(array)] = array
        gathered = all_gather_array(padded, group, device)
        parts.append(np.concatenate([part[:n] for part, n in zip(gathered, counts, strict=True)]))
    heads, tokens, logprobs = parts
    ends = np.cumsum(heads[:, 4])
    completions = [
        Completion(g, sample, tokens[end - length : end], logprobs[end - length : end], bool(finished), version)
        for (g, sample, finished, version, length), end in zip(heads.tolist(), ends.tolist(), strict=True)
    ]
    return sorted(completions, key=lambda c: (c.group_id, c.sample))


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
            f"{name} differs: rank {_global_rank(0, group)} has {digests[0][:12]}, not so ranks {theirs}"
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

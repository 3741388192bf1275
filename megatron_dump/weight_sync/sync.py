"""Pushing the policy's weights to the engines, from every rank at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dump.distributed import all_gather_array, fail_together
from megatron_dump.engine_options import WeightSyncOptions
from megatron_dump.weight_sync import rendezvous
from megatron_dump.weight_sync.contents import dtype_of
from megatron_dump.weight_sync.crew import Crew
from megatron_dump.weight_sync.plan import Bucket, Weights, make_plan
from megatron_dump.weight_sync.segments import Place
from megatron_dump.weight_sync.stream import EngineHandle, Outlet, Stream
from megatron_dump.weight_sync.survey import survey

_NONE = -1  # the version of an engine without weights
_TEXT_BYTES = 1024  # of what a rank says went wrong; the rest is cut


class WeightSync:
    """Megatron shards -> Hugging Face tensors -> engines. Creating it and `push` are collectives of all ranks.

    weights: what this rank has (actor/weight_stream.py).
    handles: the engines that this rank drives. Those of a replica's lead: its own; rank 0's alone: engines elsewhere.
    hosts: of those engines, by name or address; none given: they run on this rank's machine.
    replica: which data-parallel replica this rank belongs to.

    A lead holds two buckets beyond its weights, another rank what it contributes to one of them.
    """

    def __init__(
        self,
        weights: Weights,
        handles: Sequence[EngineHandle],
        options: WeightSyncOptions | None = None,
        *,
        hosts: Sequence[str] = (),
        replica: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self._options, self._device = options or WeightSyncOptions(), torch.device(device)
        if self._options.dtype is not None:
            dtype_of(self._options.dtype)  # a name that is none fails here, on every rank
        self._handles = list(handles)
        self._versions = [_NONE] * len(self._handles)  # what each engine has
        self._version = _NONE  # pushed last
        with fail_together("weight_sync", device=self._device):
            peer = _peer(hosts, self._options.transport)
        found = survey(weights, bool(self._handles), replica, self._device)
        if not found.leads:
            raise ValueError("weight_sync: no rank drives an engine")
        remote = all_gather_array(np.array(peer is not None), None, self._device)
        self._rank, self._outlet = _rank(), None
        self.crews: list[Crew] = []  # of all leads; this rank is not in all of them
        for i, lead in enumerate(found.leads):
            plan = make_plan(
                found.pieces,
                lambda rank, lead=lead: found.distance(lead, rank),
                int(self._options.bucket_mb * 2**20),
                self._options.dtype,
            )
            reached = all(found.shares[i][rank] for bucket in plan for rank in bucket.ranks)
            # Longer than a lead waits for its engines: the others learn of that from it.
            timeout_s = 2 * self._options.timeout_s
            crew = Crew(lead, self._rank, plan, reached and not remote[lead], weights, self._device, timeout_s)
            self.crews.append(crew)
            if lead == self._rank:
                self._outlet = Outlet(plan, peer, self._options, self._device)

    def push(self, version: int) -> None:
        """Bring the present weights, numbered `version`, to every engine that does not have that version yet.

        An engine that fails is restarted and gets them once more. RuntimeError on every rank when that fails too,
        ValueError when versions differ between ranks or go back.
        """
        failures: list[str] = []
        for _ in range(2):
            waiting = [i for i, has in enumerate(self._versions) if has != version or not self._handles[i].alive()]
            rows = all_gather_array(np.array([version, bool(waiting)]), None, self._device)
            self._check(version, rows[:, 0])
            leads = np.flatnonzero(rows[:, 1]).tolist()
            failures = self._round(version, waiting, leads, restart=bool(failures)) if leads else []
            if not failures:
                self._version = version
                return
        raise RuntimeError(f"weight_sync: version {version} failed twice: {'; '.join(failures)}")

    def invalidate(self, handle: EngineHandle) -> None:
        """The engine has lost its weights: it was restarted, or slept. The next push brings them again."""
        self._versions[self._handles.index(handle)] = _NONE

    def close(self) -> None:
        if self._outlet is not None:
            self._outlet.close()

    def _check(self, version: int, versions: np.ndarray) -> None:
        if np.any(versions != version):
            raise ValueError(f"weight_sync: the ranks push different versions: {versions.tolist()}")
        if version < self._version:
            raise ValueError(f"weight_sync: version {version} is older than {self._version}, which was pushed before")

    def _restarted(self, waiting: list[int], restart: bool) -> list[EngineHandle]:
        """Engines without weights: the dead ones, or all with `restart`, are restarted."""
        for i in waiting:
            if restart or not self._handles[i].alive():
                self._versions[i] = _NONE
                self._handles[i].restart()
        return [self._handles[i] for i in waiting]

    def _round(self, version: int, waiting: list[int], leads: list[int], restart: bool) -> list[str]:
        """Stream to the `waiting` engines of this rank, take part in the other leads' streams; what failed anywhere."""
        source = None
        if waiting:
            source = _Source(self._outlet, len(waiting), lambda: self._restarted(waiting, restart), version)
        errors: dict[int, Exception] = {}  # by lead: what ended its stream on this rank
        crews = [crew for crew in self.crews if crew.lead in leads and self._rank in crew.ranks]
        for number in range(len(self.crews[0].plan)):
            for crew in crews:
                if crew.lead not in errors:
                    try:
                        memory = crew.fill(crew.plan[number], source.room if source else _no_room)
                        if memory is not None and source is not None:
                            source.send(crew.plan[number], memory)
                    except Exception as error:  # noqa: BLE001 - told to all ranks below; another may be in time-out
                        errors[crew.lead] = error
        said = [_text(error) for lead, error in errors.items() if lead != self._rank]
        if source is not None:
            own = errors.get(self._rank) or source.error
            failed = source.end(None if own is None else _text(own))
            for i, handle in enumerate(waiting):
                self._versions[handle] = _NONE if i in failed else version
            said += [f"engine {waiting[i]}: {why}" for i, why in failed.items()]
        return _gather_text("; ".join(said), self._device)


class _Source:
    """A lead's stream, whose failures reach the crew through `room`: the next thing that all of it takes part in."""

    def __init__(self, outlet: Outlet | None, n: int, started: Callable[[], list[EngineHandle]], version: int) -> None:
        self.error: Exception | None = None
        self._stream: Stream | None = None
        self._n = n
        try:
            assert outlet is not None  # a rank with handles has one
            self._stream = Stream(outlet, started(), version)
        except Exception as error:  # noqa: BLE001 - raised by room
            self.error = error

    def room(self) -> tuple[Tensor, Place | None]:
        if self.error is not None:
            raise self.error
        assert self._stream is not None
        return self._stream.room()

    def send(self, bucket: Bucket, memory: Tensor) -> None:
        try:
            assert self._stream is not None
            self._stream.send(bucket, memory)
        except Exception as error:  # noqa: BLE001 - raised by room
            self.error = error

    def end(self, failure: str | None) -> dict[int, str]:
        if self._stream is None:
            return dict.fromkeys(range(self._n), str(failure))
        return self._stream.end(failure)


def _no_room() -> tuple[Tensor, Place | None]:
    raise AssertionError("only a lead is asked for room")


def _peer(hosts: Sequence[str], transport: str) -> str | None:
    """A host of the engines to reach over the network; None where shared memory does."""
    remote = [host for host in hosts if not rendezvous.is_here(host)]
    if transport == "shared_memory" and remote:
        raise ValueError(
            f"weight_sync.transport=shared_memory: an engine runs on {remote[0]}, another machine; use broadcast"
        )
    if transport == "broadcast":
        return (remote or [*hosts, "127.0.0.1"])[0]
    return remote[0] if remote else None


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _gather_text(text: str, device: torch.device) -> list[str]:
    """The ranks' non-empty texts, each with its rank."""
    raw = text.encode()[:_TEXT_BYTES]
    own = np.zeros(_TEXT_BYTES, np.uint8)
    own[: len(raw)] = np.frombuffer(raw, np.uint8)
    texts = [row.tobytes().rstrip(b"\0").decode(errors="replace") for row in all_gather_array(own, None, device)]
    return [f"rank {rank}: {text}" for rank, text in enumerate(texts) if text]


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0

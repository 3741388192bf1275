"""A rank's share of a checkpoint, written by a thread of the rank itself; weights alone, written at once.

megatron-core says which tensors there are and which rank writes which; torch.distributed.checkpoint's writer writes
them. megatron-core's own asynchronous save is not used: it starts processes beside the collectives' threads, and from
0.17 on it is deprecated in favour of another package's. Here a copy of the tensors in host memory is all that training
waits for, nothing is forked, and a killed rank takes its writer along. Serialising and writing release Python's global
lock.
"""

from __future__ import annotations

import json
import pathlib
import threading
import time
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.strategies import torch as torch_dist
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from torch.distributed.checkpoint import FileSystemWriter, Metadata
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from megatron_dump.actor.checkpoint_files import Entries, entry, write_text


def save(state: dict[str, Any], folder: pathlib.Path) -> None:
    """Write `state` into `folder`, empty, and return when it is there. Collective."""
    share = _Share([])
    dist_checkpointing.save(state, str(folder), share)
    share.write()
    share.write_index(share.gather())
    dist.barrier()


class Write:
    """The write of one checkpoint. Building it is a collective: ranks agree on who writes what."""

    def __init__(
        self,
        folder: pathlib.Path,
        state: dict[str, Any],
        random_state: dict[str, Any],
        rank: int,
        group: dist.ProcessGroup,
        live: list[torch.Tensor],
    ) -> None:
        """folder: an empty checkpoint; group: ranks that hold replicas and so share the work.

        live: tensors that go on changing. What the state shares memory with them for is copied; none: nothing is, and
        `run` must end before they change.
        """
        self._folder, self._random = folder, folder / "random" / f"rank_{rank}.json"
        self._random_state = random_state
        self._share = _Share(live)
        dist_checkpointing.save(state, str(folder / "model"), FullyParallelSaveStrategyWrapper(self._share, group))
        self.written: Entries = {}  # of this rank's files, once it is done
        self.error: BaseException | None = None
        self.ended = 0.0  # time.monotonic() when this rank's files were written
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Write in the background."""
        # Not a daemon: the interpreter would tear it down in the middle of native code.
        self._thread = threading.Thread(target=self.run, name="checkpoint")
        self._thread.start()

    def run(self) -> None:
        """Write and synchronise this rank's files; what goes wrong is in `error`."""
        try:
            self._share.write()
            write_text(self._random, json.dumps(self._random_state))
            files = [*self._share.files, self._random]
            self.written = {f.relative_to(self._folder).as_posix(): entry(f) for f in files}
        except BaseException as error:  # noqa: BLE001 - every rank raises it, at the next poll
            self.error = error
        self.ended = time.monotonic()

    def is_running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def join(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def gather(self) -> list[list[WriteResult]] | None:
        """Where every rank has written what, on rank 0; None elsewhere. Collective."""
        return self._share.gather()

    def write_index(self, results: list[list[WriteResult]] | None) -> None:
        """Rank 0, given what `gather` returned, writes the index by which a checkpoint is read; others do nothing."""
        self._share.write_index(results)


class _Share(torch_dist.TorchDistSaveShardedStrategy):
    """What this rank writes of a state: megatron-core's plan of it, with the tensors in host memory."""

    def __init__(self, live: list[torch.Tensor]) -> None:
        super().__init__("torch_dist", 1)
        self._live = live
        self._results: list[WriteResult] = []
        self.files: list[pathlib.Path] = []  # that `write` has written

    def save(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: Any) -> None:
        """Plan, and copy what goes on changing. megatron-core's save calls this where others write. Collective."""
        rank = dist.get_rank()
        named, _, _ = torch_dist._replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)
        self._planner = _Planner(flatten_state_dict=False)
        self._planner.set_up_planner(torch_dist.mcore_to_pyt_state_dict(named, False), is_coordinator=rank == 0)
        self._writer = FileSystemWriter(checkpoint_dir, sync_files=True)
        self._writer.set_up_storage_writer(rank == 0)
        plan = self._writer.prepare_local_plan(self._planner.create_local_plan())
        plans: Any = [None] * dist.get_world_size() if rank == 0 else None
        dist.gather_object(plan, plans)
        self._metadata: Metadata | None = self._planner.create_global_plan(plans)[1] if rank == 0 else None
        # The writer numbers files by a plan's place among all. megatron-core gives a tensor to one rank alone, so that
        # the global plan takes nothing out of this one.
        (*_, plan) = self._writer.prepare_global_plan([SavePlan([])] * rank + [plan])
        self._plan = self._planner.finish_plan(plan)
        self._planner.stage(self._plan, self._live)

    def write(self) -> None:
        """Write and synchronise this rank's file; there is none where it has nothing to write."""
        if self._plan.items:
            self._results = self._writer.write_data(self._plan, self._planner).value()
        folder = pathlib.Path(self._writer.path)
        self.files = [folder / name for name in {result.storage_data.relative_path for result in self._results}]

    def gather(self) -> list[list[WriteResult]] | None:
        results: Any = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(self._results, results)
        return results

    def write_index(self, results: list[list[WriteResult]] | None) -> None:
        if results is not None:
            assert self._metadata is not None
            self._writer.finish(self._metadata, results)


class _Planner(torch_dist.MCoreSavePlanner):
    """megatron-core's, from which the writer gets copies of tensors instead of the tensors."""

    def stage(self, plan: SavePlan, live: list[torch.Tensor]) -> None:
        """Copy the plan's tensors to host memory, all that are not there or are one of `live`."""
        changing = {tensor.untyped_storage().data_ptr() for tensor in live}

        def on_host(data: Any) -> Any:
            if not torch.is_tensor(data):
                return data
            # From CUDA, torch copies without blocking into page-locked memory.
            copy = data.untyped_storage().data_ptr() in changing
            return data.detach().to("cpu", non_blocking=True, copy=copy)

        self._staged = {item.index: on_host(super(_Planner, self).resolve_data(item)) for item in plan.items}
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def resolve_data(self, write_item: WriteItem) -> Any:
        return self._staged[write_item.index]

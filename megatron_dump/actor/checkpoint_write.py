"""A rank's share of a checkpoint, written by a thread of the rank itself.

megatron-core 0.16 writes from processes that it forks, and hands their results over in a manager process that every
rank spawns (seconds, and 200 MB each: it imports everything again). Here one thread writes the same files with
megatron-core's own function: a copy of the tensors in host memory is all that training waits for, nothing is forked
beside CUDA's and the collectives' threads, and a killed rank takes its writer along. Serialising and writing release
Python's global lock.
"""

from __future__ import annotations

import inspect
import json
import pathlib
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from megatron_dump.actor.checkpoint_files import Entries, entry, write_text


class Write:
    """The write of one checkpoint. Building it is a collective: ranks agree on who writes what."""

    def __init__(
        self,
        folder: pathlib.Path,
        state: dict[str, Any],
        random_state: dict[str, Any],
        rank: int,
        group: torch.distributed.ProcessGroup,
        live: list[torch.Tensor],
    ) -> None:
        """folder: an empty checkpoint; group: ranks that hold replicas and so share the work.

        live: tensors that go on changing. What the state shares memory with them for is copied; none: nothing is, and
        `run` must end before they change.
        """
        if not hasattr(filesystem_async, "_results_queue"):
            raise AttributeError("megatron-core has no filesystem_async._results_queue; see actor/checkpoint_write.py")
        filesystem_async._results_queue = queue.Queue()  # None would start the manager process
        self._folder, self._random = folder, folder / "random" / f"rank_{rank}.json"
        self._random_state = random_state
        self._strategy = _Strategy("torch_dist", 1, thread_count=1)
        request = dist_checkpointing.save(
            state, str(folder / "model"), FullyParallelSaveStrategyWrapper(self._strategy, group),
            async_sharded_save=True,
        )  # fmt: skip
        assert isinstance(request, AsyncRequest)
        self._finalize: list[Callable[[], None]] = request.finalize_fns
        self._buckets = _stage(self._strategy.writer.write_buckets or [], live)
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
            writer, results = self._strategy.writer, queue.Queue()
            write = inspect.unwrap(writer.write_preloaded_data)  # without its switch of the process's garbage collector
            transforms = [writer.transforms] if hasattr(writer, "transforms") else []
            counts: Any = queue.Queue()
            for i, bucket in enumerate(self._buckets):
                counts.put(i)
                write(transforms, i, bucket, results, counts, use_fsync=True)
            outcomes = dict(results.get_nowait() for _ in self._buckets)
            for outcome in outcomes.values():
                if isinstance(outcome, Exception):
                    raise outcome
            if writer.results_queue is not None:
                writer.results_queue.put(outcomes)
            write_text(self._random, json.dumps(self._random_state))
            files = [pathlib.Path(path) for path, _, _ in self._buckets] + [self._random]
            self.written = {f.relative_to(self._folder).as_posix(): entry(f) for f in files}
        except BaseException as error:  # noqa: BLE001 - every rank raises it, at the next poll
            self.error = error
        self.ended = time.monotonic()

    def is_running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def join(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def finish(self) -> None:
        """Let rank 0 write megatron-core's index, once every rank has written. Collective."""
        for function in self._finalize:
            function()


class _Strategy(TorchDistSaveShardedStrategy):
    """megatron-core's save, up to the writing."""

    writer: filesystem_async.FileSystemWriterAsync

    def _get_save_and_finalize_callbacks(self, writer: Any, save_state_dict_ret: Any) -> AsyncRequest:
        self.writer = writer
        request = super()._get_save_and_finalize_callbacks(writer, save_state_dict_ret)
        return request._replace(async_fn=None, async_fn_args=(), preload_fn=None)


def _stage(buckets: list[Any], live: list[torch.Tensor]) -> list[Any]:
    """The tensors in host memory, none of them one of `live`."""
    changing = {tensor.untyped_storage().data_ptr() for tensor in live}

    def on_host(tensor: torch.Tensor) -> torch.Tensor:
        # From CUDA, torch copies without blocking into page-locked memory.
        copy = tensor.untyped_storage().data_ptr() in changing
        return tensor.to("cpu", non_blocking=True, copy=copy)

    staged = [
        (path, key, (data, [(item, on_host(tensor)) for item, tensor in tensors]))
        for path, key, (data, tensors) in buckets
    ]
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return staged

"""Checkpoints of a run: model and optimizer by megatron-core's dist_checkpointing, everything else as JSON.

checkpoint_files.py says what lies where. A checkpoint can be loaded under another tensor × pipeline × data layout.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
import threading
import time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_dump.actor import checkpoint_files as files
from megatron_dump.actor import megatron_versions, random_state
from megatron_dump.actor.actor import MegatronGPTGRPOActor
from megatron_dump.actor.checkpoint_write import Write
from megatron_dump.actor.offload import optimizer_parts
from megatron_dump.actor.retention import best, surplus
from megatron_dump.actor.sharded_state import restore_state, sharded_state
from megatron_dump.config import CheckpointCallbackParams
from megatron_dump.distributed import all_gather_array, fail_together


@dataclasses.dataclass
class _Pending:
    step: int
    partial: pathlib.Path
    state: str  # as JSON: what it is made of goes on changing
    write: Write
    begun: float  # time.monotonic()


class Checkpoints:
    """The checkpoints in one folder. Every method is a collective.

    A failed write raises RuntimeError on every rank: from `save`, or with `async_save` from the next `poll`, `save` or
    `wait`. What kills interrupt is never read.
    """

    def __init__(
        self,
        folder: str | pathlib.Path,
        actor: MegatronGPTGRPOActor,
        params: CheckpointCallbackParams | None = None,
        resume_from: str | None = None,
    ) -> None:
        """resume_from: the folder of a checkpoint, here or elsewhere, to continue from instead of the latest."""
        self.folder, self.actor = pathlib.Path(folder), actor
        self.params = params or CheckpointCallbackParams()
        self._resume_from = pathlib.Path(resume_from).resolve() if resume_from else None
        self._chosen: pathlib.Path | None = None  # what `latest` found under that path
        self._origin: str | None = None  # the resume_from that this run, or an earlier part of it, began with
        self._verified: set[pathlib.Path] = set()
        self._values: dict[int, float | None] = {}  # the monitored metric of checkpoints already read
        self._pending: _Pending | None = None
        self.longest_save_s = 0.0  # this rank's share of it, without what training did meanwhile
        self._removals: list[threading.Thread] = []

    def latest(self) -> int | None:
        """The step to resume from, the same on every rank; None when there is none.

        The highest complete one, or `resume_from`; a run that began there and has saved since goes on from its own.
        ValueError when `resume_from` cannot be used.
        """
        # Rank 0 alone looks: ranks on other nodes may see the shared folder a moment later.
        found = self._gather_json(self._find() if self.actor.parallel.rank == 0 else None)[0]
        if isinstance(found, str):
            raise ValueError(f"exp_manager.resume_from_checkpoint={self._resume_from}: {found}")
        step, is_chosen = found
        self._chosen = self._resume_from if is_chosen else None
        return step if step >= 0 else None

    def save(self, step: int, state: dict[str, Any]) -> pathlib.Path:
        """Write step_<step> with `state` (JSON-serialisable; rank 0's is kept); with `async_save`, begin to.

        `state["metrics"]` and `state["validation"]`, where there, hold the metrics of which `monitor` is one.
        """
        self.wait()
        begun = time.monotonic()
        parallel, partial = self.actor.parallel, self.folder / f"step_{step}.partial"
        actor = {"version": self.actor.version, "scheduler": self.actor.scheduler.state_dict()}
        with fail_together(f"checkpoint of step {step}", device=parallel.device):
            text = json.dumps({"step": step, "actor": actor, "resumed_from": self._origin, **state})
            if parallel.rank == 0:
                files.start(self.folder, step)
        random = {"layout": self._layout(), **random_state.capture()}
        live = self._live() if self.params.async_save else []
        tensors = sharded_state(self.actor, is_loading=False)
        replicas = parallel_state.get_data_parallel_group(with_context_parallel=True)
        write = Write(partial, tensors, random, parallel.rank, replicas, live)
        self._pending = _Pending(step, partial, text, write, begun)
        if self.params.async_save:
            write.start()
        else:
            write.run()
            self.poll()
        return files.step_folder(self.folder, step)

    def poll(self) -> bool:
        """Complete the checkpoint being written if every rank has written; never waits for the disk.

        Returns whether none is being written any more. One number a rank is exchanged while one is, nothing otherwise.
        """
        if self._pending is None:  # on every rank alike
            return True
        if self._gather(np.array([int(self._pending.write.is_running())])).any():
            return False
        pending, self._pending, polled = self._pending, None, time.monotonic()
        with fail_together(f"checkpoint of step {pending.step}", device=self.actor.parallel.device):
            pending.write.join()
            if pending.write.error is not None:
                raise pending.write.error
        results = pending.write.gather()
        written = {name: entry for part in self._gather_json(pending.write.written) for name, entry in part.items()}
        with fail_together(f"checkpoint of step {pending.step}", device=self.actor.parallel.device):
            pending.write.write_index(results)
            if self.actor.parallel.rank == 0:
                files.publish(pending.partial, pending.step, pending.state, written)
                for doomed in files.discard(self.folder, self._surplus()):
                    self._removals.append(threading.Thread(target=shutil.rmtree, args=(doomed,)))
                    self._removals[-1].start()
                self._link_best()
        took = pending.write.ended - pending.begun + time.monotonic() - polled
        self.longest_save_s = max(self.longest_save_s, took)
        return True

    def wait(self) -> None:
        """Until no checkpoint is being written or removed."""
        if self._pending is not None:
            self._pending.write.join()
        self.poll()
        while self._removals:  # what one leaves behind, the next save removes
            self._removals.pop().join()

    def state(self, step: int) -> dict[str, Any]:
        """What `save` was given for step_<step>, without loading any tensor; the files are verified first.

        ValueError naming the file that is missing, cut short or damaged, and what to resume from instead.
        """
        path = self._path(step)
        if path not in self._verified:
            place = self.actor.parallel
            found = self._gather_json(files.damage(path, place.rank, place.world_size))
            if damage := next(filter(None, found), None):
                raise ValueError(f"{damage}; {self._instead(step)}")
            self._verified.add(path)
        return files.read_state(path)

    def load(self, step: int) -> dict[str, Any]:
        """Restore model, optimizer and schedule from step_<step>; returns the `state` it was saved with.

        Generator states return only under the layout that they were saved under: every rank has its own.
        """
        path, state = self._path(step), self.state(step)
        loaded = megatron_versions.load(sharded_state(self.actor, is_loading=True), path / "model")
        restore_state(self.actor, loaded, state["actor"]["version"])
        self.actor.scheduler.num_steps = 0  # megatron-core adds the saved steps to it
        self.actor.scheduler.load_state_dict(state["actor"]["scheduler"])
        self.actor.version = state["actor"]["version"]
        random = path / "random" / f"rank_{self.actor.parallel.rank}.json"
        if random.exists() and (saved := json.loads(random.read_text()))["layout"] == self._layout():
            random_state.restore(saved)
        self._origin = str(self._resume_from) if self._chosen else state["resumed_from"]
        with fail_together(f"checkpoints later than step {step}", device=self.actor.parallel.device):
            if self.actor.parallel.rank == 0 and self._chosen:
                files.supersede(self.folder, step)
                self._link_best()
        return state

    def _find(self) -> tuple[int, bool] | str:
        """(step or -1, is it `resume_from`), or why that cannot be used."""
        try:
            return files.find(self.folder, self._resume_from)
        except ValueError as error:
            return str(error)

    def _path(self, step: int) -> pathlib.Path:
        is_chosen = self._chosen is not None and files.step_of(self._chosen) == step
        return self._chosen if is_chosen and self._chosen else files.step_folder(self.folder, step)

    def _instead(self, step: int) -> str:
        path = self._path(step)
        for older in reversed([s for s in files.steps(path.parent) if s < step]):
            if files.damage(other := files.step_folder(path.parent, older), contents=False) is None:
                return (
                    f"step {older} is complete: to go back to it, move {path.name} away or set "
                    f"exp_manager.resume_from_checkpoint={other}"
                )
        return f"no older checkpoint is complete: restore the file, or move {path.name} away to start over"

    def _surplus(self) -> list[int]:
        return [] if self.params.save_top_k < 0 else surplus(self._monitored(), self.params)

    def _link_best(self) -> None:
        if self.params.monitor is not None:
            files.link_best(self.folder, best(self._monitored(), self.params))

    def _monitored(self) -> dict[int, float | None]:
        """Step of every complete checkpoint -> its monitored metric."""
        there = files.steps(self.folder)
        for step in there:
            if step not in self._values:
                state = files.read_state(files.step_folder(self.folder, step))
                measured = {**state.get("metrics", {}), **state.get("validation", {})}
                self._values[step] = measured.get(self.params.monitor)
        return {step: self._values[step] for step in there}

    def _live(self) -> list[torch.Tensor]:
        """What training changes in place."""
        tensors = [p.data for module in self.actor.modules for p in module.parameters()]
        for part in optimizer_parts(self.actor.optimizer):
            tensors += [p.data for group in part.optimizer.param_groups for p in group["params"]]
            tensors += [t for s in part.optimizer.state.values() for t in s.values() if torch.is_tensor(t)]
        return tensors

    def _layout(self) -> list[Any]:
        return [self.actor.parallel.world_size, dataclasses.asdict(self.actor.parallel.layout)]

    def _gather(self, own: np.ndarray) -> np.ndarray:
        return all_gather_array(own, dist.group.WORLD, self.actor.parallel.device)

    def _gather_json(self, own: Any) -> list[Any]:
        """A JSON value of every rank."""
        text = np.frombuffer(json.dumps(own).encode(), np.uint8)
        sizes = self._gather(np.array([len(text)]))[:, 0]
        padded = np.zeros(int(sizes.max()), np.uint8)
        padded[: len(text)] = text
        return [json.loads(row[:n].tobytes()) for row, n in zip(self._gather(padded), sizes.tolist(), strict=True)]

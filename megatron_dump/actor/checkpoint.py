"""Checkpoints of a run: model and optimizer by megatron-core's dist_checkpointing, everything else as JSON.

A checkpoint is a folder step_<n>; it appears under that name only when every rank has written its part, so a folder
with that name is complete. It can be loaded under another tensor × pipeline × data layout.
"""

from __future__ import annotations

import json
import os
import pathlib
import queue
import re
import shutil
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async

from megatron_dump.actor.actor import MegatronGPTGRPOActor
from megatron_dump.distributed import fail_together

_OPTIMIZER_FORMAT = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


class Checkpoints:
    """The checkpoints in one folder."""

    def __init__(self, folder: str | pathlib.Path, actor: MegatronGPTGRPOActor) -> None:
        self.folder, self.actor = pathlib.Path(folder), actor

    def latest(self) -> int | None:
        """The highest complete step, the same on every rank; None when there is none. Collective."""
        steps = [-1]
        if self.actor.parallel.rank == 0 and self.folder.is_dir():
            steps += [int(m[1]) for p in self.folder.iterdir() if (m := re.fullmatch(r"step_(\d+)", p.name))]
        # Rank 0 alone looks: ranks on other nodes may see the shared folder a moment later.
        newest = torch.tensor([max(steps)], device=self.actor.parallel.device)
        dist.broadcast(newest, 0)
        return int(newest) if int(newest) >= 0 else None

    def save(self, step: int, state: dict[str, Any]) -> pathlib.Path:
        """Write step_<step> with `state` (JSON-serialisable; rank 0's is kept). Collective."""
        final, partial = self.folder / f"step_{step}", self.folder / f"step_{step}.partial"
        writes, device = self.actor.parallel.rank == 0, self.actor.parallel.device
        with fail_together(f"checkpoint {partial}", device=device):
            if writes:
                if partial.exists():
                    shutil.rmtree(partial)
                (partial / "model").mkdir(parents=True)
        _keep_results_in_process()
        dist_checkpointing.save(self._sharded_state(is_loading=False), str(partial / "model"))
        dist.barrier()
        with fail_together(f"checkpoint {final}", device=device):
            if writes:
                actor = {"version": self.actor.version, "scheduler": self.actor.scheduler.state_dict()}
                (partial / "state.json").write_text(json.dumps({"step": step, "actor": actor, **state}))
                os.replace(partial, final)
        return final

    def state(self, step: int) -> dict[str, Any]:
        """What `save` was given for step_<step>, without loading any tensor."""
        path = self.folder / f"step_{step}" / "state.json"
        if not path.is_file():
            raise FileNotFoundError(f"exp_manager.explicit_log_dir: {path} is missing; remove {path.parent}")
        return json.loads(path.read_text())

    def load(self, step: int) -> dict[str, Any]:
        """Restore model, optimizer and schedule from step_<step>; returns the `state` it was saved with. Collective."""
        folder = self.folder / f"step_{step}"
        state = self.state(step)
        loaded = dist_checkpointing.load(self._sharded_state(is_loading=True), str(folder / "model"))
        self.actor.modules[0].load_state_dict(loaded["model"])
        self.actor.optimizer.load_state_dict(loaded["optimizer"])
        self.actor.scheduler.load_state_dict(state["actor"]["scheduler"])
        self.actor.version = state["actor"]["version"]
        return state

    def _sharded_state(self, is_loading: bool) -> dict[str, Any]:
        model = self.actor.modules[0].sharded_state_dict()
        if not is_loading and self.actor.version == 0:  # Adam's moments appear with the first update
            for part in getattr(self.actor.optimizer, "chained_optimizers", [self.actor.optimizer]):
                part.init_state_fn(part.optimizer, part.config)
        optimizer = self.actor.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=_OPTIMIZER_FORMAT)
        return {"model": model, "optimizer": optimizer}


def _keep_results_in_process() -> None:
    """A synchronous save reports inside its process; megatron-core would spawn a manager process on every rank for it.

    That process imports everything again (200 MB, seconds) and outlives a rank that is killed.
    """
    if filesystem_async._results_queue is None:  # megatron-core's own; AttributeError when it is gone
        filesystem_async._results_queue = queue.Queue()

"""How a run goes on from step to step: when its state is saved, and when it ends. The same on every rank."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from megatron_dump import events
from megatron_dump.distributed import all_gather_array, fail_together
from megatron_dump.monitor import Monitor
from megatron_dump.protocols import Store
from megatron_dump.stopping import Asked, Outcome, Stopping

State = Callable[[], dict[str, Any]]  # what a checkpoint holds besides the actor


def agreed(stopping: Stopping, longest_save_s: float, device: torch.device | str) -> Asked:
    """What any rank sees. One collective."""
    own = np.array(stopping.look(longest_save_s), np.int64)
    return Asked(*(bool(seen) for seen in all_gather_array(own, None, device).max(axis=0)))


def ends_at_start(
    stopping: Stopping, device: torch.device | str, saved: Sequence[int], max_steps: int
) -> Outcome | None:
    """Where the file STOP lies, nothing is begun. saved: steps of the checkpoints. One collective."""
    asked = agreed(stopping, 0.0, device)
    return Outcome("ended", max(saved, default=0), max_steps, stopping.why(asked)) if asked.stop else None


def due(step: int, interval: int, last: int) -> bool:
    """Every `interval` steps and at the end; never for 0."""
    return interval > 0 and (step % interval == 0 or step == last)


@dataclasses.dataclass
class Course:
    """Its methods are collectives: of five numbers a rank once a step, and once more where a checkpoint is due."""

    checkpoints: Store
    monitor: Monitor
    device: torch.device
    max_steps: int
    save_interval: int
    stopping: Stopping = dataclasses.field(default_factory=Stopping)
    saved: int = 0  # the step that the latest checkpoint holds, and the run would go on from
    _ended_by: Asked | None = None

    def goes_on(self, step: int, state: State) -> bool:
        """Whether to take another step after `step` of them; first the checkpoint that is asked for."""
        asked = agreed(self.stopping, self.checkpoints.longest_save_s, self.device)
        is_last = step >= self.max_steps
        if step > 0 and (asked.save or (asked.ends and not is_last)):
            if asked.save and not asked.late:
                with fail_together("the file SAVE", device=self.device):
                    self.stopping.clear_save()
            self._save(asked, step, state)
        if asked.ends and not is_last:
            self._ended_by = asked
            self._tell(step, f"{self.stopping.why(asked)}; the run stops after step {step} of {self.max_steps}, to go "
                             f"on from step {self.saved}")  # fmt: skip
            return False
        self.stopping.step_begins()
        return not is_last

    def step_done(self, step: int, state: State) -> None:
        """Step, log and validation are over: a checkpoint if one is due."""
        self.stopping.step_ends()
        self.checkpoints.poll()
        if due(step, self.save_interval, self.max_steps):
            self._save(agreed(self.stopping, self.checkpoints.longest_save_s, self.device), step, state)

    def end(self, step: int) -> Outcome:
        """How it ended after `step` steps, the last checkpoint complete."""
        self.checkpoints.wait()
        if self._ended_by is not None:
            state = "ended" if self._ended_by.stop else "stopped"
            return Outcome(state, step, self.max_steps, self.stopping.why(self._ended_by))
        if self.save_interval > 0 and self.saved < step:
            return Outcome("stopped", step, self.max_steps, "no time was left for the last checkpoint")
        return Outcome("finished", step, self.max_steps)

    def _save(self, asked: Asked, step: int, state: State) -> None:
        """Unless there is one of this step, or no time."""
        if self.saved >= step:
            return
        if asked.late:
            self._tell(step, f"no time is left for a checkpoint of step {step}; the last one is of step {self.saved}")
            return
        self.checkpoints.save(step, state())
        self.saved = step

    def _tell(self, step: int, message: str) -> None:
        self.monitor.log_events(events.notices(step, [message]))

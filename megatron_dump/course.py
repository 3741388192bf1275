"""How a run goes on from step to step: when its state is saved, and when it ends. The same on every rank."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from megatron_dump import events
from megatron_dump.distributed import all_gather_array, fail_together
from megatron_dump.early_stopping import missing
from megatron_dump.monitor import Monitor
from megatron_dump.protocols import Store
from megatron_dump.stopping import Asked, Outcome, Stopping

State = Callable[[], dict[str, Any]]  # what a checkpoint holds besides the actor
BY_SOURCE = 2  # slashes in the name of a metric that may be there only when its source is drawn: train/<source>/…


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


@dataclasses.dataclass
class Course:
    """Its methods are collectives: of six numbers a rank once a step, and once more where a checkpoint is due."""

    checkpoints: Store
    monitor: Monitor
    device: torch.device
    max_steps: int
    save_interval: int
    stopping: Stopping = dataclasses.field(default_factory=Stopping)
    max_generated_tokens: int | None = None
    monitor_best: str | None = None  # the metric that decides which checkpoints are the best
    monitor_end: str | None = None  # the metric of stopping.early, on every rank
    leads: bool = True  # rank 0: its metrics are complete
    saved: int = 0  # the step that the latest checkpoint holds, and the run would go on from
    generated_tokens: int = 0  # by all ranks, in all steps so far
    _ended_by: Asked | None = None
    _metrics: dict[str, float] = dataclasses.field(default_factory=dict)  # of the step's training
    _validation: dict[str, float] = dataclasses.field(default_factory=dict)  # and of its validation

    def goes_on(self, step: int, state: State) -> bool:
        """Whether to take another step after `step` of them; first the checkpoint that is asked for."""
        asked = agreed(self.stopping, self.checkpoints.longest_save_s, self.device)
        is_last = self.is_last(step)
        # A run that is over saves where it saves at all; one that is interrupted saves in any case.
        to_be_saved = asked.ends and not is_last and (self.save_interval > 0 or not asked.early)
        if step > 0 and (asked.save or to_be_saved):
            if asked.save and not asked.late:
                with fail_together("the file SAVE", device=self.device):
                    self.stopping.clear_save()
            self._save(asked, step, state)
        if asked.ends and not is_last:
            self._ended_by = asked
            way_on = "" if asked.early else f", to go on from step {self.saved}"
            self._tell(step, f"{self.stopping.why(asked)}; the run stops after step {step} of {self.max_steps}{way_on}")
            return False
        if not is_last:
            self._metrics, self._validation = {}, {}
        self.stopping.step_begins()
        return not is_last

    def is_last(self, step: int) -> bool:
        """Whether the run is complete after `step` steps."""
        tokens = self.max_generated_tokens
        return step >= self.max_steps or (tokens is not None and self.generated_tokens >= tokens)

    def due(self, step: int, interval: int) -> bool:
        """Every `interval` steps and at the end; never for 0."""
        return interval > 0 and (step % interval == 0 or self.is_last(step))

    def measured(self, step: int, metrics: Mapping[str, float], validation: bool = False) -> None:
        """What a step, or its validation, has found. RuntimeError on every rank when it lacks a monitored metric."""
        found = {key: value for key, value in metrics.items() if math.isfinite(value)}
        if validation:
            self._validation = found
        else:
            self._metrics = found
        # Those of the validation are known to be measured (inputs.py); the names of others only now.
        best = None if validation or (self.monitor_best or "val/").startswith("val/") else self.monitor_best
        end = self.monitor_end if (self.monitor_end or "").startswith("val/") == validation else None
        if best is None and end is None:
            return
        told = None
        with fail_together("exp_manager", device=self.device):
            if self.leads and best and best not in metrics and best.count("/") < BY_SOURCE:
                raise missing("exp_manager.checkpoint_callback_params", best, metrics)
            if end and self.stopping.early is not None:
                told = self.stopping.early.observe(step, metrics)
        if told is not None:
            self._tell(step, told)

    def resume(self, step: int, state: Mapping[str, Any]) -> int:
        """Go on from a checkpoint and its `state`; the step."""
        self.saved, self.generated_tokens = step, state["generated_tokens"]
        if self.stopping.early is not None and state.get("early_stopping") is not None:
            self.stopping.early.load_state_dict(state["early_stopping"])
        return step

    def step_done(self, step: int, state: State) -> None:
        """Step, log and validation are over: a checkpoint if one is due."""
        self.stopping.step_ends()
        self.checkpoints.poll()
        if self.due(step, self.save_interval):
            self._save(agreed(self.stopping, self.checkpoints.longest_save_s, self.device), step, state)

    def end(self, step: int) -> Outcome:
        """How it ended after `step` steps, the last checkpoint complete."""
        self.checkpoints.wait()
        if self._ended_by is not None:
            is_over = self._ended_by.early and (self.save_interval == 0 or self.saved >= step)
            state = "ended" if self._ended_by.stop else "finished" if is_over else "stopped"
            return Outcome(state, step, self.max_steps, self.stopping.why(self._ended_by))
        if self.save_interval > 0 and self.saved < step:
            return Outcome("stopped", step, self.max_steps, "no time was left for the last checkpoint")
        limit = f"trainer.grpo.max_generated_tokens={self.max_generated_tokens} reached"
        return Outcome("finished", step, self.max_steps, "" if step >= self.max_steps else limit)

    def _save(self, asked: Asked, step: int, state: State) -> None:
        """Unless there is one of this step, or no time."""
        if self.saved >= step:
            return
        if asked.late:
            self._tell(step, f"no time is left for a checkpoint of step {step}; the last one is of step {self.saved}")
            return
        early = self.stopping.early
        own = {"metrics": self._metrics, "validation": self._validation, "generated_tokens": self.generated_tokens}
        self.checkpoints.save(step, {**state(), **own, "early_stopping": early.state_dict() if early else None})
        self.saved = step

    def _tell(self, step: int, message: str) -> None:
        self.monitor.log_events(events.notices(step, [message]))

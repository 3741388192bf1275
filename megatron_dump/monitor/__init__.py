"""What a run tells the world while it trains: console, metrics.jsonl, TensorBoard, wandb. Rank 0 only."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_dump.console import Screen
from megatron_dump.monitor.files import FILES, drop_later, read_rows
from megatron_dump.monitor.trackers import TensorBoard, Tracker, Wandb

__all__ = ["FILES", "Monitor"]


class Monitor:
    """Every rank holds one; all but rank 0 do nothing, so that the trainer's loop needs no `if rank == 0`.

    A folder that already holds a metrics.jsonl is continued: totals and the last validation are read back from it.
    Call `truncate_after(step)` after a resume, before the first `log_step`.
    """

    def __init__(
        self,
        log_dir: str | Path,
        sources: list[str],
        max_steps: int,
        rank: int,
        exp_manager: Mapping[str, Any],
        max_generated_tokens: int | None = None,
    ) -> None:
        self._active, self._closed = rank == 0, False
        self._trackers: list[Tracker] = []
        if not self._active:
            return
        self.path = Path(log_dir) / "metrics.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._screen = Screen(sources, max_steps, max_generated_tokens)
        if exp_manager.get("create_tensorboard_logger", False):
            self._trackers.append(TensorBoard(self.path.parent))
        if exp_manager.get("create_wandb_logger", False):
            self._trackers.append(Wandb(self.path.parent, exp_manager.get("wandb_logger_kwargs") or {}))
        self.truncate_after(None)

    def truncate_after(self, step: int | None) -> None:
        """Forget every line of a step later than `step` (None: only a last line cut short by a crash), atomically."""
        if not self._active:
            return
        for path in (self.path.with_name(name) for name in FILES[1:]):
            if path.exists():
                drop_later(path, step)
        drop_later(self.path, step)
        rows = read_rows(self.path)
        validations = self.path.with_name("validation.jsonl")
        self._screen.restore(rows, read_rows(validations))
        trained = [row["step"] for row in rows if any(not key.startswith("val/") for key in row if key != "step")]
        self._last_step = max(trained, default=-1)

    def start_over(self) -> None:
        """A new run where an earlier one left files and no checkpoint: they move to previous_<n>, nothing is lost."""
        if not self._active:
            return
        left = [path for name in FILES if (path := self.path.with_name(name)).exists() and path.stat().st_size]
        if left:
            number = next(n for n in itertools.count(1) if not (self.path.parent / f"previous_{n}").exists())
            (self.path.parent / f"previous_{number}").mkdir()
            for path in left:
                path.rename(self.path.parent / f"previous_{number}" / path.name)
        self.truncate_after(None)

    def log_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record one training step; a step can be recorded only once."""
        if not self._active:
            return
        if step <= self._last_step:
            raise ValueError(f"step {step} after step {self._last_step} in {self.path}: call truncate_after() first")
        self._last_step = step
        self._write(step, metrics)
        self._screen.show_step(step, metrics)

    def log_validation(
        self, step: int, per_source: Mapping[str, Mapping[str, float]], pass_rates: Mapping[str, list[float]]
    ) -> None:
        """Record a validation as `val/<source>/<name>` in a line of its own; every source has an `accuracy`.

        pass_rates: source -> pass rate of each of its prompts, in an order that never changes; in validation.jsonl.
        """
        if self._active:
            self._write(step, {f"val/{source}/{k}": v for source, row in per_source.items() for k, v in row.items()})
            self._append("validation.jsonl", [{"step": step, "pass_rates": pass_rates}])
            self._screen.show_validation(step, pass_rates)

    def log_curriculum(self, event: Mapping[str, Any]) -> None:
        """Keep what the curriculum chose or was told in curriculum.jsonl, the log that curriculum/replay.py reads."""
        self._append("curriculum.jsonl", [dict(event)])

    def log_events(self, events: list[dict[str, Any]]) -> None:
        """Print what is out of the ordinary, and keep it in events.jsonl, for the report.

        Each has step, kind ("alarm", "dropped", "short_batch", "reward_fault" or "notice"), source (None: the run as a
        whole) and message. An alarm is sent once, when it is raised; its end is a notice.
        """
        self._append("events.jsonl", events)
        if self._active:
            self._screen.show_events(events)

    def log_samples(self, step: int, samples: list[dict[str, Any]]) -> None:
        """Keep a few completions of a step in samples.jsonl, for the report."""
        self._append("samples.jsonl", [{"step": step, **sample} for sample in samples])
        for tracker in self._trackers:
            tracker.log_samples(step, samples)

    def _append(self, name: str, rows: list[dict[str, Any]]) -> None:
        if self._active and rows:
            with self.path.with_name(name).open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)

    def close(self) -> None:
        """Print the summary and close every output. Can be called twice."""
        if self._active and not self._closed:
            self._closed = True
            self._screen.live.stop()
            self._screen.show_summary()
            while self._trackers:
                self._trackers.pop().close()

    def _write(self, step: int, metrics: Mapping[str, float]) -> None:
        values = {key: float(value) for key, value in metrics.items()}
        # NaN and infinity are no JSON: a reader in any language sees null, a gap in the curve
        finite = {key: value if math.isfinite(value) else None for key, value in values.items()}
        with self.path.open("a") as handle:  # closing flushes the line; a step takes seconds, an open microseconds
            handle.write(json.dumps({"step": int(step), **finite}) + "\n")
        for tracker in self._trackers:
            tracker.log(step, values)

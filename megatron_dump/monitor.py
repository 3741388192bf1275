"""What a run tells the world while it trains: console, metrics.jsonl, TensorBoard, wandb. Rank 0 only."""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_dump.console import Screen

log = logging.getLogger(__name__)

# JSON lines, each with its step
FILES = ("metrics.jsonl", "curriculum.jsonl", "samples.jsonl", "validation.jsonl", "events.jsonl")


class Monitor:
    """Every rank holds one; all but rank 0 do nothing, so that the trainer's loop needs no `if rank == 0`.

    A folder that already holds a metrics.jsonl is continued: totals and the last validation are read back from it.
    Call `truncate_after(step)` after a resume, before the first `log_step`.
    """

    def __init__(
        self, log_dir: str | Path, sources: list[str], max_steps: int, rank: int, exp_manager: Mapping[str, Any]
    ) -> None:
        self._active, self._closed = rank == 0, False
        if not self._active:
            return
        self.path = Path(log_dir) / "metrics.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._screen = Screen(sources, max_steps)
        self._loggers: list[_TensorBoard | _Wandb] = []
        if exp_manager.get("create_tensorboard_logger", False):
            self._loggers.append(_TensorBoard(self.path.parent))
        if exp_manager.get("create_wandb_logger", False):
            self._loggers.append(_Wandb(self.path.parent, exp_manager.get("wandb_logger_kwargs") or {}))
        self.truncate_after(None)

    def truncate_after(self, step: int | None) -> None:
        """Forget every line of a step later than `step` (None: only a last line cut short by a crash), atomically."""
        if not self._active:
            return
        for path in (self.path.with_name(name) for name in FILES[1:]):
            if path.exists():
                _drop_later(path, step)
        _drop_later(self.path, step)
        rows = _read_rows(self.path)
        validations = self.path.with_name("validation.jsonl")
        self._screen.restore(rows, _read_rows(validations))
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
            while self._loggers:
                self._loggers.pop().close()

    def _write(self, step: int, metrics: Mapping[str, float]) -> None:
        values = {key: float(value) for key, value in metrics.items()}
        # NaN and infinity are no JSON: a reader in any language sees null, a gap in the curve
        finite = {key: value if math.isfinite(value) else None for key, value in values.items()}
        with self.path.open("a") as handle:  # closing flushes the line; a step takes seconds, an open microseconds
            handle.write(json.dumps({"step": int(step), **finite}) + "\n")
        for logger in self._loggers:
            logger.log(step, values)


class _TensorBoard:
    def __init__(self, log_dir: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # opened at the first step that it sees: a resume hides what it repeats
        self._open = lambda step: SummaryWriter(str(log_dir / "tensorboard"), purge_step=step)
        self._writer: Any = None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._writer = self._writer or self._open(step)
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class _Wandb:
    """The only user of wandb. Its outages cost one warning, never the run; a missing package is an error at once."""

    def __init__(self, log_dir: Path, kwargs: Mapping[str, Any]) -> None:
        import wandb

        id_file = log_dir / "wandb_run_id"  # the same run goes on after a resume
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(4))
        # console="off": what a process prints is not uploaded, so nothing printed by mistake leaves the cluster
        options = {"dir": str(log_dir), "id": id_file.read_text().strip(), "resume": "allow", **kwargs}
        self._warned = False
        self._run = self._attempt(lambda: wandb.init(settings=wandb.Settings(console="off"), **options))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._attempt(lambda: self._run and self._run.log(dict(values), step=step))

    def close(self) -> None:
        self._attempt(lambda: self._run and self._run.finish())

    def _attempt(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except Exception as error:  # noqa: BLE001  whatever a tracker raises, the run goes on
            if not self._warned:
                log.warning("wandb failed, metrics.jsonl goes on: %s: %s", type(error).__name__, _redact(str(error)))
            self._warned = True
            return None


def _parse_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line and its row, one at a time: a decision log can be large. None where there is no file."""
    if not path.exists():
        return
    with path.open() as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                if next(lines, None) is not None:  # only the last line can have been cut short by a crash
                    raise ValueError(f"{path}, line {number} is not JSON: repair the file or move it away") from error
                return
            yield line.rstrip("\n"), row


def _read_rows(path: Path) -> list[dict[str, Any]]:
    return [row for _, row in _parse_lines(path)]


def _drop_later(path: Path, step: int | None) -> None:
    """Drop a file's lines written after step `step` was done, atomically.

    A line was written in its `step`, or, for draws made ahead of it, in that of its `at`.
    """
    temporary = path.with_suffix(".jsonl.tmp")
    with temporary.open("w") as file:
        kept = (line for line, row in _parse_lines(path) if step is None or row.get("at", row["step"]) <= step)
        file.writelines(line + "\n" for line in kept)
    temporary.replace(path)


def _redact(text: str) -> str:
    """Without the value of any environment variable whose name says that it is a secret."""
    for name, value in os.environ.items():
        if re.search("KEY|TOKEN|SECRET|PASSW", name.upper()) and value:
            text = text.replace(value, "***")
    return text

"""What a run tells the world while it trains: console, metrics.jsonl, TensorBoard, wandb. Rank 0 only."""

from __future__ import annotations

import datetime
import json
import logging
import math
import os
import re
import secrets
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.columns import Columns
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

log = logging.getLogger(__name__)

PHASES = ("draw", "gen", "reward", "old_log_prob", "ref", "adv", "update_actor", "sync", "step")
HEADLINE = (  # label, metric key, format
    ("reward", "critic/score/mean", ".3f"), ("accuracy", "train/accuracy", ".3f"),
    ("len", "response_length/mean", ".0f"), ("kl", "actor/kl_loss", ".4f"),
    ("grad_norm", "actor/grad_norm", ".3f"), ("seconds", "timing_s/step", ".1f"),
)  # fmt: skip
PLAIN_TABLE_EVERY = 5  # steps between two tables when the output is a file


class Monitor:
    """Every rank holds one; all but rank 0 do nothing, so that the trainer's loop needs no `if rank == 0`.

    A folder that already holds a metrics.jsonl is continued: totals and the last validation are read back from it.
    Call `truncate_after(step)` after a resume, before the first `log_step`.
    """

    def __init__(
        self, log_dir: str | Path, sources: list[str], max_steps: int, rank: int, exp_manager: Mapping[str, Any]
    ) -> None:
        self._active = rank == 0
        if not self._active:
            return
        self.path = Path(log_dir) / "metrics.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._screen = _Screen(sources, max_steps)
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
        rows = [row for row in _read_rows(self.path) if step is None or row["step"] <= step]
        temporary = self.path.with_suffix(".jsonl.tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
        temporary.replace(self.path)
        self._screen.restore(rows)
        trained = [row["step"] for row in rows if any(not key.startswith("val/") for key in row if key != "step")]
        self._last_step = max(trained, default=-1)

    def log_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record one training step; a step can be recorded only once."""
        if not self._active:
            return
        if step <= self._last_step:
            raise ValueError(f"step {step} after step {self._last_step} in {self.path}: call truncate_after() first")
        self._last_step = step
        self._write(step, metrics)
        self._screen.show_step(step, metrics)

    def log_validation(self, step: int, per_source: Mapping[str, Mapping[str, float]]) -> None:
        """Record a validation as `val/<source>/<name>` in a line of its own; every source has an `accuracy`."""
        if self._active:
            self._write(step, {f"val/{source}/{k}": v for source, row in per_source.items() for k, v in row.items()})
            self._screen.show_validation(step, per_source)

    def log_samples(self, step: int, samples: list[dict[str, Any]]) -> None:
        """Keep a few completions of a step in samples.jsonl, for the report."""
        if self._active:
            with (self.path.parent / "samples.jsonl").open("a") as file:
                file.writelines(json.dumps({"step": step, **sample}) + "\n" for sample in samples)

    def close(self) -> None:
        """Close every output. Can be called twice."""
        if self._active:
            self._screen.live.stop()
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


class _Screen:
    """A live view on a terminal; plain lines and tables in a file."""

    def __init__(self, sources: list[str], max_steps: int) -> None:
        self._sources = sorted(sources, key=_natural_key)
        self._max_steps = max_steps
        plain = {"width": 110, "force_terminal": False, "color_system": None, "highlight": False}
        self._console = Console() if sys.stdout.isatty() else Console(**plain)
        self.live = Live(console=self._console, auto_refresh=False)  # drawn by steps alone: no thread beside forks
        self._seconds: list[float] = []  # of the latest steps, for the ETA

    def restore(self, rows: list[dict[str, Any]]) -> None:
        """Totals and last validation as the earlier part of the run left them."""
        self._totals = dict.fromkeys(self._sources, 0)
        self._validation: dict[str, float] = {}
        for row in rows:
            self._add_draws(row)
            self._validation |= {s: row[f"val/{s}/accuracy"] for s in self._sources if f"val/{s}/accuracy" in row}

    def show_step(self, step: int, metrics: Mapping[str, float]) -> None:
        self._add_draws(metrics)
        metrics = {**metrics, "train/accuracy": _overall_accuracy(self._sources, metrics)}
        values = "  ".join(f"{label} {_number(metrics.get(key), spec)}" for label, key, spec in HEADLINE)
        if not self._console.is_terminal:
            self._console.print(f"step {step}/{self._max_steps}  {values}", soft_wrap=True, markup=False)
            if step % PLAIN_TABLE_EVERY == 0 or step >= self._max_steps:
                self._console.print(self._table(metrics))
            return
        self.live.start()  # later calls do nothing
        phases = " · ".join(f"{p} {metrics[f'timing_s/{p}']:.1f}" for p in PHASES if f"timing_s/{p}" in metrics)
        header = (self._progress(step, metrics), Text(f"seconds: {phases}", style="dim"), Text(values))
        self.live.update(Group(*header, self._table(metrics)), refresh=True)

    def show_validation(self, step: int, per_source: Mapping[str, Mapping[str, float]]) -> None:
        known = {s: per_source[s]["accuracy"] for s in sorted(per_source, key=_natural_key)}
        self._validation |= known
        values = "  ".join(f"{source} {accuracy:.3f}" for source, accuracy in known.items())
        self._console.print(f"validation at step {step}: accuracy  {values}", soft_wrap=True, markup=False)

    def _add_draws(self, metrics: Mapping[str, float]) -> None:
        for source in self._sources:
            self._totals[source] += int(metrics.get(f"curriculum/{source}/n_prompts", 0))

    def _progress(self, step: int, metrics: Mapping[str, float]) -> Columns:
        self._seconds = [*self._seconds[-19:], metrics.get("timing_s/step", math.nan)]
        left = (self._max_steps - step) * sum(self._seconds) / len(self._seconds)
        eta = str(datetime.timedelta(seconds=round(left))) if math.isfinite(left) else "–"
        bar = ProgressBar(total=self._max_steps, completed=step, width=40)
        return Columns([Text(f"step {step}/{self._max_steps}", style="bold"), bar, Text(f"ETA {eta}")])

    def _table(self, metrics: Mapping[str, float]) -> Table:
        """One row a source; what a source that was not drawn cannot have shows as a dash."""
        table = Table("source", box=box.SIMPLE, padding=(0, 1, 0, 0))  # narrow: fits 80 columns
        for title in ("weight", "", "prompts", "total", "reward", "accuracy", "val acc"):
            table.add_column(title, justify="right" if title else "left", no_wrap=True)
        for source in self._sources:
            weight = metrics.get(f"curriculum/{source}/weight", math.nan)
            bar = Text("█" * (round(10 * weight) if math.isfinite(weight) else 0), style="cyan")
            draws = (str(int(metrics.get(f"curriculum/{source}/n_prompts", 0))), str(self._totals[source]))
            train = [_number(metrics.get(f"train/{source}/{key}")) for key in ("reward/mean", "accuracy")]
            table.add_row(Text(source), _number(weight), bar, *draws, *train, _number(self._validation.get(source)))
        return table


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


def _read_rows(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text().splitlines() if path.exists() else []
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):  # only the last line can have been cut short by a crash
                raise ValueError(f"{path}, line {number} is not JSON: repair the file or move it away") from error
    return rows


def _overall_accuracy(sources: list[str], metrics: Mapping[str, float]) -> float:
    """Pass rate over all the rollouts of the step."""
    counts = {s: metrics[f"curriculum/{s}/n_rollouts"] for s in sources if f"train/{s}/accuracy" in metrics}
    passed = sum(count * metrics[f"train/{source}/accuracy"] for source, count in counts.items())
    return passed / sum(counts.values()) if counts else math.nan


def _natural_key(name: str) -> list[str | int]:
    """kk_logic_2 before kk_logic_10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _number(value: float | None, spec: str = ".3f") -> str:
    return "–" if value is None or not math.isfinite(value) else format(value, spec)


def _redact(text: str) -> str:
    """Without the value of any environment variable whose name says that it is a secret."""
    for name, value in os.environ.items():
        if re.search("KEY|TOKEN|SECRET|PASSW", name.upper()) and value:
            text = text.replace(value, "***")
    return text

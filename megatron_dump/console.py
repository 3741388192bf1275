"""The terminal's view of a run: a live table per source, or plain lines in a file."""

from __future__ import annotations

import datetime
import math
import re
import sys
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from rich import box
from rich.columns import Columns
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

PHASES = ("draw", "gen", "reward", "old_log_prob", "ref", "adv", "update_actor", "sync", "step")
HEADLINE = (  # label, metric key, format
    ("reward", "critic/score/mean", ".3f"), ("accuracy", "train/accuracy", ".3f"),
    ("len", "response_length/mean", ".0f"), ("kl", "actor/kl_loss", ".4f"),
    ("grad_norm", "actor/grad_norm", ".3f"), ("seconds", "timing_s/step", ".1f"),
)  # fmt: skip
PLAIN_TABLE_EVERY = 5  # steps between two tables when the output is a file


class Screen:
    """A live view on a terminal; plain lines and tables in a file."""

    def __init__(self, sources: list[str], max_steps: int) -> None:
        self._sources = sorted(sources, key=natural_key)
        self._max_steps = max_steps
        plain = {"width": 110, "force_terminal": False, "color_system": None, "highlight": False}
        self._console = Console() if sys.stdout.isatty() else Console(**plain)
        self.live = Live(console=self._console, auto_refresh=False)  # drawn by steps alone: no thread beside forks
        self._seconds: list[float] = []  # of the latest steps, for the ETA

    def restore(self, rows: list[dict[str, Any]], validations: list[dict[str, Any]]) -> None:
        """Totals and validations as the earlier part of the run left them."""
        self._totals = dict.fromkeys(self._sources, 0)
        for row in rows:
            self._add_draws(row)
        self._validations = [(row["step"], row["pass_rates"]) for row in validations]

    def show_step(self, step: int, metrics: Mapping[str, float]) -> None:
        self._add_draws(metrics)
        metrics = {**metrics, "train/accuracy": overall_accuracy(self._sources, metrics)}
        values = "  ".join(f"{label} {format_number(metrics.get(key), spec)}" for label, key, spec in HEADLINE)
        if not self._console.is_terminal:
            self._console.print(f"step {step}/{self._max_steps}  {values}", soft_wrap=True, markup=False)
            if step % PLAIN_TABLE_EVERY == 0 or step >= self._max_steps:
                self._console.print(self._table(metrics))
            return
        self.live.start()  # later calls do nothing
        phases = " · ".join(f"{p} {metrics[f'timing_s/{p}']:.1f}" for p in PHASES if f"timing_s/{p}" in metrics)
        header = (self._progress(step, metrics), Text(f"seconds: {phases}", style="dim"), Text(values))
        self.live.update(Group(*header, self._table(metrics)), refresh=True)

    def show_validation(self, step: int, pass_rates: Mapping[str, list[float]]) -> None:
        self._validations.append((step, pass_rates))
        values = "  ".join(f"{s} {fmean(pass_rates[s]):.3f}" for s in sorted(pass_rates, key=natural_key))
        self._console.print(f"validation at step {step}: accuracy  {values}", soft_wrap=True, markup=False)

    def show_events(self, events: Sequence[Mapping[str, Any]]) -> None:
        """A line each; above the live view where there is one."""
        for event in events:
            word = "notice" if event["kind"] == "notice" else "warning"
            source = "" if event["source"] is None else f"{event['source']}: "
            message = " ".join(event["message"].split())  # a line each, whatever it quotes
            line = Text(f"{word} at step {event['step']}: {source}{message}", style="yellow" * (word == "warning"))
            self._console.print(line, soft_wrap=True)

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
        latest = {s: fmean(v) for s, v in self._validations[-1][1].items()} if self._validations else {}
        for source in self._sources:
            weight = metrics.get(f"curriculum/{source}/weight", math.nan)
            bar = Text("█" * (round(10 * weight) if math.isfinite(weight) else 0), style="cyan")
            draws = (str(int(metrics.get(f"curriculum/{source}/n_prompts", 0))), str(self._totals[source]))
            train = [format_number(metrics.get(f"train/{source}/{key}")) for key in ("reward/mean", "accuracy")]
            table.add_row(Text(source), format_number(weight), bar, *draws, *train, format_number(latest.get(source)))
        return table

    def show_summary(self) -> None:
        """Accuracy of the first and the last validation with standard errors; the change's is over paired prompts."""
        if len(self._validations) < 2:
            return
        (first, before), (last, after) = self._validations[0], self._validations[-1]
        self._console.print(f"test accuracy, sampled, ± standard error over prompts: {last - first} steps apart")
        table = Table("source", box=box.SIMPLE, padding=(0, 1, 0, 0))
        for column in ("before", "after", "change"):
            table.add_column(column, justify="right", no_wrap=True)
        rows = []
        # Prompts can be paired only where the data set stayed the same over a resume.
        paired = [s for s in set(before) & set(after) if len(before[s]) == len(after[s])]
        for source in sorted(paired, key=natural_key):
            pairs = list(zip(before[source], after[source], strict=True))
            columns = ([b for b, _ in pairs], [a for _, a in pairs], [a - b for b, a in pairs])
            rows.append([(fmean(c), stdev(c) / math.sqrt(len(c)) if len(c) > 1 else math.nan) for c in columns])
            table.add_row(source, *_with_errors(rows[-1]))
        if rows:  # unweighted mean over sources; independent errors add in squares
            means = [(fmean(v for v, _ in c), math.hypot(*(e for _, e in c)) / len(c)) for c in zip(*rows, strict=True)]
            table.add_row("mean", *_with_errors(means), style="bold")
        self._console.print(table)


def _with_errors(columns: list[tuple[float, float]]) -> list[str]:
    """Before, after and (signed) change, each as "value ± standard error"."""
    return [f"{value:{sign}.3f} ± {error:.3f}" for sign, (value, error) in zip(("", "", "+"), columns, strict=True)]


def overall_accuracy(sources: list[str], metrics: Mapping[str, float]) -> float:
    """Pass rate over all the rollouts of the step."""
    counts = {s: metrics[f"curriculum/{s}/n_rollouts"] for s in sources if f"train/{s}/accuracy" in metrics}
    passed = sum(count * metrics[f"train/{source}/accuracy"] for source, count in counts.items())
    return passed / sum(counts.values()) if counts else math.nan


def natural_key(name: str) -> list[str | int]:
    """kk_logic_2 before kk_logic_10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def format_number(value: float | None, spec: str = ".3f") -> str:
    return "–" if value is None or not math.isfinite(value) else format(value, spec)

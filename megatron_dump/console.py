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
    ("reward", "critic/score/mean", ".3f"),
    ("accuracy", "train/accuracy", ".3f"),
    ("len", "response_length/mean", ".0f"),
    ("kl", "actor/kl_loss", ".4f"),
    ("grad_norm", "actor/grad_norm", ".3f"),
    ("seconds", "timing_s/step", ".1f"),
)
PLAIN_TABLE_EVERY = 5  # steps between two tables when the output is a file
PLAIN_ROWS = 24  # sources of such a table
TOKENS = "perf/generated_tokens"
LIVE_LINES = 9  # of the live view that are no sources


class Screen:
    """A live view on a terminal; plain lines and tables in a file."""

    def __init__(self, sources: list[str], max_steps: int, max_generated_tokens: int | None = None) -> None:
        self._sources = sorted(sources, key=natural_key)
        self._max_steps, self._max_tokens = max_steps, max_generated_tokens
        plain = {"width": 110, "force_terminal": False, "color_system": None, "highlight": False}
        self._console = Console() if sys.stdout.isatty() else Console(**plain)
        self.live = Live(console=self._console, auto_refresh=False)  # drawn by steps alone: no thread beside forks
        self._seconds: list[float] = []  # of the latest steps, for the ETA
        self._tokens: list[float] = []  # generated in them
        self.restore([], [])

    def restore(self, rows: list[dict[str, Any]], validations: list[dict[str, Any]]) -> None:
        """Totals and validations as the earlier part of the run left them."""
        self._totals, self._spent = dict.fromkeys(self._sources, 0), 0.0
        for row in rows:
            self._add(row)
        self._validations = [(row["step"], row["pass_rates"]) for row in validations]

    def show_step(self, step: int, metrics: Mapping[str, float]) -> None:
        self._add(metrics)
        self._seconds = [*self._seconds[-19:], metrics.get("timing_s/step", math.nan)]
        self._tokens = [*self._tokens[-19:], metrics.get(TOKENS, math.nan)]
        metrics = {**metrics, "train/accuracy": overall_accuracy(self._sources, metrics)}
        values = "  ".join(f"{label} {format_number(metrics.get(key), spec)}" for label, key, spec in HEADLINE)
        phases = " · ".join(f"{p} {metrics[f'timing_s/{p}']:.1f}" for p in PHASES if f"timing_s/{p}" in metrics)
        if not self._console.is_terminal:
            line = f"step {step}/{self._max_steps}  {values}  ETA {self._time_left(step)}"
            self._console.print(line, soft_wrap=True, markup=False)
            if step % PLAIN_TABLE_EVERY == 0 or step >= self._max_steps:
                self._console.print(f"seconds: {phases}", soft_wrap=True, markup=False)
                self._console.print(self._table(metrics, PLAIN_ROWS))
            return
        self.live.start()  # later calls do nothing
        bar = ProgressBar(total=self._max_steps, completed=step, width=40)
        head = Text(f"step {step}/{self._max_steps}", style="bold"), bar, Text(f"ETA {self._time_left(step)}")
        header = Columns(head), Text(f"seconds: {phases}", style="dim"), Text(values)
        rows = max(3, self._console.height - LIVE_LINES)  # a view taller than the terminal would be cut off
        self.live.update(Group(*header, self._table(metrics, rows)), refresh=True)

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

    def _add(self, metrics: Mapping[str, float]) -> None:
        self._spent += metrics.get(TOKENS, 0.0)
        for source in self._sources:
            self._totals[source] += int(metrics.get(f"curriculum/{source}/n_prompts", 0))

    def _time_left(self, step: int) -> str:
        """By the mean of the latest steps; validations and checkpoints come on top."""
        steps = self._max_steps - step
        if self._max_tokens is not None:
            steps = min(steps, max(self._max_tokens - self._spent, 0) / fmean(self._tokens))
        left = steps * fmean(self._seconds)
        return str(datetime.timedelta(seconds=round(left))) if math.isfinite(left) else "–"

    def _table(self, metrics: Mapping[str, float], rows: int) -> Table:
        """A row a source: weight, prompts drawn (now, in all), reward and pass rate in training, validation accuracy.

        What a source that was not drawn cannot have shows as a dash. Of more sources than `rows` those under an alarm
        and the heaviest are shown.
        """
        table = Table("source", box=box.SIMPLE, padding=(0, 1, 0, 0))  # narrow: fits 80 columns
        for title in ("weight", "", "draws", "total", "reward", "pass", "val", "alarm"):
            is_text = title in ("", "alarm")
            table.add_column(title, justify="left" if is_text else "right", no_wrap=True)
        latest = {s: fmean(v) for s, v in self._validations[-1][1].items()} if self._validations else {}
        weights = {s: metrics.get(f"curriculum/{s}/weight", math.nan) for s in self._sources}
        alarms = {s for s in self._sources if metrics.get(f"curriculum/{s}/alarm", 0) > 0}
        shown = self._sources
        if len(shown) > rows:
            by_weight = sorted(shown, key=lambda s: (s not in alarms, -weights[s] if math.isfinite(weights[s]) else 0))
            kept = set(by_weight[: rows - 1])
            shown = [s for s in shown if s in kept]
        for source in shown:
            weight = weights[source]
            bar = Text("█" * (round(10 * weight) if math.isfinite(weight) else 0), style="cyan")
            draws = (str(int(metrics.get(f"curriculum/{source}/n_prompts", 0))), str(self._totals[source]))
            train = [format_number(metrics.get(f"train/{source}/{key}")) for key in ("reward/mean", "accuracy")]
            alarm = Text("ALARM" if source in alarms else "", style="bold red")
            values = (format_number(weight), bar, *draws, *train, format_number(latest.get(source)), alarm)
            table.add_row(Text(source), *values)
        if rest := set(self._sources) - set(shown):
            weight = sum(weights[s] for s in rest if math.isfinite(weights[s]))
            drawn = sum(int(metrics.get(f"curriculum/{s}/n_prompts", 0)) for s in rest)
            total = sum(self._totals[s] for s in rest)
            bar = Text("█" * round(10 * weight), style="cyan")
            table.add_row(f"{len(rest)} others", format_number(weight), bar, str(drawn), str(total), style="dim")
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

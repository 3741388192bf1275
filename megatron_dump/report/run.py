"""What metrics.jsonl and events.jsonl of a run say."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Run:
    """What metrics.jsonl says. S training steps, K sources, V validations."""

    name: str
    steps: list[int]  # [S], increasing
    rows: list[dict[str, Any]]  # [S], the metrics of each step
    sources: list[str]  # [K], trained on or tested, natural order
    validations: list[tuple[int, dict[str, Any]]]  # [V], (step, val/* metrics), increasing
    events: list[dict[str, Any]]  # rows of events.jsonl: step, kind, source (None: the whole run), message

    @property
    def window(self) -> int:
        """Steps in a moving average."""
        return max(1, len(self.steps) // 12)

    def series(self, key: str) -> np.ndarray:
        """float64 [S]; NaN where a step does not have the key."""
        return np.array([np.nan if row.get(key) is None else row[key] for row in self.rows], dtype=np.float64)

    def smooth(self, key: str) -> np.ndarray:
        """float64 [S]: mean of the values known among the last `window` steps."""
        values, kernel = self.series(key), np.ones(self.window)
        known = np.isfinite(values)
        total = np.convolve(np.where(known, values, 0.0), kernel)[: len(values)]
        count = np.convolve(known, kernel)[: len(values)]
        return np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0)

    def tested(self, source: str, validation: int, name: str = "accuracy") -> float:
        """A value of one validation (0: the first, -1: the last); NaN when unknown."""
        value = self.validations[validation][1].get(f"val/{source}/{name}") if self.validations else None
        return np.nan if value is None else value


def natural_sort(names: Iterable[str]) -> list[str]:
    """kk_logic_2 before kk_logic_10."""
    return sorted(set(names), key=lambda name: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", name)])


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a file; a last line that is still being written is left out."""
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def read_run(log_dir: Path) -> Run:
    """Read metrics.jsonl and events.jsonl of a finished or running run."""
    path = log_dir / "metrics.jsonl"
    train: dict[int, dict[str, Any]] = {}
    validations: dict[int, dict[str, Any]] = {}
    for row in read_jsonl(path):
        target = validations if any(key.startswith("val/") for key in row) else train
        target.setdefault(row["step"], {}).update(row)
    if not train:
        raise ValueError(f"{path} has no training step yet: there is nothing to report")
    keys = {key for row in (*train.values(), *validations.values()) for key in row}
    matches = (re.fullmatch(r"(?:curriculum|train|val)/(.+)/(?:weight|accuracy)", key) for key in keys)
    steps = sorted(train)
    sources = natural_sort(match[1] for match in matches if match)
    events_path = path.with_name("events.jsonl")
    events = read_jsonl(events_path) if events_path.exists() else []
    rows = [train[step] for step in steps]
    return Run(log_dir.resolve().name, steps, rows, sources, sorted(validations.items()), events)

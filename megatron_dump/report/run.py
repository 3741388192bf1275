"""What the files of a run's folder say, whatever moment the run ended at."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Run:
    """What metrics.jsonl and the files beside it say. S training steps, K sources, V validations."""

    name: str
    steps: list[int]  # [S], increasing
    rows: list[dict[str, Any]]  # [S], the metrics of each step
    sources: list[str]  # [K], trained on or tested, natural order
    validations: list[tuple[int, dict[str, Any]]]  # [V], (step, val/* metrics), increasing
    events: list[dict[str, Any]]  # rows of events.jsonl: step, kind, source (None: the whole run), message
    samples: list[dict[str, Any]] = field(default_factory=list)  # rows of samples.jsonl
    cut: list[str] = field(default_factory=list)  # files whose last line is cut short

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

    def has(self, key: str) -> bool:
        """Whether any step has a finite value of it; `{}` in the key stands for every source."""
        return any(np.isfinite(self.series(key.format(source))).any() for source in self.sources)

    def tested(self, source: str, validation: int, name: str = "accuracy") -> float:
        """A value of one validation (0: the first, -1: the last); NaN when unknown."""
        value = self.validations[validation][1].get(f"val/{source}/{name}") if self.validations else None
        return np.nan if value is None else value


def natural_sort(names: Iterable[str]) -> list[str]:
    """kk_logic_2 before kk_logic_10."""
    return sorted(set(names), key=lambda name: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", name)])


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a file; a last line that is cut short, or still being written, is left out.

    ValueError, naming the line, for any other that is no JSON object.
    """
    return _read_lines(path)[0]


def _read_lines(path: Path) -> tuple[list[dict[str, Any]], bool]:
    """The objects, and whether the last line was left out. A crash of the machine can pad the file with zero bytes."""
    text = path.read_bytes().rstrip(b"\0").decode("utf-8", errors="replace")
    complete = text.endswith("\n") or not text
    lines = text.splitlines()
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        elif number == len(lines):
            return rows, True
        else:
            raise ValueError(f"{path}, line {number} is no JSON object: repair the file or remove the line")
    return (rows, False) if complete else (rows[:-1], True)


def read_run(log_dir: Path) -> Run:
    """Read metrics.jsonl, events.jsonl and samples.jsonl of a finished, running or killed run."""
    path = log_dir / "metrics.jsonl"
    rows, is_cut = _read_lines(path)
    cut = [path.name] if is_cut else []
    train: dict[int, dict[str, Any]] = {}
    validations: dict[int, dict[str, Any]] = {}
    for row in rows:
        target = validations if any(key.startswith("val/") for key in row) else train
        target.setdefault(row["step"], {}).update(row)
    if not train:
        raise ValueError(f"{path} has no training step yet: there is nothing to report")
    beside: dict[str, list[dict[str, Any]]] = {}
    for name in ("events.jsonl", "samples.jsonl"):
        beside[name], is_cut = _read_lines(path.with_name(name)) if path.with_name(name).exists() else ([], False)
        cut += [name] if is_cut else []
    keys = {key for row in (*train.values(), *validations.values()) for key in row}
    matches = (re.fullmatch(r"(?:curriculum|train|val)/(.+)/(?:weight|accuracy)", key) for key in keys)
    steps = sorted(train)
    return Run(
        log_dir.resolve().name,
        steps,
        [train[step] for step in steps],
        natural_sort(match[1] for match in matches if match),
        sorted(validations.items()),
        beside["events.jsonl"],
        beside["samples.jsonl"],
        cut,
    )

"""The JSON lines that a run keeps, cut back to a step."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# JSON lines, each with its step
FILES = ("metrics.jsonl", "curriculum.jsonl", "samples.jsonl", "validation.jsonl", "events.jsonl")


def parse_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
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


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [row for _, row in parse_lines(path)]


def drop_later(path: Path, step: int | None) -> None:
    """Drop a file's lines written after step `step` was done, atomically.

    A line was written in its `step`, or, for draws made ahead of it, in that of its `at`.
    """
    temporary = path.with_suffix(".jsonl.tmp")
    with temporary.open("w") as file:
        kept = (line for line, row in parse_lines(path) if step is None or row.get("at", row["step"]) <= step)
        file.writelines(line + "\n" for line in kept)
    temporary.replace(path)

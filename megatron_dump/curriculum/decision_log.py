"""The decision log of a run, curriculum.jsonl: what the curriculum drew and what it was told.

The first line is the header: what the curriculum was made of. Then come, as they happened, the draws (a step may have
several rounds), the outcomes that were observed, and, where a run was resumed with another data set or curriculum, a
line "changed": a header again, and the state that was carried over. A line's `step` counts from 1, as in metrics.jsonl;
the `step` inside a draw or its outcomes counts from 0, as everywhere in the curriculum. Their form: codec.py. A draw's
`at`, from 1, is the step that was being trained when it was made: what was `at` a later step than the checkpoint's is
forgotten by a resume.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dump.curriculum.codec import draw_to_json, floats_to_json, outcomes_to_json
from megatron_dump.types import Draw, Outcomes


@dataclasses.dataclass(frozen=True)
class Log:
    """A decision log as it was read."""

    header: dict[str, Any]
    events: list[dict[str, Any]]  # draws, observations and changes in their order, as JSON
    truncated: bool = False  # the last line was cut short and is left out

    @property
    def headers(self) -> list[dict[str, Any]]:
        """The header, and those of changed resumes."""
        return [self.header, *(event for event in self.events if event["event"] == "changed")]

    @property
    def sources(self) -> list[str]:
        """[K], sorted: all that the run ever had."""
        return sorted({name for header in self.headers for name in header["sources"]})

    @property
    def policies(self) -> list[str]:
        """The names of the source policies that drew, in order; one, but for changed resumes."""
        return list(dict.fromkeys(header["config"]["sources"]["name"] for header in self.headers))


def draw_event(draw: Draw, rejected: np.ndarray | None, scores: Mapping[str, np.ndarray], at: int) -> dict[str, Any]:
    """The line of a draw. rejected: the groups that a refill replaces; scores: float64 [K] each, of the policy.

    at: the step, from 0, that was being trained meanwhile: the draw's own, unless it was drawn ahead.
    """
    return {
        "step": draw.step + 1,
        "at": at + 1,
        "event": "draw",
        "rejected": None if rejected is None else rejected.tolist(),
        "draw": draw_to_json(draw),
        "scores": {name: floats_to_json(values) for name, values in scores.items()},
    }


def observe_event(outcomes: Outcomes) -> dict[str, Any]:
    """The line of outcomes that were observed."""
    return {"step": outcomes.step + 1, "event": "observe", "outcomes": outcomes_to_json(outcomes)}


def read_log(path: str | Path) -> Log:
    """Read a log; a last line cut short by a crash is left out. ValueError names the line that is wrong."""
    events: list[dict[str, Any]] = []
    truncated = False
    with Path(path).open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                event = json.loads(line)
            except json.JSONDecodeError as error:
                if next(lines, None) is not None:
                    raise ValueError(f"{path}, line {number} is not JSON: repair it or choose another log") from error
                truncated = True
                break
            if not isinstance(event, dict) or "event" not in event or (event["event"] == "header") != (number == 1):
                if events and event == events[0]:
                    continue  # a resumed run says once more what it is made of
                raise ValueError(_not_in_place(path, number, event))
            if (kind := event["event"]) not in ("header", "draw", "observe", "changed"):
                raise ValueError(f"{path}, line {number}: event {kind!r} is none of header, draw, observe, changed")
            events.append(event)
    if not events:
        raise ValueError(f"{path} is empty: a decision log starts with a header line")
    return Log(events[0], events[1:], truncated)


def _not_in_place(path: str | Path, number: int, event: Any) -> str:
    if number == 1:
        return f"{path} has no header line: it is no decision log, or of a version before replay"
    if isinstance(event, dict) and "event" in event:
        return (
            f"{path}, line {number}: another header, so this is another run: copy the lines of each to a file of their "
            "own"
        )
    return f"{path}, line {number}: {event!r} is no event"

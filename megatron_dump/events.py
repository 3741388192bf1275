"""What a person should hear about while a run goes on: alarms, dropped rollouts, short batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megatron_dump.types import Outcomes

Event = dict[str, Any]  # step (1-based), kind, source or None, message


def notices(step: int, messages: Sequence[str]) -> list[Event]:
    return [_event(step, "notice", None, message) for message in messages]


def dropped(step: int, outcomes: Outcomes, sources: Sequence[str]) -> list[Event]:
    """Rollouts whose reward is NaN, infinite or too large to have an advantage, by source."""
    missing = ~np.isfinite(outcomes.advantages)
    counts = np.bincount(outcomes.source_ids[missing], minlength=len(sources))
    return [
        _event(
            step,
            "dropped",
            sources[k],
            f"{counts[k]} rollouts without a finite reward: dropped, nothing learns "
            "from them; look at the source's reward function",
        )
        for k in map(int, np.flatnonzero(counts))
    ]


def reward_faults(step: int, faults: Mapping[str, tuple[int, int]]) -> list[Event]:
    """Responses that could not be judged: source -> (time-outs, crashes)."""
    return [
        _event(
            step,
            "reward_fault",
            source,
            f"{timeouts} responses took the reward function too long, {crashes} crashed it (model.data.reward_workers)",
        )
        for source, (timeouts, crashes) in faults.items()
    ]


def short_batch(
    step: int, outcomes: Outcomes, sources: Sequence[str], asked: int, rejected: np.ndarray, refills: int
) -> list[Event]:
    """Refills did not make up for the groups `rejected` (ids): fewer than the `asked` rollouts are trained on."""
    kept = int(outcomes.kept.sum())
    if kept >= asked or not len(rejected):
        return []
    lost = np.bincount(outcomes.source_ids[np.isin(outcomes.group_ids, rejected)], minlength=len(sources))
    worst = ", ".join(f"{sources[k]} {lost[k]}" for k in np.argsort(-lost, kind="stable")[:3] if lost[k])
    message = f"trains on {kept} of {asked} rollouts after {refills} refills; most rejected: {worst}"
    return [_event(step, "short_batch", None, message)]


class AlarmWatch:
    """Turns the alarms that stand into events when one is raised or ends."""

    def __init__(self) -> None:
        self._standing: set[str] = set()

    def changes(self, step: int, alarms: Mapping[str, str]) -> list[Event]:
        raised = [_event(step, "alarm", s, message) for s, message in alarms.items() if s not in self._standing]
        ended = [_event(step, "notice", s, "the alarm has ended") for s in sorted(self._standing - alarms.keys())]
        self._standing = set(alarms)
        return raised + ended


def _event(step: int, kind: str, source: str | None, message: str) -> Event:
    return {"step": step, "kind": kind, "source": source, "message": message}

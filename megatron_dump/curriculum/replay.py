"""The replay of a run's decision log without a model: is it exact, and what would another source policy have done?"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from megatron_dump.curriculum.codec import draw_from_json, outcomes_from_json
from megatron_dump.curriculum.curriculum import Curriculum
from megatron_dump.curriculum.decision_log import Log, read_log
from megatron_dump.curriculum.sources import SourcePolicy, SourceSetting, make_source_policy
from megatron_dump.curriculum.state import by_name

__all__ = ["Log", "ReplayError", "Reweighed", "read_log", "rebuild", "reweigh", "verify"]

_NEEDED = (  # in the header
    "sources",
    "rows",
    "prompts_per_step",
    "samples_per_prompt",
    "seed",
    "config",
    "fingerprint",
    "max_steps",
    "max_staleness",
)


class ReplayError(ValueError):
    """A log that its own curriculum does not reproduce; the first difference."""

    def __init__(self, step: int, field: str, message: str):
        super().__init__(f"step {step}: {field} {message}")
        self.step, self.field = step, field  # as in the log, from 1; e.g. draw.prompt_ids[3]


@dataclasses.dataclass(frozen=True)
class Reweighed:
    """Two source policies on the same feedback. T steps, K sources in the log's order."""

    steps: np.ndarray  # int64 [T], from 1
    logged: np.ndarray  # float64 [T, K], the weights that the run drew from; 0 where it did not have the source
    weights: np.ndarray  # float64 [T, K], what the other policy would have drawn from
    scores: dict[str, np.ndarray]  # name -> float64 [T, K], the other's metrics before each draw; NaN likewise

    @property
    def distance(self) -> np.ndarray:
        """float64 [T], total variation: the share of a step's prompts whose source the two would choose differently."""
        return np.abs(self.logged - self.weights).sum(axis=1) / 2.0


def rebuild(header: Mapping[str, Any]) -> Curriculum:
    """A fresh curriculum as the header describes it. ValueError for a header of another version."""
    if lacking := [key for key in _NEEDED if key not in header]:
        raise ValueError(f"the log's header has no {lacking[0]!r}: it is of another version of the curriculum")
    names = header["sources"]
    rows = list(itertools.chain.from_iterable(itertools.repeat(names[k], run) for k, run in header["rows"]))
    curriculum = Curriculum(
        rows,
        header["prompts_per_step"],
        header["samples_per_prompt"],
        header["seed"],
        header["config"],
        header["fingerprint"],
        max_steps=header["max_steps"],
        max_staleness=header["max_staleness"],
    )
    here = curriculum.header()
    _compare(header.get("step", 0), {key: header.get(key) for key in here}, here, "header")
    return curriculum


def verify(log: Log, on_progress: Callable[[int, int], None] = lambda done, total: None) -> int:
    """Replay the log on a fresh curriculum: every draw and score must come out the same, bit for bit.

    Returns the number of steps with a training draw; ReplayError names the first difference. on_progress: is given how
    many of the log's events are done, and of how many.
    """
    curriculum = rebuild(log.header)
    steps: set[int] = set()
    for done, event in enumerate(log.events):
        on_progress(done, len(log.events))
        emitted: list[dict[str, Any]] = []
        curriculum.on_event = emitted.append
        try:
            curriculum = _repeat(curriculum, event)
        except ReplayError:
            raise
        except (LookupError, TypeError, RuntimeError, ValueError) as error:
            raise ReplayError(event["step"], event["event"], f"cannot be replayed: {error}") from error
        if event["event"] == "draw":
            again = [e for e in emitted if e["event"] == "draw"]
            if len(again) != 1:
                raise ReplayError(event["step"], "draw", f"is logged once, but replayed {len(again)} times")
            _compare(event["step"], event, again[0])
            if event["draw"]["train"]:
                steps.add(event["step"])
    return len(steps)


def _repeat(curriculum: Curriculum, event: Mapping[str, Any]) -> Curriculum:
    """Do what the event says; the curriculum to go on with."""
    if event["event"] == "changed":
        changed = rebuild(event)
        changed.load_state_dict(json.loads(_text(curriculum.state_dict())), allow_changes=True)
        _compare(event["step"], event["curriculum"], changed.state_dict(), "curriculum")
        return changed
    if event["event"] == "observe":
        curriculum.observe(outcomes_from_json(event["outcomes"]))
    elif event["rejected"] is None:
        curriculum.draw(event["draw"]["step"])
    else:
        curriculum.refill(event["draw"]["step"], np.array(event["rejected"], np.int64))
    return curriculum


def _compare(step: int, logged: Any, replayed: Any, field: str = "") -> None:
    """Raise ReplayError at the first value that differs; as JSON, where equal text means equal bits."""
    if _text(logged) == _text(replayed):
        return
    pairs: list[tuple[str, Any, Any]] = []
    if isinstance(logged, Mapping) and isinstance(replayed, Mapping):
        dot = f"{field}." if field else ""
        pairs = [(f"{dot}{key}", logged.get(key), replayed.get(key)) for key in {**logged, **replayed}]
    elif isinstance(logged, list) and isinstance(replayed, list) and len(logged) == len(replayed):
        pairs = [(f"{field}[{i}]", a, b) for i, (a, b) in enumerate(zip(logged, replayed, strict=True))]
    for path, a, b in pairs:
        _compare(step, a, b, path)
    raise ReplayError(step, field, f"differs: the log has {_short(logged)}, the replay {_short(replayed)}")


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def reweigh(
    log: Log, sources: Mapping[str, Any], on_progress: Callable[[int, int], None] = lambda done, total: None
) -> Reweighed:
    """What another source policy would have weighed at every step, given the log's feedback.

    `sources`: a `trainer.grpo.curriculum.sources` block. This is off-policy: the feedback is that of the prompts which
    the run drew, from the model which it trained. Under the other policy both would have been others, so this compares
    decisions, not results. ValueError for an unknown policy or option, and for a log without a draw. on_progress: as
    `verify`'s.
    """
    header, policy = log.header, _policy(sources, log.header)
    names, steps, logged, weights, scores = log.sources, [], [], [], []
    for done, event in enumerate(log.events):
        on_progress(done, len(log.events))
        if event["event"] == "changed":
            header, policy = event, _carried(policy, header, _policy(sources, event), event)
            continue
        if event["event"] == "observe":
            policy.observe(outcomes_from_json(event["outcomes"]))
            continue
        draw = draw_from_json(event["draw"])
        if draw.train and event["rejected"] is None:  # the step's own round; pre-rollouts and refills only count
            steps.append(event["step"])
            logged.append(_spread(draw.weights, header, names, 0.0))
            weights.append(_spread(policy.weights(draw.step), header, names, 0.0))
            scores.append({name: _spread(values, header, names, np.nan) for name, values in policy.metrics().items()})
        policy.drawn(draw.source_ids, draw.rollouts)
    if not steps:
        raise ValueError("the log has no training draw yet: there is nothing to weigh")
    columns = {name: np.array([score[name] for score in scores]) for name in scores[0]}
    return Reweighed(np.array(steps, np.int64), np.array(logged), np.array(weights), columns)


def _policy(sources: Mapping[str, Any], header: Mapping[str, Any]) -> SourcePolicy:
    sizes = np.zeros(len(header["sources"]), np.int64)
    for source, run in header["rows"]:
        sizes[source] += run
    setting = SourceSetting(tuple(header["sources"]), tuple(sizes.tolist()), header["max_steps"])
    return make_source_policy(sources, setting)


def _carried(
    old: SourcePolicy, before: Mapping[str, Any], fresh: SourcePolicy, after: Mapping[str, Any]
) -> SourcePolicy:
    """`fresh` with what `old` knows of the sources that are still there, as a changed resume does it."""
    state, _ = by_name(old.state_dict(), fresh.state_dict(), before["sources"], after["sources"])
    fresh.load_state_dict(state)
    return fresh


def _spread(values: np.ndarray, header: Mapping[str, Any], names: list[str], missing: float) -> np.ndarray:
    """[sources of the header] -> float64 [K] by name."""
    spread = np.full(len(names), missing)
    spread[np.searchsorted(np.array(names), np.array(header["sources"]))] = values
    return spread

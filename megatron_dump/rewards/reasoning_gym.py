"""The reward of reasoning-gym's tasks (arXiv:2505.24760), on the rows of kk.procedural: the library itself judges."""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any

from megatron_dump.rewards import scale
from megatron_dump.rewards.format import BadFormat, TagFormat
from megatron_dump.rewards.guarded_eval import only_mathematics
from megatron_dump.rewards.registry import GroundTruthError
from megatron_dump.types import Score

_FIXED = {"seed": 0, "size": 1}  # a data set judges any entry; one of its own is enough


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReasoningGymReward(TagFormat):
    """Judges an answer by its task's own `score_answer`, from 0 to 1; only 1 is right.

    mode: one of `scale.MODES`. partial: a wrong answer that the library scores above 0 earns that share of the way from
    wrong to right; false: nothing. In "binary" a wrong answer is 0 all the same.

    Components: format, answer, accuracy (1 right, else 0) and score, the library's. The library's laxness is this
    reward's: coin_flip of version 0.1.25 takes "0" for any probability.
    """

    mode: str = "dump"
    partial: bool = True

    def __post_init__(self) -> None:
        """ValueError for options that cannot be used, and when the library is not installed."""
        super().__post_init__()
        scale.check_mode(self.mode)
        if not isinstance(self.partial, bool):
            raise ValueError(f"partial: {self.partial!r} must be true or false")
        _library()

    def __call__(self, text: str, ground_truth: str) -> Score:
        """Judge a completion. GroundTruthError when `ground_truth` is not a row's of kk.procedural.

        ground_truth: JSON text {"task": name, "config": the task's options, "entry": the library's entry}. The answer
        is bounded, the library's time is not: some tasks do algebra on it. RewardPool keeps a limit.
        """
        judge, entry = _read_truth(ground_truth)
        try:
            answer = self.answer_of(text).strip()
        except BadFormat as error:
            return scale.score(self.mode, scale.BAD_FORMAT, str(error), score=0.0)
        if len(answer) > _longest(entry):
            return scale.score(self.mode, scale.UNREADABLE, "answer too long", score=0.0)
        try:
            with only_mathematics():
                score = float(judge.score_answer(answer, entry))
        except MemoryError:
            raise
        except Exception as error:  # noqa: BLE001  scorers raise whatever a text makes them raise
            detail = f"scorer raised {type(error).__name__}: {error!a}"
            return scale.score(self.mode, scale.WRONG, detail, said=answer, score=0.0)
        if not 0.0 <= score <= 1.0:
            return scale.score(self.mode, scale.WRONG, f"scorer said {score}", said=answer, score=0.0)
        if score == 1.0:
            return scale.score(self.mode, scale.RIGHT, said=answer, score=1.0)
        credit, detail = score if self.partial else 0.0, f"{score:.3g} of 1" if score else ""
        return scale.score(self.mode, scale.WRONG, detail, credit=credit, said=answer, score=score)


def _library() -> Any:
    try:
        import reasoning_gym
    except ImportError as error:
        raise ValueError(f"name: reasoning-gym cannot be imported ({error}); pip install reasoning-gym") from error
    return reasoning_gym


def _longest(entry: dict[str, Any]) -> int:
    """Characters that an answer may have."""
    return 1024 + 8 * max(len(entry["question"]), len(str(entry["answer"])))


def _read_truth(ground_truth: str) -> tuple[Any, dict[str, Any]]:
    """(the data set that judges, the entry: a new one each time, for scorers may change it)."""
    try:
        truth = json.loads(ground_truth)
        task, config, entry = truth["task"], truth["config"], truth["entry"]
        complete = isinstance(entry["question"], str) and isinstance(entry["metadata"], dict) and "answer" in entry
        if not (isinstance(task, str) and isinstance(config, dict) and complete):
            raise TypeError
        options = json.dumps(config, sort_keys=True)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise GroundTruthError(
            "ground truth is not JSON with task, config and entry {question, answer, metadata} as kk.procedural writes "
            f"it: {ground_truth[:200]!r}"
        ) from error
    return _data_set(task, options), entry


@functools.lru_cache(maxsize=1024)  # a task's tables are read once
def _data_set(task: str, options: str) -> Any:
    try:
        return _library().create_dataset(task, **{**json.loads(options), **_FIXED})
    except (AssertionError, TypeError, ValueError) as error:
        raise GroundTruthError(f"reasoning-gym has no task {task!r} with options {options}: {error}") from error

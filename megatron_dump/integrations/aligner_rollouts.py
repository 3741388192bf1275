"""Rollouts as NeMo-Aligner's trainers gather them: flat, in the order of ranks. Which prompt, and which advantage?"""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any

import numpy as np


def prompts_of(tokens: Any, lengths: Any) -> list[tuple[int, ...]]:
    """The prompt of every rollout: tokens [N, T] of prompt and response, lengths [N] of the prompts."""
    rows = zip(tokens.tolist(), lengths.reshape(-1).tolist(), strict=True)
    return [tuple(row[: int(length)]) for row, length in rows]


def same_prompts(prompts: Sequence[Any]) -> np.ndarray:
    """int64 [N]: equal numbers for equal prompts."""
    numbers: dict[Any, int] = {}
    return np.array([numbers.setdefault(prompt, len(numbers)) for prompt in prompts], np.int64)


def order_of(asked: Sequence[Any], came: Sequence[Any], group_size: int) -> np.ndarray:
    """int64 [P * G]: places in `came` of the asked prompts' rollouts, prompt by prompt.

    A prompt that was asked for twice gets its rollouts in two groups, in the order they came. ValueError unless every
    prompt has group_size rollouts for each time it was asked for, and there are no others.
    """
    places: dict[Any, collections.deque[int]] = collections.defaultdict(collections.deque)
    for place, prompt in enumerate(came):
        places[prompt].append(place)
    expected = collections.Counter(asked)
    wrong = [p for p in places | expected if len(places.get(p, ())) != group_size * expected[p]]
    if wrong:
        raise ValueError(
            f"{len(came)} rollouts do not answer the {len(asked)} prompts of the draw, {group_size} each: one was "
            f"asked for {expected[wrong[0]]} times and has {len(places.get(wrong[0], ()))} rollouts"
        )
    return np.array([places[prompt].popleft() for prompt in asked for _ in range(group_size)], np.int64)


def ended_advantages(
    rewards: np.ndarray, ended: np.ndarray, groups: np.ndarray, leave_one_out: bool, normalize: bool
) -> np.ndarray:
    """float64 [N]: rewards against their group's rollouts that ended, as NeMo-Aligner's losses take them.

    rewards float64 [N]; ended bool [N]; groups int64 [N] in 0 .. P-1. The baseline is the mean over the group's ended
    rollouts, without the rollout's own where `leave_one_out`; `normalize` divides by the square root of their mean
    square minus the baseline's square, where that is positive (calculate_baseline_and_std_per_prompt). 0 for a rollout
    that was cut off, whose tokens the losses leave out, and in groups of which at most one ended.
    """
    used = np.where(ended, rewards, 0.0)
    count = np.bincount(groups, ended)[groups]
    others = np.maximum(count - leave_one_out, 1)
    own = used if leave_one_out else np.zeros_like(used)
    baseline = (np.bincount(groups, used)[groups] - own) / others
    advantages = np.where(ended & (count > 1), rewards - baseline, 0.0)
    if normalize:
        variance = (np.bincount(groups, used**2)[groups] - own**2) / others - baseline**2
        std = np.sqrt(np.maximum(variance, 0.0))
        np.divide(advantages, std, out=advantages, where=std > 0)
    return advantages

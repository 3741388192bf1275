"""Reward functions: they judge a completion's text against the row's ground truth, and nothing else."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from typing import Protocol

from megatron_dump.rewards.kk import kk_reward
from megatron_dump.types import Score


class RewardFn(Protocol):
    def __call__(self, text: str, ground_truth: str) -> Score:
        """`text`: the completion without prompt and stop token; `ground_truth`: the row's reward_model.ground_truth.

        Never raises because of `text`; ValueError when the ground truth itself cannot be read.
        """
        ...


_REWARDS: dict[str, RewardFn] = {"kk": kk_reward}


def register_reward(name: str, function: RewardFn) -> None:
    """Make a reward function known by name. ValueError when the name is taken."""
    if name in _REWARDS:
        raise ValueError(f"reward function {name!r} exists already; choose another name")
    _REWARDS[name] = function


def reward_fn(name: str) -> RewardFn:
    """The reward function of that name; ValueError names the known ones."""
    if name not in _REWARDS:
        raise ValueError(f"unknown reward function {name!r}; known: {', '.join(sorted(_REWARDS))}")
    return _REWARDS[name]


def reward_for_source(source: str, mapping: Mapping[str, str]) -> RewardFn:
    """The reward function for a data source, by a mapping of source patterns to names, e.g. {"kk_logic_*": "kk"}.

    A key that equals the source wins; otherwise the first matching pattern (shell wildcards) in the mapping's order.
    """
    for pattern in [source] if source in mapping else mapping:
        if fnmatch.fnmatchcase(source, pattern):
            return reward_fn(mapping[pattern])
    raise ValueError(f"no reward function for source {source!r}; patterns: {', '.join(mapping) or 'none'}")

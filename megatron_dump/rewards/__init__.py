"""Reward functions: they judge a completion's text against the row's ground truth, and nothing else.

Light on purpose: the reward processes import this package, and neither torch nor a configuration library comes along.
"""

from megatron_dump.rewards.registry import (
    GroundTruthError,
    RewardFn,
    register_reward,
    reward_fn,
    reward_for_source,
    reward_functions,
)

__all__ = [
    "GroundTruthError",
    "RewardFn",
    "register_reward",
    "reward_fn",
    "reward_for_source",
    "reward_functions",
]

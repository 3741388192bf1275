"""From rewards to advantages, and what each token of a rollout counts in the loss. Pure functions."""

from __future__ import annotations

import numpy as np
from torch import Tensor

ADVANTAGE_ESTIMATORS = ("grpo", "rloo")  # verl's names (algorithm.adv_estimator)
LOSS_AGG_MODES = ("token-mean", "seq-mean-token-mean", "prompt-mean", "seq-mean-token-sum-norm")


def group_advantages(
    rewards_N: Tensor, groups_N: Tensor, normalize: bool = True, eps: float = 1e-6, estimator: str = "grpo"
) -> Tensor:
    """[N]: rewards against the baseline of their own group; groups may differ in size.

    rewards float [N]; groups int64 [N], any labels.

    grpo    r - mean of the group (DeepSeekMath, 2402.03300, section 4.1.2)
    rloo    r - mean of the group's other rollouts, which is n / (n - 1) (r - mean of the group): the leave-one-out
            baseline of RLOO (2402.14740, section 2, "REINFORCE Leave-One-Out")

    `normalize` divides by std + eps of the group, std with ddof 1, as GRPO does. Without it grpo is Dr. GRPO
    (2503.20783, section 3.2) and rloo the RLOO of the paper; rloo with it is what NeMo-RL's
    `use_leave_one_out_baseline` and `normalize_rewards` mean together, up to the std (theirs leaves one out as well).
    A group of one gets 0: it says nothing about its own baseline. ValueError for an unknown estimator.
    """
    if estimator not in ADVANTAGE_ESTIMATORS:
        raise ValueError(f"advantage_estimator {estimator!r} is unknown; known: {', '.join(ADVANTAGE_ESTIMATORS)}")
    labels, index = groups_N.unique(return_inverse=True)
    zeros = rewards_N.new_zeros(len(labels))
    count = zeros.index_add(0, index, rewards_N.new_ones(len(rewards_N)))
    others = (count - 1).clamp(min=1)
    centred = rewards_N - (zeros.index_add(0, index, rewards_N) / count)[index]
    advantages = centred if estimator == "grpo" else centred * (count / others)[index]
    if not normalize:
        return advantages
    variance = zeros.index_add(0, index, centred**2) / others
    return advantages / (variance.sqrt()[index] + eps)


def loss_weights(
    mode: str, groups_N: np.ndarray, lengths_N: np.ndarray, group_sizes_N: np.ndarray, max_length: int
) -> np.ndarray:
    """float64 [N]: how much each token of a rollout counts in an update's loss, relative to token-mean.

    groups and lengths (tokens) int64 [N] are of the update's rollouts, group_sizes [N] of their groups in the whole
    step; max_length is the most tokens that a completion may have. Every mode divides by the update's number of
    tokens, so the weights average to 1 over tokens, except in the last mode, whose divisor does not know the lengths.
    An empty rollout counts nowhere.

    token-mean               1: every token alike (DAPO, 2503.14476, eq. 12)
    seq-mean-token-mean      every rollout alike, its tokens sharing (GRPO, 2402.03300, eq. 3)
    prompt-mean              every prompt alike, its rollouts sharing: the 1/n_i of CurES (2510.01037, eq. 16), which
                             matters when groups differ in size
    seq-mean-token-sum-norm  the mean over rollouts of token sums divided by the constant max_length (Dr. GRPO,
                             2503.20783, section 3.2; verl's name, its loss_scale_factor being max_length)

    ValueError for an unknown mode.
    """
    if mode not in LOSS_AGG_MODES:
        raise ValueError(f"loss_agg_mode {mode!r} is unknown; known: {', '.join(LOSS_AGG_MODES)}")
    if mode == "token-mean":
        return np.ones(len(groups_N))
    counts = lengths_N > 0
    if mode == "seq-mean-token-sum-norm":
        return counts * (lengths_N.sum() / (max(counts.sum(), 1) * max_length))
    shares = counts * (np.ones(len(groups_N)) if mode == "seq-mean-token-mean" else 1.0 / group_sizes_N)
    return shares / (shares.sum() or 1.0) * lengths_N.sum() / np.maximum(lengths_N, 1)

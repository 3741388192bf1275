"""The mathematics of GRPO: advantages, policy loss, KL. Tensors in, tensors out."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

LOSS_AGG_MODES = ("token-mean", "seq-mean-token-mean", "prompt-mean")


def group_advantages(rewards_N: Tensor, groups_N: Tensor, normalize: bool = True, eps: float = 1e-6) -> Tensor:
    """A = (r - mean) / (std + eps) inside each group, std with ddof 1 (DeepSeekMath, 2402.03300, section 4.1.2).

    rewards float [N]; groups int64 [N], any labels. `normalize=False` leaves the std out (Dr. GRPO, 2503.20783).
    A group of one gets 0: it says nothing about its own baseline.
    """
    labels, index = groups_N.unique(return_inverse=True)
    zeros = rewards_N.new_zeros(len(labels))
    count = zeros.index_add(0, index, torch.ones_like(rewards_N))
    centred = rewards_N - (zeros.index_add(0, index, rewards_N) / count)[index]
    if not normalize:
        return centred
    variance = zeros.index_add(0, index, centred**2) / (count - 1).clamp(min=1)
    return centred / (variance.sqrt()[index] + eps)


def loss_weights(mode: str, groups_N: np.ndarray, lengths_N: np.ndarray, group_sizes_N: np.ndarray) -> np.ndarray:
    """float64 [N]: how much each token of a rollout counts in an update's loss, relative to token-mean.

    groups and lengths (tokens) int64 [N] are of the update's rollouts, group_sizes [N] of their groups in the whole
    step. The weights average to 1 over tokens, so that every mode divides by the update's number of tokens.

    token-mean            1: every token alike (DAPO, 2503.14476, eq. 12)
    seq-mean-token-mean   every rollout alike, its tokens sharing (GRPO, 2402.03300, eq. 3)
    prompt-mean           every prompt alike, its rollouts sharing: the 1/n_i of CurES (2510.01037, eq. 16), which
                          matters when groups differ in size
    """
    if mode not in LOSS_AGG_MODES:
        raise ValueError(f"loss_agg_mode {mode!r} is unknown; known: {', '.join(LOSS_AGG_MODES)}")
    if mode == "token-mean":
        return np.ones(len(groups_N))
    shares = np.ones(len(groups_N)) if mode == "seq-mean-token-mean" else 1.0 / group_sizes_N
    return shares / shares.sum() * lengths_N.sum() / lengths_N


def k3_kl(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Schulman's k3 estimate of KL(policy || reference) at each token: exp(d) - d - 1 with d = ref - policy."""
    difference = ref_logprobs - logprobs
    return difference.exp() - difference - 1


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    denominator: float | Tensor,
    ratio_eps_low: float = 0.2,
    ratio_eps_high: float = 0.2,
    ref_logprobs: Tensor | None = None,
    kl_penalty: float = 0.0,
    weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped surrogate plus KL penalty, summed over this micro-batch's tokens and divided by `denominator`.

    logprobs, old_logprobs, ref_logprobs, mask [B, T]; advantages, weights (of `loss_weights`; None: 1) [B]. With the
    number of sampled tokens of the whole global batch as denominator, the micro-batch losses add up to its token mean
    (DAPO, 2503.14476, eq. 12), however it is split. The clipped objective is PPO's (1707.06347, eq. 7); GRPO adds
    the KL term (2402.03300, eq. 3).
    Returns the loss and detached sums over tokens, to be divided by the same denominator.
    """
    # Tokens outside the mask may have any probability: an infinite ratio there would make 0 × inf = NaN of the loss.
    outside = mask == 0
    logprobs, old_logprobs = logprobs.masked_fill(outside, 0.0), old_logprobs.masked_fill(outside, 0.0)
    ratio = (logprobs - old_logprobs).exp()
    clipped = ratio.clamp(1 - ratio_eps_low, 1 + ratio_eps_high)
    advantages = advantages[:, None]
    weighted = mask if weights is None else mask * weights[:, None]
    surrogate, surrogate_clipped = ratio * advantages, clipped * advantages
    pg_loss = -(torch.minimum(surrogate, surrogate_clipped) * weighted).sum()
    loss = pg_loss
    metrics = {
        "actor/pg_loss": pg_loss.detach(),
        "actor/pg_clipfrac": ((surrogate_clipped < surrogate) * mask).sum().detach(),
    }
    if ref_logprobs is not None:
        kl = (k3_kl(logprobs, ref_logprobs.masked_fill(outside, 0.0)) * weighted).sum()
        loss = loss + kl_penalty * kl
        metrics["actor/kl_loss"] = kl.detach()
    metrics["actor/loss"] = loss.detach()
    return loss / denominator, metrics

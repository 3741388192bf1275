"""Estimates of KL(policy || reference) from the log-probabilities of sampled tokens. Pure functions."""

from __future__ import annotations

from torch import Tensor

KL_PENALTY_TYPES = ("k1", "k2", "k3")  # Schulman's names, which verl (kl_loss_type) and NeMo-RL use too
LOG_RATIO_MAX = 20.0  # e^20 = 4.9e8; beyond it exp would overflow and its gradient become 0 × inf = NaN


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: str = "k3") -> Tensor:
    """An estimate at each token, in nats; any shape. With d = ref_logprobs - logprobs:

    k1  -d             unbiased, of either sign. As a loss it has the gradient 0 in expectation: use it in the reward
    k2  d² / 2         biased in value, but its gradient is an unbiased one of the KL
    k3  e^d - d - 1    unbiased, never negative (GRPO, 2402.03300, eq. 4)

    All of J. Schulman, "Approximating KL Divergence" (2020). d is cut at LOG_RATIO_MAX inside k3: a token that the
    reference finds e^20 times as likely has no gradient there. ValueError for an unknown kind.
    """
    difference = ref_logprobs - logprobs
    if kind == "k1":
        return -difference
    if kind == "k2":
        return difference.square() / 2
    if kind == "k3":
        difference = difference.clamp(max=LOG_RATIO_MAX)
        return difference.exp() - difference - 1
    raise ValueError(f"kl_penalty_type {kind!r} is unknown; known: {', '.join(KL_PENALTY_TYPES)}")

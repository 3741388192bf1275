"""The losses of the GRPO family. Tensors in, tensors out; advantages.py and kl.py hold the rest of the mathematics.

A loss sees whole rows [B, T], so that quantities of a sequence are known, and divides by a denominator of the whole
global batch, so that micro-batches and ranks add up to the same loss however the rows are split over them.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor, maximum, minimum

from megatron_dump.advantages import ADVANTAGE_ESTIMATORS, LOSS_AGG_MODES, group_advantages, loss_weights
from megatron_dump.kl import KL_PENALTY_TYPES, LOG_RATIO_MAX, kl_estimate

__all__ = [
    "ADVANTAGE_ESTIMATORS",
    "KL_PENALTY_TYPES",
    "LOSS_AGG_MODES",
    "LOSS_MODES",
    "LossOptions",
    "group_advantages",
    "kl_estimate",
    "loss_weights",
    "policy_loss",
]

LOSS_MODES = ("vanilla", "gspo", "cispo")  # verl's names (policy_loss.loss_mode)


@dataclasses.dataclass(frozen=True)
class LossOptions:
    """What `policy_loss` computes. ValueError, naming the field, for what has no meaning."""

    loss_mode: str = "vanilla"  # of LOSS_MODES
    ratio_eps_low: float = 0.2  # ratios are clipped to [1 - low, 1 + high]; low ≠ high: DAPO's clip-higher
    ratio_eps_high: float = 0.2
    ratio_clip_c: float | None = None  # dual clip: a negative advantage counts at most c times; None: no such bound
    kl_penalty: float = 0.0  # weight of the KL to the reference in the loss; 0: no KL term
    kl_penalty_type: str = "k3"  # of KL_PENALTY_TYPES
    entropy_bonus: float = 0.0  # weight of the policy's entropy, in nats, subtracted from the loss
    importance_sampling_cap: float | None = None  # of the trainer / generator ratio; None: no correction

    def __post_init__(self) -> None:
        for name, known in (("loss_mode", LOSS_MODES), ("kl_penalty_type", KL_PENALTY_TYPES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r} is unknown; known: {', '.join(known)}")
        for name, right, remedy in (
            ("ratio_eps_low", 0 <= self.ratio_eps_low <= 1, "must be in [0, 1]"),
            ("ratio_eps_high", self.ratio_eps_high >= 0, "must not be negative"),
            ("kl_penalty", self.kl_penalty >= 0, "must not be negative"),
            ("entropy_bonus", self.entropy_bonus >= 0, "must not be negative"),
            ("ratio_clip_c", self.ratio_clip_c is None or self.ratio_clip_c > 1, "must be above 1"),
            ("ratio_clip_c", self.ratio_clip_c is None or self.loss_mode != "cispo", "cispo knows no dual clip"),
            (
                "importance_sampling_cap",
                self.importance_sampling_cap is None or self.importance_sampling_cap > 0,
                "must be above 0",
            ),
        ):
            if not right:
                raise ValueError(f"{name}={getattr(self, name)}: {remedy}")

    @property
    def metrics(self) -> tuple[str, ...]:
        """The keys of what `policy_loss` reports; verl's, where it has one."""
        return (
            "actor/pg_loss",
            "actor/loss",
            "actor/pg_clipfrac",
            *(("actor/pg_clipfrac_lower",) if self.ratio_clip_c is not None else ()),
            *(("actor/kl_loss",) if self.kl_penalty > 0 else ()),
            *(_CORRECTION if self.importance_sampling_cap is not None else ()),
        )


_CORRECTION = ("rollout_corr/rollout_is_mean", "rollout_corr/rollout_is_ratio_fraction_high")


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    denominator: float | Tensor,
    options: LossOptions = LossOptions(),
    *,
    weights: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    entropy: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """(-objective + kl_penalty KL - entropy_bonus H) over this micro-batch's tokens, divided by `denominator`.

    logprobs of the policy, old_logprobs (the policy before the step's first update), ref_logprobs, rollout_logprobs
    (as the generator reported them), entropy, mask [B, T]; advantages, weights (of `loss_weights`; None: 1) [B].
    logprobs and entropy carry the gradient. With the number of sampled tokens of the whole global batch as denominator
    the micro-batch losses add up to its token mean (DAPO, 2503.14476, eq. 12). What stands outside the mask, finite or
    not, reaches neither loss nor gradient; a row with an empty mask counts nowhere.

    The objective of each loss_mode: `_clipped` and `_cispo`. KL: kl.kl_estimate, in the loss as GRPO has it
    (2402.03300, eq. 3). The entropy bonus is PPO's (1707.06347, eq. 9), with the weights of the objective.

    Returns the loss and detached sums over tokens, to be divided by the same denominator, under `options.metrics`.
    ValueError where an option needs what is not given.
    """
    outside = mask == 0
    empty = outside.all(dim=1)

    def inside(values: Tensor) -> Tensor:
        # A masked value may be anything: an infinite ratio there would make 0 × inf = NaN of the loss.
        return values.masked_fill(outside, 0.0)

    logprobs, old_logprobs = inside(logprobs), inside(old_logprobs)
    advantages = advantages.masked_fill(empty, 0.0)[:, None]
    weighted = mask if weights is None else mask * weights.masked_fill(empty, 0.0)[:, None]
    objective_of = _cispo if options.loss_mode == "cispo" else _clipped
    objective, clipped = objective_of(logprobs, old_logprobs, advantages, mask, options)
    metrics = {f"actor/{name}": (where * mask).sum() for name, where in clipped.items()}
    if options.importance_sampling_cap is not None:
        rollout = inside(_needed(rollout_logprobs, "importance_sampling_cap", "rollout_logprobs"))
        correction, truncated = truncated_ratio(old_logprobs, rollout, options.importance_sampling_cap)
        objective = objective * correction
        metrics |= zip(_CORRECTION, ((correction * mask).sum(), (truncated * mask).sum()), strict=True)
    pg_loss = -(objective * weighted).sum()
    loss = pg_loss
    if options.kl_penalty > 0:
        reference = inside(_needed(ref_logprobs, "kl_penalty", "ref_logprobs"))
        kl = (kl_estimate(logprobs, reference, options.kl_penalty_type) * weighted).sum()
        loss = loss + options.kl_penalty * kl
        metrics["actor/kl_loss"] = kl
    if options.entropy_bonus > 0:
        spread = _needed(entropy, "entropy_bonus", "entropy")
        if logprobs.requires_grad and not spread.requires_grad:
            raise ValueError("entropy_bonus is set, but the entropy carries no gradient")
        loss = loss - options.entropy_bonus * (inside(spread) * weighted).sum()
    metrics |= {"actor/pg_loss": pg_loss, "actor/loss": loss}
    return loss / denominator, {name: value.detach() for name, value in metrics.items()}


def truncated_ratio(old_logprobs: Tensor, rollout_logprobs: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """min(π_old / π_generator, cap) at each token, without gradient, and which were cut: [B, T] twice.

    Corrects for a generator whose probabilities differ from the trainer's: the truncated importance weights of IMPALA
    (1802.01561, section 4.1, ρ), token by token as in TIS (F. Yao et al., "Your Efficient RL Framework Secretly Brings
    You Off-Policy RL Training", 2025). NeMo-RL: use_importance_sampling_correction with
    truncated_importance_sampling_ratio; verl: rollout_is=token with rollout_is_threshold.
    """
    ratio = _exp(old_logprobs - rollout_logprobs).detach()
    return ratio.clamp(max=cap), ratio > cap


def _clipped(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, options: LossOptions
) -> tuple[Tensor, dict[str, Tensor]]:
    """vanilla and gspo: min(r A, clip(r) A) at each token, and where it was clipped: [B, T]; advantages [B, 1].

    vanilla: r = π / π_old of the token (PPO, 1707.06347, eq. 7), 1 - low and 1 + high as in DAPO (2503.14476, eq. 10).
    gspo: r = (π / π_old)^(1 / length) of the row, whose tokens all count it (GSPO, 2507.18071, eqs. 5 and 7).
    With ratio_clip_c, max(that, c A) where A < 0 (dual clip, 1912.09729, eq. 5).
    """
    log_ratio = logprobs - old_logprobs
    if options.loss_mode == "gspo":
        lengths = mask.sum(dim=1, keepdim=True).clamp(min=1)
        log_ratio = ((log_ratio * mask).sum(dim=1, keepdim=True) / lengths).expand_as(mask)
    ratio = _exp(log_ratio)
    surrogate = ratio * advantages
    surrogate_clipped = ratio.clamp(1 - options.ratio_eps_low, 1 + options.ratio_eps_high) * advantages
    objective = minimum(surrogate, surrogate_clipped)
    where = {"pg_clipfrac": surrogate_clipped < surrogate}
    if options.ratio_clip_c is not None:
        floor = options.ratio_clip_c * advantages
        where["pg_clipfrac_lower"] = (advantages < 0) & (objective < floor)
        objective = maximum(objective, floor).where(advantages < 0, objective)
    return objective, where


def _cispo(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, options: LossOptions
) -> tuple[Tensor, dict[str, Tensor]]:
    """clip(r) A log π at each token, clip(r) without gradient, so that every token has one: [B, T].

    CISPO (MiniMax-M1, 2506.13585, eqs. 4 and 5); its authors use no lower bound: ratio_eps_low = 1.
    """
    ratio = _exp(logprobs - old_logprobs).detach()
    clipped = ratio.clamp(1 - options.ratio_eps_low, 1 + options.ratio_eps_high)
    return clipped * advantages * logprobs, {"pg_clipfrac": ratio != clipped}


def _needed(values: Tensor | None, option: str, argument: str) -> Tensor:
    if values is None:
        raise ValueError(f"{option} is set, but there are no {argument}")
    return values


def _exp(log_ratio: Tensor) -> Tensor:
    """e^x, constant above LOG_RATIO_MAX: neither an infinite ratio nor the NaN of its gradient."""
    return log_ratio.clamp(max=LOG_RATIO_MAX).exp()

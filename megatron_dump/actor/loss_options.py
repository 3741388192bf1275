"""The loss that a configuration asks for."""

from __future__ import annotations

from megatron_dump.config import Config
from megatron_dump.grpo import LossOptions


def loss_options(config: Config) -> LossOptions:
    """The KL is left out where the rewards hold it."""
    grpo, loss = config.trainer.grpo, config.model.grpo
    return LossOptions(
        loss_mode=loss.loss_mode,
        ratio_eps_low=loss.ratio_eps_low,
        ratio_eps_high=loss.ratio_eps_high,
        ratio_clip_c=loss.ratio_clip_c,
        kl_penalty=0.0 if grpo.kl_in_reward else grpo.initial_policy_kl_penalty,
        kl_penalty_type=grpo.kl_penalty_type,
        entropy_bonus=loss.entropy_bonus,
        importance_sampling_cap=loss.importance_sampling_cap,
    )

"""What verl.trainer.ppo.core_algos and its rollout correction compute."""

from __future__ import annotations

import numpy as np
import torch
from verl import DataProto
from verl.trainer.ppo import core_algos
from verl.trainer.ppo.ray_trainer import apply_kl_penalty
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_weights
from verl.workers.config import ActorConfig

from reference_vectors.batches import MAX_LENGTH, ragged_rewards, result, tensors

AGGREGATIONS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm")
EPS_LOW, EPS_HIGH, KL_PENALTY, ENTROPY_COEFF = 0.2, 0.28, 0.1, 0.01
NO_DUAL_CLIP = 1e30  # verl's clip_ratio_c must be a number


def advantages() -> list[dict]:
    """Outcome advantages of ragged groups; the rewards sit on the last token of rows of one token."""
    rewards, groups = ragged_rewards()
    index = np.array(groups)
    estimators = {
        "grpo": lambda r, m: core_algos.compute_grpo_outcome_advantage(r, m, index),
        "dr_grpo": lambda r, m: core_algos.compute_grpo_outcome_advantage(r, m, index, norm_adv_by_std_in_grpo=False),
        "rloo": lambda r, m: core_algos.compute_rloo_outcome_advantage(r, m, index),
        "rloo_vectorized": lambda r, m: core_algos.compute_rloo_vectorized_outcome_advantage(r, m, index),
    }
    cases = []
    for name, estimate in estimators.items():
        column = torch.tensor(rewards, dtype=torch.float64)[:, None]
        told, _ = estimate(column, torch.ones_like(column))
        cases.append({"name": name, "rewards": rewards, "groups": groups, "advantages": told[:, 0].tolist()})
    return cases


def losses() -> dict[str, list[dict]]:
    """Section of the file -> its cases."""
    return {"policy_losses": policy_losses(), "kl_penalties": kl_penalties(), "kl_in_reward": kl_in_reward()}


def policy_losses() -> list[dict]:
    cases = []
    for mode in ("vanilla", "gspo", "cispo"):
        for aggregation in AGGREGATIONS:
            for batch in ("ragged", "empty_row"):
                cases.append(policy_loss(batch, mode, aggregation))
        cases.append(policy_loss("ragged", mode, "token-mean", threshold=1.3))
    cases.append(policy_loss("extreme", "vanilla", "token-mean"))
    cases.append(policy_loss("extreme", "cispo", "token-mean"))
    cases.append(policy_loss("empty_row", "vanilla", "token-mean", clip_c=1.6))
    cases.append(policy_loss("extreme", "vanilla", "token-mean", clip_c=3.0))
    cases.append(policy_loss("ragged", "vanilla", "seq-mean-token-mean", kl="k3", entropy=ENTROPY_COEFF))
    cases.append(policy_loss("ragged", "cispo", "seq-mean-token-sum-norm", kl="k2", entropy=ENTROPY_COEFF))
    return cases


def policy_loss(
    name: str,
    mode: str,
    aggregation: str,
    clip_c: float | None = None,
    threshold: float | None = None,
    kl: str | None = None,
    entropy: float = 0.0,
) -> dict:
    """One registered policy loss; KL and entropy are added as verl's actors add them."""
    batch = tensors(name)
    shared = {"loss_scale_factor": MAX_LENGTH} if aggregation == "seq-mean-token-sum-norm" else {}
    config = ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        clip_ratio_low=EPS_LOW,
        clip_ratio_high=EPS_HIGH,
        clip_ratio_c=clip_c or NO_DUAL_CLIP,
    )
    config.global_batch_info.update(shared)
    weights, correction = None, {}
    if threshold is not None:
        log_ratio = batch["old_logprobs"] - batch["rollout_logprobs"]
        weights, correction = compute_rollout_correction_weights(log_ratio, batch["mask"], "token", threshold)
    told, metrics = core_algos.get_policy_loss_fn(mode)(
        old_log_prob=batch["old_logprobs"],
        log_prob=batch["logprobs"],
        advantages=batch["advantages"][:, None].expand_as(batch["mask"]),
        response_mask=batch["mask"],
        loss_agg_mode=aggregation,
        config=config,
        rollout_is_weights=weights,
    )
    kept = {k: metrics[f"actor/{k}"] for k in ("pg_clipfrac", "pg_clipfrac_lower")}
    kept |= {k: correction[k] for k in ("rollout_is_mean", "rollout_is_ratio_fraction_high") if correction}
    if kl is not None:
        estimate = core_algos.kl_penalty(batch["logprobs"], batch["ref_logprobs"], kl)
        told = told + KL_PENALTY * core_algos.agg_loss(estimate, batch["mask"], aggregation, **shared)
    if entropy:
        told = told - entropy * core_algos.agg_loss(batch["entropy"], batch["mask"], aggregation, **shared)
    options = {
        "loss_mode": mode,
        "loss_agg_mode": aggregation,
        "ratio_eps_low": EPS_LOW,
        "ratio_eps_high": EPS_HIGH,
        "ratio_clip_c": clip_c,
        "importance_sampling_cap": threshold,
        "entropy_bonus": entropy,
        **({} if kl is None else {"kl_penalty": KL_PENALTY, "kl_penalty_type": kl}),
    }
    return {"batch": name, "max_length": MAX_LENGTH, "options": options, **result(told, batch, **kept)}


def kl_penalties() -> list[dict]:
    """kl_penalty at each token, and its gradient."""
    cases = []
    for kind in ("k1", "k2", "k3"):
        batch = tensors("ragged")
        estimate = core_algos.kl_penalty(batch["logprobs"], batch["ref_logprobs"], kind)
        estimate.sum().backward()
        gradient = batch["logprobs"].grad.tolist()
        cases.append({"batch": "ragged", "kind": kind, "kl": estimate.tolist(), "d_logprobs": gradient})
    return cases


def kl_in_reward() -> list[dict]:
    """Token rewards after apply_kl_penalty, and the RLOO advantages of their sums: three groups of two rows."""
    cases = []
    for kind in ("k1", "k2", "k3"):
        batch = {key: value.detach() for key, value in tensors("ragged").items()}
        rewards = torch.tensor([1.0, 0.0, 0.5, 2.0, -1.0, 0.0], dtype=torch.float64)
        scores = torch.zeros_like(batch["mask"])
        scores[torch.arange(6), batch["mask"].sum(1).long() - 1] = rewards
        data = DataProto.from_dict(
            {
                "response_mask": batch["mask"],
                "token_level_scores": scores,
                "old_log_probs": batch["old_logprobs"],
                "ref_log_prob": batch["ref_logprobs"],
            }
        )
        data, metrics = apply_kl_penalty(data, core_algos.FixedKLController(KL_PENALTY), kind)
        told, groups = data.batch["token_level_rewards"], np.array([0, 0, 1, 1, 2, 2])
        penalized = told.sum(1).tolist()
        advantages, _ = core_algos.compute_rloo_outcome_advantage(told.clone(), batch["mask"], groups)
        cases.append(
            {
                "batch": "ragged",
                "kind": kind,
                "kl_penalty": KL_PENALTY,
                "rewards": rewards.tolist(),
                "groups": groups.tolist(),
                "penalized": penalized,
                "advantages": advantages[:, 0].tolist(),
                "reward_kl_penalty": metrics["actor/reward_kl_penalty"],
            }
        )
    return cases

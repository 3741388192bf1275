"""Random ragged batches, the same for every library: float64, fixed seed."""

from __future__ import annotations

import torch
from torch import Tensor

SEED = 20250728
MAX_LENGTH = 7  # tokens of a completion at most: the constant of Dr. GRPO
_LENGTHS = {"ragged": (6, 1, 4, 2, 5, 3), "empty_row": (5, 0, 3, 6), "extreme": (4, 4, 4, 4)}
_SPREAD = 0.9  # of log-ratios: both clips and the dual one are met


def losses_batches() -> dict[str, dict[str, list]]:
    """Name -> {logprobs, old_logprobs, ref_logprobs, rollout_logprobs, entropy, mask [B, T], advantages [B]}.

    `extreme` has log-ratios of ±40 to the old policy, with advantages of both signs.
    """
    generator = torch.Generator().manual_seed(SEED)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    batches = {}
    for name, lengths in _LENGTHS.items():
        rows, width = len(lengths), max(lengths)
        mask = (torch.arange(width)[None] < torch.tensor(lengths)[:, None]).double()
        old = -0.1 - normal(rows, width).abs() * 2
        logprobs = old + _SPREAD * normal(rows, width)
        advantages = normal(rows).abs() * torch.tensor([1.0, -1.0] * (rows // 2), dtype=torch.float64)
        if name == "extreme":
            logprobs[:, 1] = old[:, 1] + torch.tensor([40.0, 40.0, -40.0, -40.0], dtype=torch.float64)
            advantages = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
        batch = {
            "logprobs": logprobs,
            "old_logprobs": old,
            "ref_logprobs": logprobs + 0.5 * normal(rows, width),
            "rollout_logprobs": old + 0.5 * normal(rows, width),
            "entropy": normal(rows, width).abs(),
            "mask": mask,
            "advantages": advantages,
        }
        batches[name] = {key: value.tolist() for key, value in batch.items()}
    return batches


def tensors(name: str) -> dict[str, Tensor]:
    """One of them; logprobs and entropy ask for their gradient."""
    batch = {key: torch.tensor(value, dtype=torch.float64) for key, value in losses_batches()[name].items()}
    batch["logprobs"].requires_grad_()
    batch["entropy"].requires_grad_()
    return batch


def ragged_rewards() -> tuple[list[float], list[int]]:
    """Rewards and group labels of shuffled groups of 1 to 5 rollouts; one group's rewards are all alike."""
    generator = torch.Generator().manual_seed(SEED + 1)
    groups = torch.tensor([3] * 4 + [11] * 5 + [5] * 2 + [8] * 3 + [2])
    rewards = torch.randn(len(groups), generator=generator, dtype=torch.float64) * 3
    rewards[groups == 8] = 1.5
    order = torch.randperm(len(groups), generator=generator)
    return rewards[order].tolist(), groups[order].tolist()


def result(loss: Tensor, batch: dict[str, Tensor], **metrics: float) -> dict:
    """A loss with its gradients to log-probabilities and entropy."""
    loss.backward()
    gradients = {f"d_{key}": batch[key].grad.tolist() for key in ("logprobs", "entropy") if batch[key].grad is not None}
    return {"loss": loss.item(), **gradients, "metrics": metrics}

"""Random ragged batches for tests of the loss, and every kind of loss there is."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_dump import grpo
from megatron_dump.grpo import LossOptions

EVERYTHING = {"kl_penalty": 0.3, "entropy_bonus": 0.1, "importance_sampling_cap": 1.2}
MODES = {
    **{mode: LossOptions(mode) for mode in grpo.LOSS_MODES},
    **{f"{mode}, everything": LossOptions(mode, 0.2, 0.28, **EVERYTHING) for mode in grpo.LOSS_MODES},
    "dual clip": LossOptions(ratio_clip_c=1.3),
    "gspo, dual clip": LossOptions("gspo", ratio_clip_c=1.3),
    "k1": LossOptions(kl_penalty=0.3, kl_penalty_type="k1"),
    "k2": LossOptions(kl_penalty=0.3, kl_penalty_type="k2"),
}
QUICK = settings(deadline=None, max_examples=30)
LENGTHS = st.lists(st.integers(0, 6), min_size=1, max_size=9).filter(any)
PER_TOKEN = ("logprobs", "old_logprobs", "ref_logprobs", "rollout_logprobs", "entropy")


def make_batch(lengths: list[int], seed: int = 0, spread: float = 0.5) -> dict[str, Tensor]:
    """Rows of the given numbers of tokens after prompts of 0 to 2, padded; float64."""
    generator = torch.Generator().manual_seed(seed)
    starts = [i % 3 for i in range(len(lengths))]
    shape = len(lengths), max(s + n for s, n in zip(starts, lengths, strict=True)) + 1
    column = torch.arange(shape[1])[None]
    first, count = torch.tensor(starts)[:, None], torch.tensor(lengths)[:, None]
    batch: dict[str, Tensor] = {"mask": ((column >= first) & (column < first + count)).double()}
    centre = -1 - torch.rand(shape, generator=generator, dtype=torch.float64)
    for name in PER_TOKEN:
        batch[name] = centre + spread * torch.randn(shape, generator=generator, dtype=torch.float64)
    batch["entropy"] = batch["entropy"].abs()
    batch["advantages"] = torch.randn(len(lengths), generator=generator, dtype=torch.float64)
    batch["weights"] = torch.rand(len(lengths), generator=generator, dtype=torch.float64) + 0.5
    return batch


def loss_of(batch: dict[str, Tensor], options: LossOptions, n: float | None = None, **given: Any):
    named = {**batch, **given}
    keyed = {name: named[name] for name in ("weights", "ref_logprobs", "rollout_logprobs", "entropy")}
    positional = (named[name] for name in ("logprobs", "old_logprobs", "advantages", "mask"))
    return grpo.policy_loss(*positional, n or float(batch["mask"].sum()), options, **keyed)


def with_gradients(batch: dict[str, Tensor], options: LossOptions, n: float) -> tuple[Tensor, Tensor, Tensor, dict]:
    logprobs, entropy = (batch[name].clone().requires_grad_() for name in ("logprobs", "entropy"))
    loss, sums = loss_of(batch, options, n, logprobs=logprobs, entropy=entropy)
    loss.backward()
    d_entropy = torch.zeros_like(entropy) if entropy.grad is None else entropy.grad
    return loss.detach(), logprobs.grad, d_entropy, sums

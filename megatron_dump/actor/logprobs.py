"""Log-probabilities and entropy from logits whose vocabulary is split over tensor-parallel ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _VocabParallelLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, group: dist.ProcessGroup, first: int
    ) -> tuple[Tensor, Tensor]:
        peak = logits.amax(-1)
        dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group)
        shifted = logits - peak[..., None]
        weights = shifted.exp()
        local = targets - first
        mine = (local >= 0) & (local < logits.size(-1))
        local = local.clamp(0, logits.size(-1) - 1)
        chosen = shifted.gather(-1, local[..., None])[..., 0] * mine
        # -inf marks logits outside the vocabulary: their weight is 0, and 0 × -inf must not enter the mean.
        mean = (weights * shifted.masked_fill(weights == 0, 0.0)).sum(-1)
        sums = torch.stack([weights.sum(-1), chosen, mean])
        dist.all_reduce(sums, group=group)
        total, chosen, mean = sums.unbind(0)
        log_total = total.log()
        ctx.save_for_backward(weights.div_(total[..., None]), local, mine)
        entropy = log_total - mean / total
        ctx.mark_non_differentiable(entropy)
        return chosen - log_total, entropy

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:  # pyright: ignore
        probabilities, local, mine = ctx.saved_tensors
        d_logits = probabilities.mul(-grad[..., None])
        d_logits.scatter_add_(-1, local[..., None], (grad * mine)[..., None])
        return d_logits, None, None, None


def vocab_parallel_logprobs(
    logits: Tensor,
    targets: Tensor,
    group: dist.ProcessGroup,
    tensor_rank: int,
    vocab_size: int,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """log softmax(logits / temperature) at `targets`, and the entropy of that distribution (no gradient).

    logits [..., V / tensor-parallel size], targets int64 [...]; columns at or above `vocab_size` are padding of the
    embedding and take no part. Returns float32 [...] twice.
    """
    first = tensor_rank * logits.size(-1)
    logits = logits.float() / temperature if temperature != 1.0 else logits.float()
    padding = first + logits.size(-1) - vocab_size
    if padding > 0:
        columns = torch.arange(first, first + logits.size(-1), device=logits.device)
        logits = logits.masked_fill(columns >= vocab_size, float("-inf"))
    return _VocabParallelLogprobs.apply(logits, targets, group, first)

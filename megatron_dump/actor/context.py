"""Context parallelism: which tokens of a sequence a rank holds, and how the whole is put together again.

The sequence is cut into two chunks a rank; rank r holds chunks r and 2 R - 1 - r, so that under a causal mask all ranks
have the same work. This is megatron-core's order (get_batch_on_this_cp_rank), which its rotary embedding follows.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor


def positions(length: int, group: dist.ProcessGroup, device: torch.device, rank: int | None = None) -> Tensor:
    """Positions int64 [length / ranks] of this rank's (or another's) tokens in the sequence, ascending."""
    size, whole = group.size(), torch.arange(length, device=device)
    if size == 1:
        return whole
    rank = group.rank() if rank is None else rank
    return whole.view(2 * size, -1)[[rank, 2 * size - 1 - rank]].flatten()


def places(length: int, group: dist.ProcessGroup, device: torch.device) -> Tensor:
    """int64 [length]: where this rank holds each position of the sequence among its own; -1 where it does not."""
    held = positions(length, group, device)
    return torch.full((length,), -1, device=device).index_copy(0, held, torch.arange(len(held), device=device))


def gather(local: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[S / ranks, …] of each rank -> [S, …] in the sequence's order, on every rank.

    Backward gives each rank the gradients of its own positions, summed over the ranks.
    """
    whole = gather_from_sequence_parallel_region(local.contiguous(), True, group)
    held = [positions(whole.size(0), group, local.device, rank) for rank in range(group.size())]
    return whole[torch.cat(held).argsort()]


def spread(local: Tensor, length: int, group: dist.ProcessGroup) -> Tensor:
    """[B, S / ranks] of each rank -> [B, S] in the sequence's order, on every rank; backward as in `total`."""
    if group.size() == 1:
        return local
    held = positions(length, group, local.device)
    return total(local.new_zeros(len(local), length).index_copy(1, held, local), group)


def total(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over the ranks, on every rank.

    Backward gives each rank the gradient of its own part: all ranks must do the same with the sum.
    """
    return part if group.size() == 1 else reduce_from_tensor_model_parallel_region(part, group)

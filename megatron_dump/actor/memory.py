"""What a rank's memory holds. Gigabytes are 2**30 bytes, as in verl's perf/ metrics."""

from __future__ import annotations

import itertools
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dump.actor.offload import optimizer_parts, own_tensors

PARTS = ("parameters", "gradients", "optimizer", "reference")


def usage(device: torch.device) -> dict[str, float]:
    """The largest over all ranks: resident memory of a rank's process and, on CUDA, the peaks since the last call.

    `perf/memory_rss_gb`, `perf/max_memory_allocated_gb`, `perf/max_memory_reserved_gb`. Collective: one all-reduce.
    """
    found = {"perf/memory_rss_gb": _resident()}
    if device.type == "cuda":
        found["perf/max_memory_allocated_gb"] = torch.cuda.max_memory_allocated(device)
        found["perf/max_memory_reserved_gb"] = torch.cuda.max_memory_reserved(device)
        torch.cuda.reset_peak_memory_stats(device)
    largest = torch.tensor(list(found.values()), dtype=torch.float64, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return dict(zip(found, (largest / 2**30).tolist(), strict=True))


def held(models: Sequence[Any], optimizer: Any, reference: Sequence[Tensor] | None) -> list[int]:
    """Bytes of PARTS on this rank; `models` are Megatron's DDP chunks, `reference` the frozen weights on the host.

    The optimizer's are master weights and Adam's two moments, which may not exist before the first update.
    """
    buffers = [b for model in models for b in (*model.buffers, *model.expert_parallel_buffers)]
    parts = optimizer_parts(optimizer)
    masters = {id(tensor) for tensor in own_tensors(parts, models)}
    adam = 0
    for part in parts:
        moments = part.config.exp_avg_dtype.itemsize + part.config.exp_avg_sq_dtype.itemsize
        for parameter in itertools.chain.from_iterable(group["params"] for group in part.optimizer.param_groups):
            adam += parameter.numel() * moments + (_bytes([parameter]) if id(parameter) in masters else 0)
    return [
        _bytes(p for model in models for p in model.parameters()),
        _bytes(buffer.grad_data for buffer in buffers),
        adam,
        _bytes(reference or ()),
    ]


def report(own: list[int], device: torch.device) -> str:
    """One line: what each rank holds, ranks that hold alike together; `own` is this rank's `held`. Collective."""
    sizes = torch.tensor(own, device=device)
    parts = [torch.empty_like(sizes) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, sizes)
    groups, first = [], 0
    for row, ranks in itertools.groupby([part.tolist() for part in parts]):
        last = first + len(list(ranks)) - 1
        who = f"rank {first}" if first == last else f"ranks {first}-{last}, each"
        values = ", ".join(f"{name} {_readable(size)}" for name, size in zip(PARTS, row, strict=True))
        groups.append(f"{who}: {values} (on the host)")
        first = last + 1
    return f"memory of {'; '.join(groups)}"


def _readable(size: int) -> str:
    return f"{size / 2**30:.1f} GB" if size >= 2**30 else f"{size / 2**20:.1f} MB"


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _resident() -> float:
    """Bytes of this process in memory now."""
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

"""All-reduce, broadcast and messages between neighbours, by group and size, inside the ranks that were started.

Bandwidths are those of NVIDIA's nccl-tests (doc/PERFORMANCE.md): algorithm bandwidth is bytes / time; bus bandwidth is
that times 2(n-1)/n for an all-reduce of n ranks, and the same for a broadcast or a message.
"""

from __future__ import annotations

import itertools
import socket
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from kk.progress import each
from megatron_dump.actor.parallel import Parallel
from megatron_dump.distributed import all_gather_array
from multinode_bench.fit import alpha_beta
from multinode_bench.network import all_reduce_columns

KIB, MIB = 2**10, 2**20
SIZES = tuple(KIB * 4**i for i in range(10))  # 1 KiB to 256 MiB
QUICK_SIZES = (KIB, 16 * KIB, 256 * KIB, 4 * MIB)
OPERATIONS = ("all_reduce", "broadcast", "p2p")
_HOST_BYTES = 64
Operation = Callable[[torch.Tensor, dist.ProcessGroup], None]


def measure(grid: Parallel, quick: bool = False, repeats: int = 9) -> dict[str, Any]:
    """`rows` (a group, an operation, a size) and `fits` (alpha and beta of a group's operation). A collective.

    ValueError on a single rank.
    """
    if grid.world_size == 1:
        raise ValueError("collectives: one rank has nobody to talk to; start more (torchrun --nproc-per-node)")
    hosts, rows = _hosts(grid), []
    groups = _groups(grid)
    plan = list(itertools.product(groups.items(), OPERATIONS, QUICK_SIZES if quick else SIZES))
    for (name, group), operation, size in each(plan, "collectives", show=grid.rank == 0):
        members = dist.get_process_group_ranks(group)
        about = {"group": name, "ranks": len(members), "nodes": len({hosts[rank] for rank in members})}
        seconds = _measure(grid, group, operation, size, 3 if quick else repeats)
        rows.append({**about, "operation": operation, **_row(operation, size, len(members), seconds)})
    return {
        "backend": dist.get_backend(),
        "ranks": grid.world_size,
        "nodes": len(set(hosts)),
        "copy_bytes_per_s": _copy_rate(grid, 4 * MIB if quick else 64 * MIB),
        "rows": rows,
        "fits": [fitted(rows, name, operation) for name in groups for operation in OPERATIONS],
    }


def fitted(rows: list[dict[str, Any]], group: str, operation: str) -> dict[str, Any]:
    """alpha, beta and the fit's error over all sizes of a group's operation."""
    mine = [row for row in rows if (row["group"], row["operation"]) == (group, operation)]
    found = alpha_beta([row["bytes"] for row in mine], [row["seconds"] for row in mine])
    alpha, beta = found.coefficients
    return {
        **{key: mine[0][key] for key in ("group", "operation", "ranks", "nodes")},
        "alpha_s": alpha,
        "beta_s_per_byte": beta,
        "rms_error": found.error,
        "largest_error": found.worst,
    }


def _hosts(grid: Parallel) -> list[str]:
    """[world] the host names of the ranks, cut to a length."""
    own = np.zeros(_HOST_BYTES, np.uint8)
    name = socket.gethostname().encode()[-_HOST_BYTES:]
    own[: len(name)] = np.frombuffer(name, np.uint8)
    return [row.tobytes().rstrip(b"\0").decode(errors="replace") for row in all_gather_array(own, None, grid.device)]


def _groups(grid: Parallel) -> dict[str, dist.ProcessGroup]:
    """Those of training with more than one rank, and all ranks if no group has them all; the same on every rank."""
    world = dist.group.WORLD
    assert world is not None  # joined
    candidates = {
        "tensor": grid.tensor_group,
        "pipeline": grid.pipeline_group,
        "context": grid.context_group,
        "data": grid.data_group,
        "world": world,
    }
    found = {name: group for name, group in candidates.items() if dist.get_world_size(group) > 1}
    if any(dist.get_world_size(group) == grid.world_size for name, group in found.items() if name != "world"):
        del found["world"]
    return found


def _measure(grid: Parallel, group: dist.ProcessGroup, operation: str, size: int, repeats: int) -> list[float]:
    """[repeats] seconds of one operation, each of the slowest rank; all groups of a kind at once, as in training."""
    tensor = torch.zeros(size // 4, device=grid.device)
    run: Operation = {"all_reduce": _all_reduce, "broadcast": _broadcast, "p2p": _ping_pong}[operation]
    inner = 10 if size <= 64 * KIB else 1  # launching and reading the clock are not what is measured
    found = []
    for number in range(repeats + 1):
        dist.barrier()
        _wait(grid)
        start = time.perf_counter()
        for _ in range(inner):
            run(tensor, group)
        _wait(grid)
        if number:  # the first one connects
            found.append((time.perf_counter() - start) / inner)
    seconds = torch.tensor(found, dtype=torch.float64, device=grid.device)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return seconds.tolist()


def _all_reduce(tensor: torch.Tensor, group: dist.ProcessGroup) -> None:
    dist.all_reduce(tensor, group=group)


def _broadcast(tensor: torch.Tensor, group: dist.ProcessGroup) -> None:
    dist.broadcast(tensor, dist.get_global_rank(group, 0), group=group)


def _ping_pong(tensor: torch.Tensor, group: dist.ProcessGroup) -> None:
    """There and back between the ranks of the first half and those of the second: across nodes, if the group is."""
    rank, half = dist.get_rank(group), dist.get_world_size(group) // 2
    if rank < half:
        peer = dist.get_global_rank(group, rank + half)
        dist.send(tensor, peer, group=group)
        dist.recv(tensor, peer, group=group)
    elif rank < 2 * half:
        peer = dist.get_global_rank(group, rank - half)
        dist.recv(tensor, peer, group=group)
        dist.send(tensor, peer, group=group)


def _row(operation: str, size: int, ranks: int, seconds: list[float]) -> dict[str, float]:
    ways = 2 if operation == "p2p" else 1  # there and back
    median = statistics.median(seconds) / ways
    factor = all_reduce_columns(ranks)[1] if operation == "all_reduce" else 1.0
    return {
        "bytes": size,
        "seconds": median,
        "fastest": min(seconds) / ways,
        "slowest": max(seconds) / ways,
        "algbw": size / median,
        "busbw": factor * size / median,
    }


def _copy_rate(grid: Parallel, size: int) -> float:
    """Bytes read and written a second when all ranks copy memory at once; of the slowest rank."""
    source = torch.ones(size // 4, device=grid.device)
    target, found = torch.empty_like(source), []
    for _ in range(6):
        dist.barrier()
        _wait(grid)
        start = time.perf_counter()
        target.copy_(source)
        _wait(grid)
        found.append(2 * size / (time.perf_counter() - start))
    rate = torch.tensor(statistics.median(found[1:]), dtype=torch.float64, device=grid.device)
    dist.all_reduce(rate, op=dist.ReduceOp.MIN)
    return float(rate)


def _wait(grid: Parallel) -> None:
    if grid.device.type == "cuda":
        torch.cuda.synchronize(grid.device)

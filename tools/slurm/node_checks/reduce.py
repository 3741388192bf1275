"""An all-reduce between the nodes, one process each: does it arrive, is it right, how fast is it?"""

from __future__ import annotations

import datetime
import statistics
import time

import torch
import torch.distributed as dist

_ELEMENTS = {"cpu": 2**20, "cuda": 2**24}  # float32
_REPEATS, _SHORT_REPEATS = 5, 20


def measure(store: dist.Store, node: int, nodes: int, device: str, limit_s: float) -> tuple[float, float]:
    """GB/s that each node sends, and receives, in a large all-reduce; microseconds of a small one. Medians.

    GB/s are those of NCCL's own tests ("bus bandwidth"): 2 (n - 1) / n × size / time. RuntimeError when the sum is
    wrong or a peer does not come.
    """
    limit = datetime.timedelta(seconds=limit_s)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=node, world_size=nodes, timeout=limit)
    tensor = torch.empty(_ELEMENTS[device], device=device)
    slow = [_seconds(tensor, node) for _ in range(_REPEATS)]
    if not bool((tensor == nodes * (nodes + 1) / 2).all()):
        raise RuntimeError(
            f"the all-reduce gave {float(tensor.min())} … {float(tensor.max())}, wanted {nodes * (nodes + 1) / 2}; "
            "look for a faulty network card or GPU"
        )
    quick = [_seconds(tensor[:1], node) for _ in range(_SHORT_REPEATS)]
    size = tensor.numel() * tensor.element_size()
    return 2 * (nodes - 1) / nodes * size / statistics.median(slow) / 1e9, statistics.median(quick) * 1e6


def _seconds(tensor: torch.Tensor, node: int) -> float:
    tensor.fill_(node + 1)
    if tensor.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    dist.all_reduce(tensor)
    if tensor.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start

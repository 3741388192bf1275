"""The process grid: tensor × pipeline × context × expert × data parallel groups over torch.distributed."""

from __future__ import annotations

import dataclasses
import datetime
import os

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron_dump.actor import platform
from megatron_dump.actor.layout import Layout, check_layout
from megatron_dump.distributed import Replica, all_gather_array


@dataclasses.dataclass(frozen=True)
class Parallel:
    """This process's place in the grid and the groups it talks in."""

    layout: Layout
    device: torch.device
    rank: int
    world_size: int
    tensor_rank: int
    tensor_size: int
    tensor_group: dist.ProcessGroup
    pipeline_rank: int
    pipeline_size: int
    pipeline_group: dist.ProcessGroup
    context_rank: int
    context_size: int
    context_group: dist.ProcessGroup  # the ranks that share the tokens of a sequence
    replica_group: dist.ProcessGroup  # the tensor × context × pipeline ranks that work on the same rollouts
    data_rank: int  # which replica
    data_size: int
    data_group: dist.ProcessGroup
    expert_rank: int
    expert_size: int
    expert_group: dist.ProcessGroup  # the ranks that hold different experts
    expert_tensor_rank: int
    expert_tensor_size: int
    expert_tensor_group: dist.ProcessGroup  # the ranks that share an expert

    @property
    def replica(self) -> Replica:
        return Replica(self.data_rank, self.data_size, self.data_group, self.device, self.replica_group)

    @property
    def is_first_stage(self) -> bool:
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline_rank == self.pipeline_size - 1

    @property
    def first_stage_rank(self) -> int:
        return dist.get_global_rank(self.pipeline_group, 0)

    @property
    def last_stage_rank(self) -> int:
        return dist.get_global_rank(self.pipeline_group, self.pipeline_size - 1)

    @property
    def previous_stage_rank(self) -> int:
        return dist.get_global_rank(self.pipeline_group, self.pipeline_rank - 1)

    @property
    def next_stage_rank(self) -> int:
        return dist.get_global_rank(self.pipeline_group, self.pipeline_rank + 1)


def initialize(layout: Layout | None = None, seed: int = 1234, timeout_s: float = 600.0) -> Parallel:
    """Join torch.distributed (torchrun's environment, or a single process) and build the groups.

    A collective that waits longer than `timeout_s` fails on every rank instead of hanging.
    Raises ValueError when the layout does not divide the world size.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    layout = layout or Layout()
    check_layout(layout, world_size)
    place = platform.enable(int(os.environ.get("LOCAL_RANK", "0")))
    if not dist.is_initialized():
        if world_size == 1:
            store, where = dist.HashStore(), {"rank": 0, "world_size": 1}
        else:
            store, where = None, {}
        dist.init_process_group(place.backend, store=store, timeout=datetime.timedelta(seconds=timeout_s), **where)
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        **layout.sizes,
        distributed_timeout_minutes=max(1, round(timeout_s / 60)),
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    return current(place.device, layout)


def _replica_group(layout: Layout, device: torch.device) -> dist.ProcessGroup:
    """This rank's replica; megatron-core has a group for tensor × pipeline ranks only. A collective of all ranks."""
    if layout.context == 1:
        return parallel_state.get_model_parallel_group()
    replicas = all_gather_array(np.array(parallel_state.get_data_parallel_rank()), None, device)  # [world]
    members = [np.flatnonzero(replicas == replica).tolist() for replica in np.unique(replicas)]
    group, _ = dist.new_subgroups_by_enumeration(members)
    assert group is not None  # every rank is in a replica
    return group


def current(device: torch.device, layout: Layout) -> Parallel:
    """The grid that megatron-core holds for this process."""
    return Parallel(
        layout=layout,
        device=device,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_size=parallel_state.get_tensor_model_parallel_world_size(),
        tensor_group=parallel_state.get_tensor_model_parallel_group(),
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pipeline_size=parallel_state.get_pipeline_model_parallel_world_size(),
        pipeline_group=parallel_state.get_pipeline_model_parallel_group(),
        context_rank=parallel_state.get_context_parallel_rank(),
        context_size=parallel_state.get_context_parallel_world_size(),
        context_group=parallel_state.get_context_parallel_group(),
        replica_group=_replica_group(layout, device),
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
        data_group=parallel_state.get_data_parallel_group(),
        expert_rank=parallel_state.get_expert_model_parallel_rank(),
        expert_size=parallel_state.get_expert_model_parallel_world_size(),
        expert_group=parallel_state.get_expert_model_parallel_group(),
        expert_tensor_rank=parallel_state.get_expert_tensor_parallel_rank(),
        expert_tensor_size=parallel_state.get_expert_tensor_parallel_world_size(),
        expert_tensor_group=parallel_state.get_expert_tensor_parallel_group(),
    )

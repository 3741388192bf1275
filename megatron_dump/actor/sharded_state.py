"""Weights and optimizer of an actor as megatron-core's sharded state: any layout loads what another saved."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_dump.actor.actor import MegatronGPTGRPOActor
from megatron_dump.actor.offload import optimizer_parts
from megatron_dump.actor.weights_checkpoint import load_state, sharded_weights

# Each optimizer tensor is stored in the shape of its parameter, independent of every parallel size.
_OPTIMIZER_FORMAT = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


def sharded_state(actor: MegatronGPTGRPOActor, is_loading: bool) -> dict[str, Any]:
    """Tensors under their names in the whole model; where they lie in it is megatron-core's knowledge.

    The chunks of an interleaved pipeline are "model0", "model1", … as in Megatron-LM; the names stay in this process.
    """
    state: dict[str, Any] = {name: sharded_weights(module) for name, module in _chunks(actor)}
    parts = optimizer_parts(actor.optimizer)
    if not is_loading and actor.version == 0:  # Adam's moments appear with the first update
        for part in parts:
            part.init_state_fn(part.optimizer, part.config)
    with contextlib.ExitStack() as stack:
        for part in parts:
            stack.enter_context(_padding_kept(part))
        optimizer = actor.optimizer.sharded_state_dict(state, is_loading=is_loading, metadata=_OPTIMIZER_FORMAT)
    if not isinstance(parts[0], DistributedOptimizer):
        return {**state, "optimizer": optimizer}
    tensors = [found["param_state"] for found in ([optimizer] if len(parts) == 1 else optimizer.values())]
    if not is_loading:
        for part, found in zip(parts, tensors, strict=True):
            _verify(part, found)
    # How many optimizers there are depends on the expert parallel size: their tensors alone, known by name, are kept.
    return {**state, "optimizer": dict(enumerate(tensors))}


def restore_state(actor: MegatronGPTGRPOActor, loaded: dict[str, Any], version: int) -> None:
    """Put back what dist_checkpointing loaded; `version`: optimizer steps taken, the step of Adam's bias correction.

    Learning rate and weight decay are the scheduler's to restore; the other options are the configuration's.
    """
    for name, module in _chunks(actor):
        load_state(module, loaded[name])
    parts = optimizer_parts(actor.optimizer)
    if not isinstance(parts[0], DistributedOptimizer):
        actor.optimizer.load_state_dict(loaded["optimizer"])
        return
    for i, part in enumerate(parts):
        own = part.state_dict()
        for group in own["optimizer"]["param_groups"]:
            group.pop("step", None)
            if version:
                group["step"] = version
        sharding = _OPTIMIZER_FORMAT["distrib_optim_sharding_type"]
        part.load_state_dict({**own, "param_state": loaded["optimizer"][i], "param_state_sharding_type": sharding})


def _chunks(actor: MegatronGPTGRPOActor) -> list[tuple[str, torch.nn.Module]]:
    modules = actor.modules
    return [("model" if len(modules) == 1 else f"model{i}", module) for i, module in enumerate(modules)]


@contextlib.contextmanager
def _padding_kept(part: Any) -> Iterator[None]:
    """Inside the block the optimizer's buffers are gathered with the padding at the ends of their buckets.

    megatron-core, up to 0.19 at least, drops that padding in gathering but counts it in slicing into parameters: in a
    buffer of several buckets (tied embeddings under pipeline parallelism, overlap_grad_reduce) other parameters' states
    are saved from the second bucket on (Megatron-LM pull request 5077). `_verify` notices a version that differs.
    """
    if not isinstance(part, DistributedOptimizer):
        yield
        return
    part.get_parameter_state_dp_zero = functools.partial(_gather, part)
    try:
        yield
    finally:
        del part.get_parameter_state_dp_zero  # of the instance: the class's method shows again


def _gather(part: Any, use_gloo_comm: bool = False, empty_data: bool = False, return_on_all_ranks: bool = True) -> Any:
    """Master weights and moments of all data-parallel ranks, on the host: fp32 [elements], laid out as the buffers are.

    Stands in for DistributedOptimizer.get_parameter_state_dp_zero, as _OPTIMIZER_FORMAT makes it be called. Gathers in
    place, without the copies that take most of its time.
    """
    if use_gloo_comm or not return_on_all_ranks:
        raise NotImplementedError("distrib_optim_fully_reshardable_mem_efficient is not supported")
    group: dist.ProcessGroup = part.data_parallel_group
    state: dict[Any, Any] = {"buckets_coalesced": True}
    for i, (buffer, ranges) in enumerate(zip(part.buffers, part.gbuf_ranges, strict=True)):
        ((dtype, buckets),) = ranges.items()
        gathered = {key: torch.zeros(buffer.numel) for key in ("param", "exp_avg", "exp_avg_sq")}
        for bucket, found in zip([] if empty_data else buffer.buckets, buckets, strict=not empty_data):
            whole = {key: t[bucket.offset : bucket.offset + bucket.grad_data.numel()] for key, t in gathered.items()}
            device = bucket.grad_data.device
            on_device = {key: tensor.to(device) for key, tensor in whole.items()}  # where the group's backend wants it
            n = bucket.grad_data.numel() // group.size()  # of a rank's share
            shards = {key: t[group.rank() * n : (group.rank() + 1) * n] for key, t in on_device.items()}
            for parameter, places in found["param_map"].items():
                own = part._get_main_param_and_optimizer_states(parameter)
                for key, shard in shards.items():
                    shard[places["gbuf_local"].start : places["gbuf_local"].end] = own[key].detach()
            for key, tensor in on_device.items():
                dist.all_gather_into_tensor(tensor, shards[key], group)
                whole[key].copy_(tensor)  # on CPU: itself
        state[i] = {dtype: {**gathered, "numel_unpadded": buffer.numel_unpadded}}
    return state


def _verify(part: Any, state: dict[int, Any]) -> None:
    """RuntimeError unless the master weights to be saved are the model's weights, where buckets could mix them up."""
    several = [(p, len(buffer.buckets) > 1) for buffer in part.buffers for p in buffer.param_index_map]
    for i in (i for i, (_, is_one_of_several) in enumerate(several) if is_one_of_several):
        parameter = several[i][0]
        master = state[i]["param"]
        if not torch.equal(master.data.to(parameter), parameter.data):
            raise RuntimeError(
                f"checkpoint: the optimizer's {master.key} is not the model's weight; this version of "
                "megatron-core lays its buffers out in a way that actor/sharded_state.py does not know"
            )

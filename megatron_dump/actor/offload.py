"""Training's own memory, given away while completions are generated.

On CUDA: optimizer states and master weights move to page-locked host memory and back, gradient buffers are freed; each
state keeps its identity, so the optimizer notices nothing. Copies are enqueued on the current stream, which also orders
the reuse of freed blocks; host memory is read only after a synchronisation. Without CUDA the same code moves them to
other host memory. The reference's weights are always on the host (actor.py).

megatron-core's own `offload_to_cpu` moves every parameter of the optimizer: in fp32 these are views of the model's
weights, which would part from them. Here what shares memory with the model stays.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


@contextlib.contextmanager
def offloaded(optimizer: Any, models: Sequence[Any]) -> Iterator[None]:
    """Inside the block the states of Megatron's `optimizer` are on the host and the DDP `models` have no gradients.

    Gradients are zero afterwards. The optimizer must not be used inside; the weights may be.
    """
    tensors = own_tensors(optimizer_parts(optimizer), models)
    devices = [tensor.device for tensor in tensors]
    _move(tensors, [torch.device("cpu")] * len(tensors))
    for model in models:
        model.offload_grad_buffers(synchronize=False, empty_cache=False)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # other libraries on the device may have it
    try:
        yield
    finally:
        _move(tensors, devices)
        for model in models:
            model.restore_grad_buffers(synchronize=False)


def optimizer_parts(optimizer: Any) -> list[Any]:
    """The optimizers that megatron-core chains: one, or one for dense and one for expert parameters."""
    return getattr(optimizer, "chained_optimizers", [optimizer])


def own_tensors(optimizers: Sequence[Any], models: Sequence[Any]) -> list[Tensor]:
    """Master weights and moments: the optimizers' tensors that share no memory with the models' weights."""
    shared = {p.untyped_storage().data_ptr() for model in models for p in model.parameters()}
    found: dict[int, Tensor] = {}
    for part in optimizers:
        if getattr(part, "is_stub_optimizer", False):  # of a rank without parameters of its kind
            continue
        groups = part.optimizer.param_groups
        states = (value for state in part.optimizer.state.values() for value in state.values())
        for tensor in [*(p for group in groups for p in group["params"]), *filter(torch.is_tensor, states)]:
            if tensor.numel() and tensor.untyped_storage().data_ptr() not in shared:
                found[id(tensor)] = tensor
    return list(found.values())


@torch.no_grad()
def _move(tensors: Sequence[Tensor], devices: Sequence[torch.device]) -> None:
    for tensor, device in zip(tensors, devices, strict=True):
        # Towards the host, non_blocking copies into page-locked memory.
        tensor.data = tensor.data.to(device, non_blocking=True, copy=True)

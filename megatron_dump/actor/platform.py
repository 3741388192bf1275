"""The device the actor runs on: CUDA with NCCL, or CPU with gloo.

megatron-core has no CPU path. Everything it needs to run there is in this file: a table of patches, each with its
reason and with what would let it go. `enable()` applies them once, in the process that trains, and does nothing where
CUDA is present. A patch whose target has disappeared fails loudly: then upstream changed, and the reason must be
looked at again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import Any

import torch

from megatron_dump.actor import megatron_versions
from megatron_dump.actor.adam import GroupStepAdam

CPU = torch.device("cpu")
_FACTORIES = [
    "tensor",
    "zeros",
    "ones",
    "empty",
    "full",
    "arange",
    "rand",
    "randn",
    "zeros_like",
    "ones_like",
    "empty_like",
    "full_like",
]
_CUDA_TYPE_NAMES = {f"torch.{t}Tensor": f"torch.cuda.{t}Tensor" for t in ("Float", "Half", "BFloat16")}


@dataclasses.dataclass(frozen=True)
class Platform:
    """Where tensors live and which collectives library moves them."""

    device: torch.device
    backend: str  # of torch.distributed


@dataclasses.dataclass(frozen=True)
class Patch:
    """One change to a library that makes it run without CUDA."""

    target: str
    reason: str
    until: str
    apply: Callable[[], None]


def enable(local_rank: int = 0) -> Platform:
    """Select this process's device; on a machine without CUDA, patch torch and megatron-core once.

    Raises AttributeError when a patch's target is gone (an untried megatron-core), ValueError when this node has fewer
    GPUs than ranks.
    """
    if local_rank == 0:
        megatron_versions.warn_of_newer()
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"trainer.devices: local rank {local_rank} has no GPU, this node has {torch.cuda.device_count()}; "
                "start one rank a GPU, or set CUDA_VISIBLE_DEVICES= to run on CPU"
            )
        torch.cuda.set_device(local_rank)
        replace_missing_kernels()
        return Platform(torch.device("cuda", local_rank), "nccl")
    if not getattr(torch, "_megatron_dump_cpu", False):
        for patch in PATCHES:
            patch.apply()
        torch._megatron_dump_cpu = True
    return Platform(CPU, "gloo")


def replace_missing_kernels() -> None:
    """Without a fused Adam, and without Transformer Engine, CUDA has the same trouble as the CPU.

    What there is, is megatron-core's answer: it has tried to import the very names it uses. A package's name says
    less: PyPI's `apex` is not NVIDIA's.
    """
    import megatron.core.optimizer as optimizer
    import megatron.core.transformer.moe.moe_utils as moe_utils

    if optimizer.USING_PYTORCH_OPTIMIZER:
        _adam()
    if not moe_utils.HAVE_TE:
        _router()


def _replace(owner: Any, name: str, value: Any) -> None:
    if not hasattr(owner, name):
        raise AttributeError(f"CPU patch: {getattr(owner, '__name__', owner)}.{name} is gone; see actor/platform.py")
    setattr(owner, name, value)


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


class _Stream:
    """The one stream a CPU has: all work is already in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    wait_stream = wait_event = synchronize = _nothing

    def record_event(self, event: Any = None) -> Any:
        return event or _Event()


class _Event:
    """Times nothing: the host's clock is the only one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    record = wait = synchronize = _nothing

    def elapsed_time(self, end: Any) -> float:
        return 0.0


def _is_cuda(device: Any) -> bool:
    bare_index = isinstance(device, int) and not isinstance(device, bool)
    return bare_index or str(device).startswith("cuda")


def _devices() -> None:
    _replace(torch.cuda, "current_device", lambda: CPU)
    _replace(torch.cuda, "set_device", _nothing)


def _random_state() -> None:
    import megatron.core.tensor_parallel.random as megatron_random

    _replace(torch.cuda, "get_rng_state", lambda *a, **k: torch.get_rng_state())
    _replace(torch.cuda, "set_rng_state", lambda state, *a, **k: torch.set_rng_state(state))
    _replace(torch.cuda, "manual_seed", torch.manual_seed)
    _replace(megatron_random, "_get_cuda_rng_state", lambda *a, **k: torch.get_rng_state())
    _replace(megatron_random, "_set_cuda_rng_state", lambda state, *a, **k: torch.set_rng_state(state))


def _factories() -> None:
    def on_cpu(factory: Callable) -> Callable:
        @functools.wraps(factory)
        def create(*args: Any, **kwargs: Any) -> Any:
            if kwargs.get("device") is not None and _is_cuda(kwargs["device"]):
                kwargs["device"] = CPU
            if kwargs.get("pin_memory"):
                kwargs["pin_memory"] = False
            return factory(*args, **kwargs)

        return create

    for name in _FACTORIES:
        _replace(torch, name, on_cpu(getattr(torch, name)))


def _moves() -> None:
    _replace(torch.Tensor, "cuda", lambda self, *a, **k: self)
    _replace(torch.nn.Module, "cuda", lambda self, *a, **k: self)


def _type_names() -> None:
    type_of = torch.Tensor.type

    def named_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = type_of(self, *args, **kwargs)
        asks_megatron = sys._getframe(1).f_globals.get("__name__", "").startswith("megatron.")
        return _CUDA_TYPE_NAMES.get(result, result) if asks_megatron and not args and not kwargs else result

    _replace(torch.Tensor, "type", named_type)


def _streams() -> None:
    for name in ("synchronize", "empty_cache", "set_stream"):
        _replace(torch.cuda, name, _nothing)
    _replace(torch.cuda, "Stream", _Stream)
    _replace(torch.cuda, "Event", _Event)
    for name in ("current_stream", "default_stream"):
        _replace(torch.cuda, name, _Stream)
    _replace(torch.cuda, "stream", lambda stream: contextlib.nullcontext())


def _compilation() -> None:
    torch.compiler.set_stance("force_eager")


def _adam() -> None:
    import megatron.core.optimizer as optimizer
    import megatron.core.optimizer.distrib_optimizer as distributed

    _replace(optimizer, "Adam", GroupStepAdam)
    _replace(optimizer, "USING_PYTORCH_OPTIMIZER", False)
    _replace(distributed, "Adam", GroupStepAdam)
    _replace(distributed, "HAVE_APEX_OR_TE", True)
    _replace(distributed, "USING_APEX_OPTIMIZER", True)


def _router() -> None:
    import megatron.core.transformer.moe.moe_utils as moe_utils

    moe_utils.te_general_gemm = None  # pyright: ignore[reportAttributeAccessIssue]


def _gradient_norm() -> None:
    import megatron.core.optimizer.clip_grads as clip_grads
    import megatron.core.optimizer.optimizer as optimizer
    from megatron.core import utils

    for module in (clip_grads, optimizer):
        _replace(module, "multi_tensor_applier", utils.local_multi_tensor_applier)
        _replace(module, "multi_tensor_scale_impl", utils.local_multi_tensor_scale)
    _replace(clip_grads, "l2_norm_impl", utils.local_multi_tensor_l2_norm)
    # From 0.17 on a kernel of Transformer Engine alone, whose presence makes the norm a tensor.
    clip_grads.multi_tensor_scale_tensor_impl = None  # pyright: ignore[reportAttributeAccessIssue]


def _all_to_all_splits() -> None:
    import megatron.core.transformer.moe.token_dispatcher as dispatcher

    def on_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    _replace(dispatcher, "maybe_move_tensor_to_cpu", on_cpu)


PATCHES = (
    Patch(
        "torch.cuda.current_device",
        "megatron-core allocates on the current CUDA device by name",
        "megatron-core asks torch.accelerator",
        _devices,
    ),
    Patch(
        "torch.cuda random state",
        "the tensor-parallel random tracker keeps CUDA generator states",
        "the tracker takes a device",
        _random_state,
    ),
    Patch(
        "torch tensor factories",
        "device='cuda' is written out in the optimizer, schedules and checkpoints",
        "megatron-core passes a device through",
        _factories,
    ),
    Patch(
        "Tensor.cuda, Module.cuda",
        "checkpoint exchange and pipelines move tensors with .cuda()",
        "megatron-core passes a device through",
        _moves,
    ),
    Patch(
        "Tensor.type", "optimizers compare type names with 'torch.cuda.FloatTensor'", "they compare dtypes", _type_names
    ),
    Patch(
        "torch.cuda streams",
        "pipelines and gradient buckets synchronise CUDA streams",
        "they skip it without CUDA",
        _streams,
    ),
    Patch(
        "torch.compile",
        "it fuses a few of the router's operations, which needs a C++ compiler and fails on torch "
        "functions that are replaced",
        "megatron-core can be told not to compile",
        _compilation,
    ),
    Patch(
        "megatron.core.optimizer.Adam",
        "restoring the distributed optimizer from torch's Adam is broken upstream",
        "upstream restores torch.optim.AdamW",
        _adam,
    ),
    Patch(
        "megatron.core.optimizer: gradient norm and clipping",
        "they take kernels of Transformer Engine or Apex where one is installed",
        "they look at the tensors' device",
        _gradient_norm,
    ),
    Patch(
        "megatron.core.transformer.moe.moe_utils.te_general_gemm",
        "the router takes Transformer Engine's, and looks for its name also where it is not installed",
        "it looks at the tensors' device",
        _router,
    ),
    Patch(
        "megatron.core.transformer.moe.token_dispatcher.maybe_move_tensor_to_cpu",
        "all-to-all split sizes become numpy arrays only when they come from CUDA",
        "it converts CPU tensors too",
        _all_to_all_splits,
    ),
)

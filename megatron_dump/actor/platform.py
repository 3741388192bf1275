"""The device the actor runs on: CUDA with NCCL, or CPU with gloo.

megatron-core has no CPU path. Everything it needs to run there is in this file: a table of patches, each with its
reason and with what would let it go. `enable()` applies them once, in the process that trains, and does nothing where
CUDA is present. A patch whose target has disappeared fails loudly: then upstream changed, and the reason must be
looked at again. Shown with megatron-core 0.16.1.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import torch

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

    Raises AttributeError when a patch's target is gone (an unsupported megatron-core), ValueError when this node has
    fewer GPUs than ranks.
    """
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"trainer.devices: local rank {local_rank} has no GPU, this node has {torch.cuda.device_count()}; "
                "start one rank a GPU, or set CUDA_VISIBLE_DEVICES= to run on CPU"
            )
        torch.cuda.set_device(local_rank)
        if not any(importlib.util.find_spec(name) for name in ("transformer_engine", "apex")):
            _adam()  # without a fused Adam, CUDA has the same trouble as the CPU
        return Platform(torch.device("cuda", local_rank), "nccl")
    if not getattr(torch, "_megatron_dump_cpu", False):
        for patch in PATCHES:
            patch.apply()
        torch._megatron_dump_cpu = True
    return Platform(CPU, "gloo")


def _replace(owner: Any, name: str, value: Any) -> None:
    if not hasattr(owner, name):
        raise AttributeError(f"CPU patch: {getattr(owner, '__name__', owner)}.{name} is gone; see actor/platform.py")
    setattr(owner, name, value)


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


class _Stream:
    """The one stream a CPU has: all work is already in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    wait_stream = wait_event = synchronize = record_event = _nothing


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


def _adam() -> None:
    import megatron.core.optimizer as optimizer
    import megatron.core.optimizer.distrib_optimizer as distributed

    _replace(optimizer, "Adam", GroupStepAdam)
    _replace(optimizer, "USING_PYTORCH_OPTIMIZER", False)
    _replace(distributed, "Adam", GroupStepAdam)
    _replace(distributed, "HAVE_APEX_OR_TE", True)
    _replace(distributed, "USING_APEX_OPTIMIZER", True)


class GroupStepAdam(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter, 1711.05101) whose step count lives in the parameter group, as in FusedAdam.

    megatron-core's distributed optimizer saves and restores `step` per group; torch's Adam keeps it per parameter.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
    ) -> None:
        if not adam_w_mode:
            raise ValueError("model.optim: the CPU optimizer is AdamW; set decoupled_weight_decay=true")
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, bias_correction=True))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update(group, params)

    def _update(self, group: dict, params: list[torch.Tensor]) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p] = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        grads = [p.grad for p in params]
        mean = [self.state[p]["exp_avg"] for p in params]
        square = [self.state[p]["exp_avg_sq"] for p in params]
        (beta1, beta2), step, lr = group["betas"], group["step"], group["lr"]
        torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        torch._foreach_lerp_(mean, grads, 1 - beta1)
        torch._foreach_mul_(square, beta2)
        torch._foreach_addcmul_(square, grads, grads, 1 - beta2)
        denominator = torch._foreach_sqrt(square)
        torch._foreach_div_(denominator, (1 - beta2**step) ** 0.5)
        torch._foreach_add_(denominator, group["eps"])
        torch._foreach_addcdiv_(params, mean, denominator, -lr / (1 - beta1**step))


PATCHES = (
    Patch("torch.cuda.current_device", "megatron-core allocates on the current CUDA device by name",
          "megatron-core asks torch.accelerator", _devices),
    Patch("torch.cuda random state", "the tensor-parallel random tracker keeps CUDA generator states",
          "the tracker takes a device", _random_state),
    Patch("torch tensor factories", "device='cuda' is written out in the optimizer, schedules and checkpoints",
          "megatron-core passes a device through", _factories),
    Patch("Tensor.cuda, Module.cuda", "checkpoint exchange and pipelines move tensors with .cuda()",
          "megatron-core passes a device through", _moves),
    Patch("Tensor.type", "optimizers compare type names with 'torch.cuda.FloatTensor'",
          "they compare dtypes", _type_names),
    Patch("torch.cuda streams", "pipelines and gradient buckets synchronise CUDA streams",
          "they skip it without CUDA", _streams),
    Patch("megatron.core.optimizer.Adam", "restoring the distributed optimizer from torch's Adam is broken upstream",
          "upstream restores torch.optim.AdamW", _adam),
)  # fmt: skip

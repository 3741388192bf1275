"""AdamW with the state that megatron-core's distributed optimizer expects, for where no fused kernel is installed."""

from __future__ import annotations

from typing import Any

import torch


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
        capturable: bool = False,
    ) -> None:
        """The arguments that megatron-core gives to FusedAdam, from 0.17 on with `capturable` (by CUDA graphs)."""
        if not adam_w_mode:
            raise ValueError("model.optim: the CPU optimizer is AdamW; set decoupled_weight_decay=true")
        if capturable:
            raise ValueError("model.optim: the CPU optimizer runs in no CUDA graph; set optimizer_cuda_graph=false")
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

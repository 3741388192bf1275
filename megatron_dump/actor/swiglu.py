"""The feed-forward layer with SwiGLU as one autograd step: less memory and fewer copies than its pieces."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.mlp import MLP
from torch import Tensor


class _SwiGLU(torch.autograd.Function):
    """[..., 2F] -> [..., F]: silu(gate) × up (Shazeer, 2002.05202). Keeps its input only.

    The two halves' gradients are written where they belong; autograd's own would be concatenated.
    """

    @staticmethod
    def forward(ctx: Any, gate_and_up: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(gate_and_up)
        gate, up = gate_and_up.chunk(2, -1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (gate_and_up,) = ctx.saved_tensors
        gate, up = gate_and_up.chunk(2, -1)
        result = torch.empty_like(gate_and_up)
        d_gate, d_up = result.chunk(2, -1)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=d_gate)
        torch.mul(grad, F.silu(gate), out=d_up)
        return result


class SwiGLUMLP(MLP):
    """megatron-core's MLP for a dense SwiGLU without bias: what its fused kernels do where Transformer Engine is."""

    def forward(
        self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        if per_token_scale is not None or self.config.add_bias_linear or self.config.activation_func is not F.silu:
            return super().forward(hidden_states, per_token_scale, **kwargs)
        gate_and_up, _ = self.linear_fc1(hidden_states)
        if not torch.is_grad_enabled():  # generation: an autograd function costs more than what it does on few tokens
            gate, up = gate_and_up.chunk(2, -1)
            return self.linear_fc2(F.silu(gate).mul_(up))
        return self.linear_fc2(_SwiGLU.apply(gate_and_up))  # pyright: ignore[reportArgumentType, reportReturnType]

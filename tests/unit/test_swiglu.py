"""SwiGLU as one autograd step against its definition and finite differences."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megatron_dump.actor.swiglu import _SwiGLU


def test_swiglu_equals_its_definition_and_finite_differences():
    x = torch.randn(3, 2, 10, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(_SwiGLU.apply(x), F.silu(x[..., :5]) * x[..., 5:])
    assert torch.autograd.gradcheck(_SwiGLU.apply, x)


def test_bf16_differs_from_fp32_by_rounding_alone():
    x = torch.randn(64, 32, dtype=torch.bfloat16, requires_grad=True)
    exact = x.detach().float().requires_grad_()
    for tensor in (x, exact):
        _SwiGLU.apply(tensor).sum().backward()
    torch.testing.assert_close(x.grad.float(), exact.grad, rtol=3e-2, atol=3e-2)

"""Weight gradients added up inside the multiplication that makes them: a kernel of Apex, whose arithmetic stands in."""

from __future__ import annotations

import types

import pytest
from megatron.core.tensor_parallel import layers

from megatron_dump.actor import model
from tests.distributed.launch import run_ranks
from tests.distributed.tiny import make_actor, train_one_step, write_model


def _train(path: str, tensor: int, pipeline: int, is_fused: bool) -> tuple[list[dict[str, float]], int]:
    """Metrics of three steps, and how often the kernel was called. In a forked rank: nothing is undone."""
    calls = []

    def add_weight_gradient(inputs, grads, total):
        calls.append(total.shape)
        total.addmm_(grads.t(), inputs)

    if is_fused:
        kernels = types.SimpleNamespace(wgrad_gemm_accum_fp32=add_weight_gradient)
        layers.fused_weight_gradient_mlp_cuda = kernels  # pyright: ignore[reportAttributeAccessIssue]
        layers._grad_accum_fusion_available = True
        model.fused_weight_gradients = lambda: True
    settings = {"sequence_parallel": tensor > 1, "micro_batch_size": 2}
    actor = make_actor(path, tensor, pipeline, model=settings)
    return [train_one_step(actor, seed) for seed in range(3)], len(calls)


@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe"])
@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 2)])
def test_training_is_the_same(family, tensor, pipeline, tmp_path):
    write_model(str(tmp_path), tied=family == "qwen2", family=family)
    plain, fused = (
        run_ranks(lambda on=on: _train(str(tmp_path), tensor, pipeline, on), tensor * pipeline) for on in (False, True)
    )
    for (expected, without), (metrics, calls) in zip(plain, fused, strict=True):
        assert without == 0 and calls > 3 * 4  # more than once a layer and step
        for ours, theirs in zip(metrics, expected, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)


def test_no_kernel_of_a_gpu_is_used_on_cpu(monkeypatch):
    monkeypatch.setattr(layers, "_grad_accum_fusion_available", True)
    assert not model.fused_weight_gradients()
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert model.fused_weight_gradients()
    monkeypatch.setattr(layers, "_grad_accum_fusion_available", False)
    assert not model.fused_weight_gradients()

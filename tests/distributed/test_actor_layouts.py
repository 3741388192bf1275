"""Every parallelism against one rank: metrics of three optimizer steps, and the weights behind them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_dump.actor import convert
from tests.distributed.launch import run_ranks
from tests.distributed.tiny import FAMILIES, check_trained_alike, make_actor, train_one_step, write_model

TP2, PP2, CP2, EP2 = (
    {f"{kind}_parallel_size": 2} for kind in ("tensor_model", "pipeline_model", "context", "expert_model")
)
SP = {"sequence_parallel": True}
VPP2 = {**PP2, "virtual_pipeline_model_parallel_size": 2, "micro_batch_size": 2}  # as many micro-batches as stages
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
WHOLE_EXPERTS = {"expert_tensor_parallel_size": 1}
# and log-probabilities of three tokens at a time
DYNAMIC = {"dynamic_batching": {"enabled": True, "train_mb_tokens": 64}, "grpo": {"logprob_chunk_size": 3}}
LAYOUTS = {  # model family, ranks, keys of `model:`
    "TP2": ("qwen3", 2, TP2),
    "PP2": ("qwen2", 2, PP2),
    "DP2": ("qwen2", 2, {}),
    "DP2-whole-optimizer": ("qwen2", 2, {"use_distributed_optimizer": False}),
    "DP2-overlap": ("qwen2", 2, {"overlap_grad_reduce": True, "micro_batch_size": 2}),
    "TP2xPP2": ("qwen2", 4, {**TP2, **PP2}),
    "TP2xPP2xDP2": ("qwen2", 8, {**TP2, **PP2}),
    "PP2xVPP2": ("qwen2", 2, VPP2),
    "TP2xSP": ("qwen3", 2, {**TP2, **SP}),
    "TP2xSPxPP2xVPP2": ("llama", 4, {**TP2, **SP, **VPP2}),
    "CP2": ("qwen2", 2, CP2),
    "TP2xCP2": ("qwen2", 4, {**TP2, **CP2}),
    "TP2xSPxCP2xDP2": ("qwen2", 8, {**TP2, **SP, **CP2}),
    "PP2xCP2": ("qwen2", 4, {**PP2, **CP2}),
    "EP2": ("qwen3_moe", 2, EP2),
    "EP2-whole-optimizer": ("qwen3_moe", 2, {**EP2, "use_distributed_optimizer": False}),
    "EP2xPP2": ("qwen3_moe", 4, {**EP2, **PP2}),
    "EP2xCP2": ("qwen3_moe", 2, {**EP2, **CP2}),
    "EP2xTP2xSP": ("qwen2_moe", 4, {**EP2, **TP2, **SP, **WHOLE_EXPERTS}),
    "split experts": ("qwen3_moe", 2, {**TP2, **SP}),
    "full recompute": ("qwen2", 1, FULL),
    "full recompute, TP2xSPxPP2": ("qwen2", 4, {**FULL, **TP2, **SP, **PP2}),
    "selective recompute": ("qwen2", 1, {"recompute_granularity": "selective"}),
    "full recompute, EP2": ("qwen3_moe", 2, {**FULL, **EP2}),
    "dynamic micro-batches, TP2xSPxPP2": ("llama", 4, {**TP2, **SP, **PP2, **DYNAMIC}),
    "dynamic micro-batches, EP2xCP2": ("qwen3_moe", 2, {**EP2, **CP2, **DYNAMIC}),
    "micro-batches of 1": ("qwen2", 1, {"micro_batch_size": 1}),
    "micro-batches of 8": ("qwen2", 1, {"micro_batch_size": 8}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of each family; qwen2 is tied, so that its embedding has gradients from both ends of a pipeline."""
    paths = {family: str(tmp_path_factory.mktemp(family)) for family in FAMILIES}
    for family, path in paths.items():
        write_model(path, tied=family == "qwen2", family=family)
    return paths


def _train(path: str, **model) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    actor = make_actor(path, model=model)
    # Adam divides by the gradient's size plus eps. Where a gradient is a rounding error alone, the default 1e-8 makes
    # of it a step as large as any other, and no two orders of summation agree. 1e-4 is far above the rounding of
    # these gradients, and below most of them.
    for group in actor.optimizer.param_groups:
        group["eps"] = 1e-4
    metrics = [train_one_step(actor, seed) for seed in range(3)]
    return metrics, {name: w.clone() for name, w in convert.named_hf_weights(actor.modules, actor.arch, actor.parallel)}


@pytest.fixture(scope="module")
def single(folders):
    return {family: run_ranks(_train, 1, path)[0] for family, path in folders.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_equals_one_rank(folders, single, layout):
    family, world, model = LAYOUTS[layout]
    expected, expected_weights = single[family]
    results = run_ranks(lambda: _train(folders[family], **model), world)
    check_trained_alike(results, expected, expected_weights)


@pytest.mark.parametrize("layout", ["split experts", "EP2xCP2", "PP2"])
def test_the_load_balancing_losses_equal_one_ranks(folders, layout):
    """They are of a micro-batch: the same where a layout leaves micro-batches as they are."""
    losses = {"moe_aux_loss_coeff": 0.3, "moe_z_loss_coeff": 0.1}
    _, world, model = LAYOUTS[layout]
    (expected, weights), (without, _) = (
        run_ranks(lambda m=m: _train(folders["qwen3_moe"], **m), 1)[0] for m in (losses, {})
    )
    assert expected[0]["actor/grad_norm"] > 1.01 * without[0]["actor/grad_norm"]
    for metrics, ours in run_ranks(lambda: _train(folders["qwen3_moe"], **model, **losses), world):
        assert metrics[2]["actor/grad_norm"] == pytest.approx(expected[2]["actor/grad_norm"], rel=1e-5)
        for name, weight in ours.items():
            np.testing.assert_allclose(weight, weights[name], rtol=0, atol=1e-5, err_msg=name)


def test_the_steps_move_the_weights_far_more_than_layouts_differ(single, folders):
    for family, path in folders.items():
        start = run_ranks(_weights, 1, path)[0]
        moved = torch.cat([(w - start[name]).abs().flatten() for name, w in single[family][1].items()])
        assert moved.median() > 1e-3, family  # 100 times the tolerance above


def _weights(path: str) -> dict[str, torch.Tensor]:
    actor = make_actor(path)
    return {name: w.clone() for name, w in convert.named_hf_weights(actor.modules, actor.arch, actor.parallel)}

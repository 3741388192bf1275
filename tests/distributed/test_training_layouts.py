"""Whole runs of examples/train_gpt_grpo.py under each parallelism: generated there, replayed on one rank."""

from __future__ import annotations

import shutil

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from tests.distributed.runs import MODEL, make_data, rows, train

STEPS = 2
RESHARD = {"trainer.grpo.inference_backend.reshard": "true"}
ROWS = {"model.share_prompts": "false"}
SPLIT = {"trainer.grpo.inference_backend.reshard": "false"}
LAYOUTS = {  # ranks, tensor, pipeline, other keys
    "TP2xSP": (2, 2, 1, {**SPLIT, "model.sequence_parallel": "true"}),
    "PP2xVPP2": (2, 1, 2, {**RESHARD, **ROWS, "model.virtual_pipeline_model_parallel_size": 2}),
    "CP2xDP2": (4, 1, 1, {**RESHARD, **ROWS, "model.context_parallel_size": 2}),
    "EP2": (2, 1, 1, {**RESHARD, "model.expert_model_parallel_size": 2}),
    "EP2 split": (2, 1, 1, {**SPLIT, "model.expert_model_parallel_size": 2}),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """A random model with experts and kk-tiny's tokenizer."""
    folder = tmp_path_factory.mktemp("experts")
    shutil.copytree(MODEL, folder, dirs_exist_ok=True)
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=Qwen3MoeConfig.from_pretrained(MODEL).vocab_size,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        norm_topk_prob=True,
        max_position_embeddings=512,
        eos_token_id=0,
        tie_word_embeddings=False,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_equals_one_rank(data, experts, tmp_path, layout):
    world, tensor, pipeline, keys = LAYOUTS[layout]
    common = {
        "trainer.grpo.max_steps": STEPS,
        "trainer.grpo.save_interval": 0,
        "trainer.grpo.run_validation_step_0": "false",
        "trainer.grpo.num_prompts_per_grpo_step": 4,
        "model.global_batch_size": 8,
        "model.micro_batch_size": 2,
        "model.optim.lr": 2e-4,
        "model.grpo.length_params.max_length": 32,
    }
    if layout.startswith("EP2"):
        common["pretrained_checkpoint.restore_from_path"] = experts
    split, one = tmp_path / "split", tmp_path / "one"
    recording = tmp_path / "rollouts"
    record = {"trainer.grpo.inference_backend.record": recording}
    train(world, data, split, tensor, pipeline, **common, **keys, **record)
    replay = {"trainer.grpo.inference_backend.type": "recorded", "trainer.grpo.inference_backend.path": recording}
    train(1, data, one, **common, **replay)
    assert len(rows(split)) == len(rows(one)) == STEPS
    for ours, theirs in zip(rows(split), rows(one), strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours:
            if not key.startswith(("timing_s/", "perf/")):
                assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-4), (ours["step"], key)
        assert ours["actor/grad_norm"] > 0
        assert ours["rollout/logprob_diff_max"] < 1e-4

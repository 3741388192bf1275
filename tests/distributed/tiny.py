"""A random tiny model, its configuration and rollouts on it, for tests on several ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from megatron_dump import config as schema
from megatron_dump.actor import parallel
from megatron_dump.actor.actor import MegatronGPTGRPOActor
from megatron_dump.actor.layout import layout_of
from megatron_dump.types import Completion

VOCABULARY = 61  # not a multiple of anything: exercises the padding of the embedding
STOP = 0


_EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
FAMILIES = {
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "llama": ("llama", {}),
    "qwen3_moe": (
        "qwen3_moe",
        {**_EXPERTS, "norm_topk_prob": True, "head_dim": 16, "mlp_only_layers": [2]},
    ),
    "qwen2_moe": (
        "qwen2_moe",
        {**_EXPERTS, "norm_topk_prob": False, "shared_expert_intermediate_size": 40},
    ),
}


def write_model(path: str, seed: int = 0, tied: bool = True, family: str = "qwen2") -> PreTrainedModel:
    """A random model as a Hugging Face folder, and as transformers has it."""
    torch.manual_seed(seed)
    model_type, options = FAMILIES[family]
    config = AutoConfig.for_model(
        model_type,
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rms_norm_eps=1e-6,
        tie_word_embeddings=tied,
        eos_token_id=STOP,
        bos_token_id=None,
        initializer_range=0.2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        **options,
    )
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith(("norm.weight", "bias")):  # HF starts them at 1 and 0, which would hide mistakes
            torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.2)
    model.save_pretrained(path)
    return model.eval()


def make_config(path: str, tensor: int = 1, pipeline: int = 1, **overrides) -> schema.Config:
    """A configuration of the tiny model; overrides are nested blocks, `model={…}`."""
    base = OmegaConf.create(
        {
            "trainer": {
                "grpo": {
                    "max_steps": 10,
                    "num_prompts_per_grpo_step": 4,
                    "samples_per_prompt": 4,
                    "initial_policy_kl_penalty": 0.1,
                }
            },
            "pretrained_checkpoint": {"restore_from_path": path},
            "model": {
                "tensor_model_parallel_size": tensor,
                "pipeline_model_parallel_size": pipeline,
                "micro_batch_size": 4,
                "global_batch_size": 16,
                "make_vocab_size_divisible_by": 8,
                "optim": {"lr": 1e-2},
                "data": {"train_files": ["none"]},
                "grpo": {"sampling_params": {"temperature": 0.7}},
            },
            "exp_manager": {"explicit_log_dir": "none"},
        }
    )
    return schema.load(OmegaConf.merge(base, OmegaConf.create(overrides)))


def make_actor(path: str, tensor: int = 1, pipeline: int = 1, **overrides) -> MegatronGPTGRPOActor:
    config = make_config(path, tensor, pipeline, **overrides)
    grid = parallel.initialize(layout_of(config.model), timeout_s=60)
    return MegatronGPTGRPOActor(config, grid)


def random_rollouts(n: int, seed: int = 0) -> tuple[list[np.ndarray], list[Completion], np.ndarray]:
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(1, VOCABULARY, rng.integers(3, 9)) for _ in range(n)]
    completions = []
    for i in range(n):
        tokens = rng.integers(0, VOCABULARY, rng.integers(1, 14))
        logprobs = rng.normal(-2, 0.1, len(tokens)).astype(np.float32)
        completions.append(Completion(i // 4, i % 4, tokens, logprobs, True, 0))
    return prompts, completions, rng.normal(size=n)


def share_of(actor: MegatronGPTGRPOActor, seed: int = 0, n: int = 16):
    """This rank's TrainBatch of n global rollouts."""
    prompts, completions, advantages = random_rollouts(n, seed)
    total = float(sum(len(c.token_ids) for c in completions))
    rows = np.array_split(np.arange(n), actor.parallel.data_size)[actor.parallel.data_rank]
    return actor.make_batch([prompts[i] for i in rows], [completions[i] for i in rows], advantages[rows], total)


def train_one_step(actor: MegatronGPTGRPOActor, seed: int) -> dict[str, float]:
    """An optimizer step on `share_of(actor, seed)`, as if the policy had moved since: exercises ratio and clipping."""
    batch = share_of(actor, seed)
    batch.old_logprobs = actor.compute_logprobs(batch)
    if batch.old_logprobs is not None:
        batch.old_logprobs = batch.old_logprobs + 0.3 * np.sin(np.arange(batch.tokens.shape[1], dtype=np.float32))
    batch.ref_logprobs = actor.compute_logprobs(batch, reference=True)
    return actor.train_step(batch)


def check_trained_alike(results, expected, expected_weights) -> None:
    """Ranks' (metrics of each step, their weights by name in the whole model) against one rank's: within 1e-5."""
    for metrics, weights in results:
        for ours, theirs in zip(metrics, expected, strict=True):
            assert ours.keys() == theirs.keys()
            for key in ours:
                assert ours[key] == pytest.approx(theirs[key], rel=1e-5, abs=1e-5), key
        for name, weight in weights.items():
            np.testing.assert_allclose(weight, expected_weights[name], rtol=0, atol=1e-5, err_msg=name)
    assert {name for _, weights in results for name in weights} == set(expected_weights)

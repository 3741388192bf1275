"""What both sides train on: a random or given Qwen2, rollouts of random tokens, the settings of our actor."""

from __future__ import annotations

import dataclasses
import pathlib

import numpy as np
import torch
from omegaconf import OmegaConf
from transformers import Qwen2Config, Qwen2ForCausalLM

from megatron_dump.actor.actor import MegatronGPTGRPOActor
from megatron_dump.actor.parallel import Parallel
from megatron_dump.config import load
from megatron_dump.types import Completion, TrainBatch

KL_PENALTY, LEARNING_RATE = 0.02, 1e-5


@dataclasses.dataclass(frozen=True)
class Shape:
    """A Qwen2 and how its rollouts are cut."""

    hidden: int
    layers: int
    heads: int
    groups: int
    ffn: int
    vocabulary: int
    prompt: tuple[int, int]  # tokens, at least and below
    completion: tuple[int, int]
    rows: int  # of an optimizer step
    micro: int  # of a forward and backward pass


SMALL = Shape(128, 4, 4, 2, 512, 81, (60, 110), (20, 192), 32, 16)  # kk-tiny's
MIDDLE = Shape(256, 4, 8, 2, 704, 8192, (40, 80), (60, 180), 16, 4)
QWEN_05B = Shape(896, 24, 14, 2, 4864, 151936, (200, 400), (400, 1600), 64, 8)  # Qwen2.5-0.5B's


def write_model(shape: Shape, path: pathlib.Path, dtype: torch.dtype = torch.float32) -> None:
    """Random weights, tied embeddings as in Qwen2.5-0.5B."""
    torch.manual_seed(0)
    hf = Qwen2Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.groups,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        eos_token_id=0,
        bos_token_id=None,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )
    Qwen2ForCausalLM(hf).to(dtype).save_pretrained(path)


def make_actor(
    path: pathlib.Path, shape: Shape, grid: Parallel, precision: str = "32", dynamic: dict | None = None
) -> MegatronGPTGRPOActor:
    """Ours, at the defaults of gpt_grpo.yaml but for the sizes and the penalty."""
    config = load(
        OmegaConf.create(
            {
                "trainer": {
                    "precision": precision,
                    "grpo": {
                        "num_prompts_per_grpo_step": shape.rows // 8,
                        "samples_per_prompt": 8,
                        "initial_policy_kl_penalty": KL_PENALTY,
                    },
                },
                "pretrained_checkpoint": {"restore_from_path": str(path)},
                "model": {
                    "micro_batch_size": shape.micro,
                    "global_batch_size": shape.rows,
                    "make_vocab_size_divisible_by": 1,
                    "dynamic_batching": dynamic or {},
                    "data": {"train_files": ["none"]},
                    "optim": {"lr": LEARNING_RATE},
                },
                "exp_manager": {"explicit_log_dir": "none"},
            }
        )
    )
    return MegatronGPTGRPOActor(config, grid)


def make_batch(actor: MegatronGPTGRPOActor, shape: Shape) -> TrainBatch:
    """Random rollouts with the reference's log-probabilities of them."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1, shape.vocabulary, rng.integers(*shape.prompt)) for _ in range(shape.rows)]
    answers = [rng.integers(1, shape.vocabulary, rng.integers(*shape.completion)) for _ in range(shape.rows)]
    completions = [
        Completion(i // 8, i % 8, tokens, np.zeros(len(tokens), np.float32), True, 0)
        for i, tokens in enumerate(answers)
    ]
    batch = actor.make_batch(prompts, completions, rng.normal(size=shape.rows), float(sum(map(len, answers))))
    batch.ref_logprobs = actor.compute_logprobs(batch, reference=True)
    return batch

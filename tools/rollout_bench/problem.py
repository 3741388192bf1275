"""What every side generates: completions of one length, on one random model of 3 M parameters."""

from __future__ import annotations

import dataclasses
import pathlib

import numpy as np
import torch
from omegaconf import OmegaConf
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from megatron_dump.actor import parallel
from megatron_dump.actor.actor import MegatronGPTGRPOActor
from megatron_dump.actor.layout import layout_of
from megatron_dump.config import load
from megatron_dump.rollout import Request
from megatron_dump.rollout.sampling import SamplingOptions
from megatron_dump.types import Prompt

VOCABULARY = 1024
_SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=256,
    intermediate_size=704,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=2,
    max_position_embeddings=2048,
    tie_word_embeddings=True,
    eos_token_id=0,
    bos_token_id=None,
    rope_parameters={"rope_type": "default", "rope_theta": 1e4},
)


@dataclasses.dataclass(frozen=True)
class Work:
    """`prompts` × `samples` completions of exactly `tokens` tokens behind prompts of `prompt_tokens`."""

    prompts: int = 64
    samples: int = 8
    tokens: int = 64
    prompt_tokens: int = 32

    @property
    def total(self) -> int:
        return self.prompts * self.samples * self.tokens

    def __str__(self) -> str:
        return (
            f"{self.prompts} prompts × {self.samples} × {self.tokens} tokens, behind {self.prompt_tokens} tokens each"
        )

    def token_ids(self) -> np.ndarray:
        """int64 [prompts, prompt_tokens]."""
        return np.random.default_rng(0).integers(1, VOCABULARY, (self.prompts, self.prompt_tokens))

    def requests(self) -> list[Request]:
        return [Request(i, Prompt(i, "source", ids, ""), self.samples) for i, ids in enumerate(self.token_ids())]

    @property
    def options(self) -> SamplingOptions:
        """From the whole distribution, as every side samples; the stop token cannot be drawn."""
        return SamplingOptions(max_length=self.tokens, stop_ids=(VOCABULARY,))


def write_model(path: pathlib.Path, experts: bool = False) -> None:
    torch.manual_seed(0)
    if experts:
        sizes = dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=352, norm_topk_prob=True, head_dim=32)
        Qwen3MoeForCausalLM(Qwen3MoeConfig(**_SIZES, **sizes)).save_pretrained(path)
    else:
        Qwen2ForCausalLM(Qwen2Config(**_SIZES)).save_pretrained(path)


def make_actor(path: pathlib.Path, **layout: object) -> MegatronGPTGRPOActor:
    """`layout`: keys of `model:`."""
    config = load(
        OmegaConf.create(
            {
                "trainer": {"grpo": {"initial_policy_kl_penalty": 0.0}},
                "pretrained_checkpoint": {"restore_from_path": str(path)},
                "model": {"data": {"train_files": ["none"]}, **layout},
                "exp_manager": {"explicit_log_dir": "none"},
            }
        )
    )
    return MegatronGPTGRPOActor(config, parallel.initialize(layout_of(config.model)))

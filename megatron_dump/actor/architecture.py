"""What of a Hugging Face configuration decides a model's shape: Qwen2/2.5, Qwen3, Llama 3, Qwen2-MoE, Qwen3-MoE."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

from transformers import AutoConfig, PretrainedConfig

_MODEL_TYPES = ("qwen2", "qwen3", "llama", "qwen2_moe", "qwen3_moe")


@dataclasses.dataclass(frozen=True)
class Experts:
    """The mixture of experts of a model's sparse layers."""

    number: int
    intermediate_size: int  # of one expert
    per_token: int
    normalized: bool  # the chosen experts' weights add up to 1 (norm_topk_prob)
    sparse: tuple[bool, ...]  # [layers], which have experts; the others are dense
    shared_intermediate_size: int | None  # of the expert that every token passes, behind a gate (Qwen2-MoE)


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What of a Hugging Face configuration decides the shape of the Megatron model."""

    hf: PretrainedConfig
    vocab_size: int  # of the checkpoint
    padded_vocab_size: int  # a multiple of make_vocab_size_divisible_by × tensor-parallel size
    tied: bool
    head_dim: int
    rotary_base: float
    qkv_bias: bool
    qk_layernorm: bool
    experts: Experts | None = None  # None: a dense model


def read_architecture(path: str, divisible_by: int, tensor_size: int) -> Architecture:
    """Read PATH/config.json. FileNotFoundError or ValueError with one clear line when it cannot be used."""
    if not (pathlib.Path(path) / "config.json").is_file():
        raise FileNotFoundError(
            f"pretrained_checkpoint.restore_from_path={path}: no config.json there; give a Hugging Face model folder"
        )
    try:
        hf = AutoConfig.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"pretrained_checkpoint.restore_from_path={path}: config.json: {reason}") from error
    if hf.model_type not in _MODEL_TYPES:
        raise ValueError(
            f"pretrained_checkpoint.restore_from_path={path}: model_type {hf.model_type!r} is not supported; "
            f"supported: {', '.join(_MODEL_TYPES)}"
        )
    rope: dict[str, Any] = getattr(hf, "rope_parameters", None) or {"rope_theta": getattr(hf, "rope_theta", 10000.0)}
    if rope.get("rope_type", "default") not in ("default", "llama3"):
        raise ValueError(f"{path}/config.json: rope_type {rope['rope_type']!r} is not supported; default or llama3 is")
    unit = divisible_by * tensor_size
    return Architecture(
        hf=hf,
        vocab_size=hf.vocab_size,
        padded_vocab_size=-(-hf.vocab_size // unit) * unit,
        tied=bool(hf.tie_word_embeddings),
        head_dim=getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
        rotary_base=float(rope["rope_theta"]),
        qkv_bias=bool(getattr(hf, "attention_bias", False) or getattr(hf, "qkv_bias", hf.model_type == "qwen2")),
        qk_layernorm=hf.model_type in ("qwen3", "qwen3_moe"),
        experts=_experts(hf, path),
    )


def _experts(hf: PretrainedConfig, path: str) -> Experts | None:
    if hf.model_type not in ("qwen2_moe", "qwen3_moe"):
        return None
    if hf.num_experts_per_tok == 1 and hf.norm_topk_prob:
        raise ValueError(
            f"{path}/config.json: norm_topk_prob with num_experts_per_tok=1 gives every expert the weight 1, which "
            "megatron-core's router does not do; use a model with more experts a token"
        )
    layers = range(hf.num_hidden_layers)
    return Experts(
        number=hf.num_experts,
        intermediate_size=hf.moe_intermediate_size,
        per_token=hf.num_experts_per_tok,
        normalized=hf.norm_topk_prob,
        sparse=tuple(i not in hf.mlp_only_layers and (i + 1) % hf.decoder_sparse_step == 0 for i in layers),
        shared_intermediate_size=hf.shared_expert_intermediate_size if hf.model_type == "qwen2_moe" else None,
    )

"""A Megatron GPTModel from a Hugging Face configuration: Qwen2/2.5, Qwen3, Llama 3."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from transformers import AutoConfig, PretrainedConfig

from megatron_dump.actor.attention import OffsetRotaryEmbedding, SDPACoreAttention
from megatron_dump.actor.parallel import Parallel

_MODEL_TYPES = ("qwen2", "qwen3", "llama")
_DTYPES = {"32": torch.float32, "bf16": torch.bfloat16}


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
    for name, size in (("attention heads", hf.num_attention_heads), ("key/value heads", hf.num_key_value_heads)):
        if size % tensor_size:
            raise ValueError(
                f"model.tensor_model_parallel_size={tensor_size} does not divide the {size} {name} of {path}: lower it"
            )
    unit = divisible_by * tensor_size
    return Architecture(
        hf=hf,
        vocab_size=hf.vocab_size,
        padded_vocab_size=-(-hf.vocab_size // unit) * unit,
        tied=bool(hf.tie_word_embeddings),
        head_dim=getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
        rotary_base=float(rope["rope_theta"]),
        qkv_bias=hf.model_type == "qwen2" or bool(getattr(hf, "attention_bias", False)),
        qk_layernorm=hf.model_type == "qwen3",
    )


def transformer_config(arch: Architecture, parallel: Parallel, precision: str) -> TransformerConfig:
    """Megatron's configuration of the model; `precision` is "32" or "bf16"."""
    hf, dtype = arch.hf, _DTYPES[precision]
    if hf.num_hidden_layers % parallel.pipeline_size:
        raise ValueError(
            f"model.pipeline_model_parallel_size={parallel.pipeline_size} does not divide the model's "
            f"{hf.num_hidden_layers} layers: choose a divisor"
        )
    return TransformerConfig(
        num_layers=hf.num_hidden_layers,
        hidden_size=hf.hidden_size,
        num_attention_heads=hf.num_attention_heads,
        num_query_groups=hf.num_key_value_heads,
        kv_channels=arch.head_dim,
        ffn_hidden_size=hf.intermediate_size,
        normalization="RMSNorm",
        layernorm_epsilon=hf.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=arch.qkv_bias,
        qk_layernorm=arch.qk_layernorm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor_size,
        pipeline_model_parallel_size=parallel.pipeline_size,
        pipeline_dtype=dtype,
        variable_seq_lengths=parallel.pipeline_size > 1,  # micro-batches are as long as their rows need
        moe_token_dispatcher_type="alltoall",  # the only one that goes with variable lengths; dense models have none
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=True,  # needs no CUDA random state; the weights come from the checkpoint
        # Fused kernels are Transformer Engine's and Apex's; the local spec has none.
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
    )


def layer_spec(arch: Architecture) -> ModuleSpec:
    """megatron-core's local layer with torch's fused attention as its core attention."""
    spec = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=arch.qk_layernorm)
    spec.submodules.self_attention.submodules.core_attention = SDPACoreAttention
    return spec


def build_model(
    arch: Architecture, config: TransformerConfig, parallel: Parallel, groups: ProcessGroupCollection | None = None
) -> GPTModel:
    """This pipeline stage's part of the model, weights not yet loaded; `groups`: others than megatron-core's own."""
    rope = getattr(arch.hf, "rope_parameters", None) or {}
    model = GPTModel(
        config=config,
        transformer_layer_spec=layer_spec(arch),
        vocab_size=arch.padded_vocab_size,
        max_sequence_length=arch.hf.max_position_embeddings,
        pre_process=parallel.is_first_stage,
        post_process=parallel.is_last_stage,
        parallel_output=True,
        share_embeddings_and_output_weights=arch.tied,
        position_embedding_type="rope",
        rotary_base=int(arch.rotary_base),
        rope_scaling=rope.get("rope_type") == "llama3",
        rope_scaling_factor=rope.get("factor", 8.0),
        pg_collection=groups,
    )
    model.rotary_pos_emb = OffsetRotaryEmbedding(model.rotary_pos_emb)
    return model.to(device=parallel.device, dtype=config.params_dtype)


def core_attentions(model: torch.nn.Module) -> list[SDPACoreAttention]:
    """The attention modules of this stage, in layer order."""
    return [m for m in model.modules() if isinstance(m, SDPACoreAttention)]

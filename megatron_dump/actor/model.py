"""A Megatron GPTModel of an architecture, in a layout."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import layers as megatron_layers
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dump.actor.architecture import Architecture
from megatron_dump.actor.attention import PositionedRotaryEmbedding, SDPACoreAttention
from megatron_dump.actor.layout import check_model
from megatron_dump.actor.parallel import Parallel
from megatron_dump.actor.spec import block_spec
from megatron_dump.actor.transformer_engine import transformer_engine_runs
from megatron_dump.config import ModelConfig

_DTYPES = {"32": torch.float32, "bf16": torch.bfloat16}


def transformer_config(
    arch: Architecture, parallel: Parallel, precision: str, options: ModelConfig | None = None
) -> TransformerConfig:
    """Megatron's configuration of the model; `precision` is "32" or "bf16", `options` are `model:` of the YAML."""
    hf, dtype, layout, options = arch.hf, _DTYPES[precision], parallel.layout, options or ModelConfig()
    check_model(arch, layout)
    fused = options.transformer_impl != "local" and transformer_engine_runs()
    if options.transformer_impl == "transformer_engine" and not fused:
        raise ValueError(
            "model.transformer_impl=transformer_engine: it needs the package transformer_engine and a GPU; install it, "
            "or set auto or local"
        )
    interleaved = layout.virtual_pipeline is not None
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
        **layout.sizes,
        sequence_parallel=layout.sequence,
        pipeline_dtype=dtype,
        # Micro-batches are as long as their rows need; the interleaved schedule wants them all alike.
        variable_seq_lengths=layout.pipeline > 1 and not interleaved,
        # The interleaved schedule on two stages sends to and receives from the same rank: batched, they get mixed up.
        batch_p2p_comm=not interleaved,
        overlap_p2p_comm=interleaved,
        recompute_granularity=options.recompute_granularity,
        recompute_method=options.recompute_method,
        recompute_num_layers=options.recompute_num_layers,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=True,  # needs no CUDA random state; the weights come from the checkpoint
        transformer_impl="transformer_engine" if fused else "local",
        bias_activation_fusion=fused,
        bias_dropout_fusion=fused,
        apply_rope_fusion=fused,
        gradient_accumulation_fusion=fused_weight_gradients(),
        masked_softmax_fusion=False,  # torch's attention has no use for it
        persist_layer_norm=False,
        **_expert_options(arch, options, fused),
    )


def fused_weight_gradients() -> bool:
    """Can linear layers add a weight's gradient to those of earlier micro-batches in the multiplication that makes it?

    With Transformer Engine too, megatron-core asks for Apex's kernel: the output layer is its own.
    """
    return torch.cuda.is_available() and megatron_layers._grad_accum_fusion_available


def _expert_options(arch: Architecture, options: ModelConfig, fused: bool) -> dict[str, Any]:
    # The other dispatcher wants as many tokens on every rank; micro-batches are as long as their rows.
    dispatcher, experts = {"moe_token_dispatcher_type": "alltoall"}, arch.experts
    if experts is None:
        return dispatcher
    return dispatcher | {
        "num_moe_experts": experts.number,
        "moe_ffn_hidden_size": experts.intermediate_size,
        "moe_layer_freq": [int(sparse) for sparse in experts.sparse],
        "moe_shared_expert_intermediate_size": experts.shared_intermediate_size,
        "moe_shared_expert_gate": experts.shared_intermediate_size is not None,
        "moe_router_topk": experts.per_token,
        # Softmax over the chosen logits is softmax over all of them, normalised over the chosen.
        "moe_router_pre_softmax": not experts.normalized,
        "moe_router_score_function": "softmax",
        "moe_router_dtype": options.moe_router_dtype,
        "moe_router_load_balancing_type": "aux_loss" if options.moe_aux_loss_coeff else "none",
        "moe_aux_loss_coeff": options.moe_aux_loss_coeff,
        "moe_z_loss_coeff": options.moe_z_loss_coeff,
        "moe_grouped_gemm": fused,
    }


def chunk_layers(config: TransformerConfig, parallel: Parallel, chunk: int = 0) -> range:
    """The layers (from 0) of a model chunk of this pipeline stage: chunks go round the stages in turn."""
    n = config.num_layers // (parallel.pipeline_size * (parallel.layout.virtual_pipeline or 1))
    first = (chunk * parallel.pipeline_size + parallel.pipeline_rank) * n
    return range(first, first + n)


def build_model(
    arch: Architecture,
    config: TransformerConfig,
    parallel: Parallel,
    groups: ProcessGroupCollection | None = None,
    chunk: int = 0,
) -> GPTModel:
    """One model chunk of this pipeline stage, weights not yet loaded; `groups`: others than megatron-core's own."""
    rope = getattr(arch.hf, "rope_parameters", None) or {}
    layers, interleaved = chunk_layers(config, parallel, chunk), parallel.layout.virtual_pipeline is not None
    model = GPTModel(
        config=config,
        transformer_layer_spec=block_spec(config, layers, parallel.tensor_group),  # pyright: ignore[reportArgumentType]
        vocab_size=arch.padded_vocab_size,
        max_sequence_length=arch.hf.max_position_embeddings,
        pre_process=layers.start == 0,
        post_process=layers.stop == config.num_layers,
        parallel_output=True,
        share_embeddings_and_output_weights=arch.tied,
        position_embedding_type="rope",
        rotary_base=int(arch.rotary_base),
        rope_scaling=rope.get("rope_type") == "llama3",
        rope_scaling_factor=rope.get("factor", 8.0),
        pg_collection=groups,
        vp_stage=chunk if interleaved else None,
    )
    model.rotary_pos_emb = PositionedRotaryEmbedding(model.rotary_pos_emb)
    return model.to(device=parallel.device, dtype=config.params_dtype)


def core_attentions(model: torch.nn.Module) -> list[SDPACoreAttention]:
    """The attention modules of this stage, in layer order."""
    return [m for m in model.modules() if isinstance(m, SDPACoreAttention)]

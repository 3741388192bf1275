"""The layers a model is built of: megatron-core's local ones, or Transformer Engine's where it can run."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dump.actor import megatron_versions
from megatron_dump.actor.attention import SDPACoreAttention
from megatron_dump.actor.swiglu import SwiGLUMLP


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm, also where tensor ranks split the sequence: megatron-core's wrapper of it refuses that."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps)
        # Each tensor rank sees its part of the sequence only: megatron-core then sums the weight's gradients.
        self.weight.sequence_parallel = config.sequence_parallel  # pyright: ignore[reportAttributeAccessIssue]


def block_spec(config: TransformerConfig, layers: range, tensor_group: dist.ProcessGroup) -> TransformerBlockSubmodules:
    """These layers of the model, split over `tensor_group`, and its final norm.

    Whatever the implementation, SDPACoreAttention is the core attention: it has the key/value cache that generation on
    the training weights needs, and takes context parallelism.
    """
    pattern = config.moe_layer_freq if config.num_moe_experts else [0] * config.num_layers
    assert isinstance(pattern, list)
    make = _local_layer if config.transformer_impl == "local" else _transformer_engine_layer
    kinds = {sparse: make(config, config.num_moe_experts if sparse else None, tensor_group) for sparse in set(pattern)}
    return TransformerBlockSubmodules(
        layer_specs=[kinds[pattern[i]] for i in layers],
        layer_norm=_norm(config),  # pyright: ignore[reportArgumentType]
    )


def _norm(config: TransformerConfig) -> type:
    if config.transformer_impl == "local":
        return RMSNorm
    from megatron.core.extensions.transformer_engine import TENorm

    return TENorm  # pyright: ignore[reportReturnType]


def _local_layer(config: TransformerConfig, experts: int | None, tensor_group: dist.ProcessGroup) -> ModuleSpec:
    spec = get_gpt_layer_local_spec(num_experts=experts, normalization="RMSNorm", qk_layernorm=config.qk_layernorm)
    layer = spec.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    attention = layer.self_attention.submodules
    attention.core_attention = SDPACoreAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    if experts is None:
        layer.mlp = megatron_versions.mlp_of(layer.mlp, SwiGLUMLP, tensor_group)
    return spec


def _transformer_engine_layer(config: TransformerConfig, experts: int | None, _: dist.ProcessGroup) -> ModuleSpec:
    spec = get_gpt_layer_with_transformer_engine_spec(
        num_experts=experts, moe_grouped_gemm=config.moe_grouped_gemm, qk_layernorm=config.qk_layernorm
    )
    layer = spec.submodules
    layer.self_attention.submodules.core_attention = SDPACoreAttention
    # A checkpoint is for either implementation: names the norm before the experts as megatron-core's local layers do.
    layer.sharded_state_dict_keys_map = {
        **layer.sharded_state_dict_keys_map,
        "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
    }
    return spec

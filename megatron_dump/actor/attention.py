"""Core attention by torch's scaled_dot_product_attention, with context parallelism; over a key/value cache to generate.

megatron-core's local attention materialises the scores, has no cache of rotated keys and takes no context parallelism;
torch's kernel is fused on CPU and GPU and takes grouped queries as they are.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_dump.actor import context, shared_attention
from megatron_dump.actor.kv_cache import KVCache
from megatron_dump.actor.shared_prompts import SharedPrompts


class SDPACoreAttention(MegatronModule):
    """Causal attention [S, B, heads, dim] -> [S, B, heads × dim]; with `cache` set, over what it holds.

    With context parallelism S are this rank's positions (context.py); it gathers the keys and values of all others, as
    Llama 3's does (2407.21783, section 3.3.2), and reduces their gradients back.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.context_group = pg_collection.cp if pg_collection else parallel_state.get_context_parallel_group()
        self.layer_number = layer_number
        self.scale = softmax_scale if softmax_scale is not None else 1.0 / math.sqrt(config.kv_channels)
        self.cache: KVCache | None = None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        if isinstance(packed_seq_params, SharedPrompts):
            return shared_attention.attend(packed_seq_params, query, key, value, self.scale)
        if attention_bias is not None or packed_seq_params is not None:
            raise ValueError("packed sequences and attention bias need Transformer Engine's attention")
        if self.cache is not None:
            return self.cache.attend(self.layer_number, query, key, value, self.scale)
        if self.context_group.size() > 1:
            both = context.gather(torch.cat([key, value], -1), self.context_group)
            key, value = both.chunk(2, -1)
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        if self.context_group.size() > 1:
            out = self._attend_to_whole(q, k, v)
        else:
            if not q.is_cuda:  # torch's CPU kernel is slower on strides than the copies are
                q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
            out = self._attend(q, k, v)
        return out.permute(2, 0, 1, 3).reshape(query.size(0), query.size(1), -1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.scale, enable_gqa=q.size(1) != k.size(1)
        )

    def _attend_to_whole(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """This rank's queries against the keys of the whole sequence: each of its two chunks as far as it may look."""
        positions = context.positions(k.size(2), self.context_group, q.device)
        outputs = []
        for queries, places in zip(q.chunk(2, 2), positions.chunk(2), strict=True):
            end = int(places[-1]) + 1
            mask = torch.arange(end, device=q.device) <= places[:, None]
            outputs.append(self._attend(queries, k[:, :, :end], v[:, :, :end], mask))
        return torch.cat(outputs, 2)


class PositionedRotaryEmbedding(torch.nn.Module):
    """RotaryEmbedding for tokens at any positions, once `place` has said at which."""

    def __init__(self, rotary: torch.nn.Module) -> None:
        super().__init__()
        self.rotary = rotary
        self._angles: Tensor | None = None

    def place(self, positions: Tensor | None, limit: int = 0) -> None:
        """The next passes are over tokens at `positions`, int64 [N] below `limit`; None: over 0, 1, 2, …"""
        self._angles = None if positions is None else self.rotary(limit).index_select(0, positions)

    def get_rotary_seq_len(self, *args: Any, **kwargs: Any) -> int:
        return self.rotary.get_rotary_seq_len(*args, **kwargs)

    def forward(self, max_seq_len: int, **kwargs: Any) -> Tensor:
        """Angles float32 [N, 1, 1, dim]."""
        return self.rotary(max_seq_len, **kwargs) if self._angles is None else self._angles

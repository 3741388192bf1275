"""Core attention by torch's scaled_dot_product_attention: key/value cache for generation, context parallelism.

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
from megatron_dump.actor.shared_prompts import SharedPrompts


class KVCache:
    """Keys (rotated) and values of the tokens seen so far, for every layer of this pipeline stage.

    Rows are left-padded to a common length: `start[b]` is the first real position of row b.
    """

    def __init__(self, start: Tensor, capacity: int) -> None:
        self.start = start  # int64 [B]
        self.capacity = capacity  # positions to reserve, prompt included
        self.length = 0  # positions filled by complete forward passes
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}  # layer number -> [B, heads, capacity, dim] × 2
        self._mask: Tensor | None = None  # of the forward pass in progress: the same for every layer

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store [B, heads, T, dim] behind what is there; the whole of it, [B, heads, length + T, dim]."""
        end = self.length + key.size(2)
        if layer not in self._layers:
            shape = (key.size(0), key.size(1), self.capacity, key.size(3))
            self._layers[layer] = (key.new_zeros(shape), value.new_zeros(shape))
        keys, values = self._layers[layer]
        keys[:, :, self.length : end] = key
        values[:, :, self.length : end] = value
        return keys[:, :, :end], values[:, :, :end]

    def mask(self, n_new: int) -> Tensor:
        """Which keys each new token may see: bool [B, 1, n_new, length + n_new]."""
        if self._mask is None:
            self._mask = self._build_mask(self.length + n_new)
        return self._mask

    def _build_mask(self, end: int) -> Tensor:
        keys = torch.arange(end, device=self.start.device)
        queries = keys[self.length :]
        causal = keys[None, None, :] <= queries[None, :, None]
        # A padding token may see itself: a row of nothing would be NaN.
        real = (keys[None, None, :] >= self.start[:, None, None]) | (keys[None, None, :] == queries[None, :, None])
        return (causal & real)[:, None]

    def advance(self, n_new: int) -> None:
        """A forward pass of `n_new` tokens went through every layer."""
        self.length += n_new
        self._mask = None

    def select(self, rows: Tensor) -> None:
        """Keep (or repeat) rows: int64 indices into the batch."""
        self.start = self.start[rows]
        self._layers = {n: (k[rows], v[rows]) for n, (k, v) in self._layers.items()}


class SDPACoreAttention(MegatronModule):
    """Causal attention [S, B, heads, dim] -> [S, B, heads × dim]; with `cache` set, over the cached positions too.

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
        if self.context_group.size() > 1:
            both = context.gather(torch.cat([key, value], -1), self.context_group)
            key, value = both.chunk(2, -1)
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        if self.context_group.size() > 1:
            out = self._attend_to_whole(q, k, v)
        elif self.cache is not None:
            mask = self.cache.mask(q.size(2))
            out = self._attend(q, *self.cache.append(self.layer_number, k, v), mask)
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


class OffsetRotaryEmbedding(torch.nn.Module):
    """RotaryEmbedding for passes that continue a cached sequence at position `offset`, or over tokens anywhere."""

    def __init__(self, rotary: torch.nn.Module) -> None:
        super().__init__()
        self.rotary = rotary
        self.offset = 0
        self._angles: Tensor | None = None

    def place(self, positions: Tensor | None, limit: int = 0) -> None:
        """The next passes are over tokens at `positions`, int64 [S] below `limit`; None: over 0, 1, 2, …"""
        self._angles = None if positions is None else self.rotary(limit).index_select(0, positions)

    def get_rotary_seq_len(self, *args: Any, **kwargs: Any) -> int:
        return self.rotary.get_rotary_seq_len(*args, **kwargs)

    def forward(self, max_seq_len: int, **kwargs: Any) -> Tensor:
        return self.rotary(max_seq_len, offset=self.offset, **kwargs) if self._angles is None else self._angles

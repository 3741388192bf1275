"""What a layout leaves of a model on a rank: its parameters in megatron-core's order, and the work of a token."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from megatron_dump.actor.architecture import Architecture
from megatron_dump.actor.layout import Layout


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One tensor of a rank."""

    size: int  # elements
    expert: bool = False  # belongs to an expert-parallel group's buffer
    shared: bool = False  # the embedding that the first and the last stage both have


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model in a layout."""

    arch: Architecture
    layout: Layout

    @property
    def layers(self) -> int:
        return self.arch.hf.num_hidden_layers

    @property
    def chunks(self) -> int:
        return self.layout.virtual_pipeline or 1

    @property
    def layers_per_stage(self) -> int:
        return self.layers // self.layout.pipeline

    @property
    def attention_width(self) -> int:
        return self.arch.hf.num_attention_heads * self.arch.head_dim

    @property
    def kv_width(self) -> int:
        """Elements of a token's keys in a layer; its values are as many."""
        return self.arch.hf.num_key_value_heads * self.arch.head_dim

    def parameters(self, stage: int) -> list[list[Parameter]]:
        """Of each model chunk of a pipeline stage."""
        n = self.layers // (self.layout.pipeline * self.chunks)
        starts = [(chunk * self.layout.pipeline + stage) * n for chunk in range(self.chunks)]
        return [list(self._chunk(range(start, start + n))) for start in starts]

    def numel(self, stage: int) -> int:
        return sum(parameter.size for chunk in self.parameters(stage) for parameter in chunk)

    def flops_per_token(self, layer: int, context: float) -> float:
        """Floating-point operations of a layer's forward pass for a token that sees `context` tokens, on all ranks.

        Two a weight and, in the attention, two a weight-free product each of queries with keys and of scores with
        values (Narayanan et al., 2104.04473, appendix, without its recomputation).
        """
        hidden, width = self.arch.hf.hidden_size, self.attention_width
        weights = hidden * (width + 2 * self.kv_width) + width * hidden + self._active_feed_forward(layer)
        return 2.0 * weights + 4.0 * width * context

    def head_flops(self) -> float:
        """Of the output layer, a token's forward pass."""
        return 2.0 * self.arch.hf.hidden_size * self.arch.padded_vocab_size

    def mean_flops(self, context: float) -> float:
        """flops_per_token, the mean of all layers."""
        return sum(self.flops_per_token(layer, context) for layer in range(self.layers)) / self.layers

    def whole_numel(self) -> int:
        """Parameters of an unsplit copy, an embedding that is tied once."""
        whole = Shape(self.arch, Layout())
        return whole.numel(0)

    def _active_feed_forward(self, layer: int) -> int:
        hidden, experts = self.arch.hf.hidden_size, self.arch.experts
        if experts is None or not experts.sparse[layer]:
            return 3 * hidden * self.arch.hf.intermediate_size
        shared = experts.shared_intermediate_size or 0
        return 3 * hidden * (experts.per_token * experts.intermediate_size + shared) + hidden * experts.number

    def _chunk(self, layers: range) -> Iterator[Parameter]:
        hidden, layout = self.arch.hf.hidden_size, self.layout
        embedding = hidden * self.arch.padded_vocab_size // layout.tensor
        shared = self.arch.tied and layout.pipeline > 1
        if layers.start == 0:
            yield Parameter(embedding, shared=shared)
        for layer in layers:
            yield from self._layer(layer)
        if layers.stop == self.layers:
            yield Parameter(hidden)
            if shared or not self.arch.tied:
                yield Parameter(embedding, shared=shared)

    def _layer(self, layer: int) -> Iterator[Parameter]:
        hidden, tensor = self.arch.hf.hidden_size, self.layout.tensor
        qkv = (self.attention_width + 2 * self.kv_width) // tensor
        yield Parameter(hidden)
        yield Parameter(self.attention_width // tensor * hidden)
        yield Parameter(qkv * hidden)
        if self.arch.qkv_bias:
            yield Parameter(qkv)
        if self.arch.qk_layernorm:
            yield Parameter(self.arch.head_dim)
            yield Parameter(self.arch.head_dim)
        yield Parameter(hidden)
        experts = self.arch.experts
        if experts is None or not experts.sparse[layer]:
            yield from _feed_forward(hidden, self.arch.hf.intermediate_size // tensor)
            return
        yield Parameter(experts.number * hidden)
        for _ in range(experts.number // self.layout.expert):
            width = experts.intermediate_size // self.layout.expert_tensor
            yield from _feed_forward(hidden, width, expert=self.layout.expert > 1)
        if experts.shared_intermediate_size is not None:
            yield Parameter(hidden)  # its gate
            yield from _feed_forward(hidden, experts.shared_intermediate_size // tensor)


def _feed_forward(hidden: int, width: int, expert: bool = False) -> Iterator[Parameter]:
    yield Parameter(2 * width * hidden, expert)
    yield Parameter(width * hidden, expert)

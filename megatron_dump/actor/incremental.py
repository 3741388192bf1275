"""Token-by-token forward passes over the training weights, through all tensor ranks and pipeline stages."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_dump.actor.attention import KVCache
from megatron_dump.actor.model import core_attentions
from megatron_dump.actor.parallel import Parallel


class IncrementalForward:
    """A batch of left-padded sequences that grows; every rank of the model replica calls it in step."""

    def __init__(self, module: nn.Module, parallel: Parallel, cache: KVCache, vocab_size: int) -> None:
        self.module, self.parallel, self.cache, self.vocab_size = module, parallel, cache, vocab_size

    @torch.no_grad()
    def forward(self, tokens: Tensor) -> Tensor | None:
        """Append tokens int64 [B, T]; logits of the last one, [B, V], on the last pipeline stage (None elsewhere)."""
        place, module = self.parallel, self.module
        module.rotary_pos_emb.offset = self.cache.length
        if not place.is_first_stage:
            shape = (tokens.size(1), tokens.size(0), module.config.hidden_size)
            hidden = torch.empty(shape, dtype=module.config.params_dtype, device=tokens.device)
            dist.recv(hidden, place.previous_stage_rank, group=place.pipeline_group)
            module.set_input_tensor(hidden)
        positions = torch.arange(self.cache.length, self.cache.length + tokens.size(1), device=tokens.device)
        out = module(
            input_ids=tokens, position_ids=positions.expand_as(tokens), attention_mask=None, runtime_gather_output=True
        )
        self.cache.advance(tokens.size(1))
        if not place.is_last_stage:
            dist.send(out.contiguous(), place.next_stage_rank, group=place.pipeline_group)
            return None
        return out[:, -1, : self.vocab_size]  # behind it: padding of the embedding

    def select(self, rows: Tensor) -> None:
        """Keep or repeat sequences: int64 indices into the batch."""
        self.cache.select(rows)

    def share(self, values: Tensor) -> Tensor:
        """The last stage's `values`, on every rank of the replica (others pass a tensor of the same shape)."""
        if self.parallel.tensor_size > 1 and self.parallel.is_last_stage and values.is_cuda:
            # Equal logits need not give equal samples on CUDA, where cumsum is not deterministic.
            dist.broadcast(
                values, dist.get_global_rank(self.parallel.tensor_group, 0), group=self.parallel.tensor_group
            )
        if self.parallel.pipeline_size > 1:
            dist.broadcast(values, self.parallel.last_stage_rank, group=self.parallel.pipeline_group)
        return values


@contextlib.contextmanager
def incremental_forward(
    module: nn.Module, parallel: Parallel, vocab_size: int, start: Tensor, capacity: int
) -> Iterator[IncrementalForward]:
    """Put a key/value cache under the model for the length of the block.

    start int64 [B]: first real position of each left-padded row; capacity: positions to reserve.
    """
    cache, attentions, training = KVCache(start, capacity), core_attentions(module), module.training
    module.eval()
    for attention in attentions:
        attention.cache = cache
    hook = None
    if parallel.is_last_stage:  # only the last token's logits are needed: no [B, T, V] in the prefill
        hook = module.output_layer.register_forward_pre_hook(lambda _, args: (args[0][-1:], *args[1:]))
    try:
        with _whole_sequences(module):
            yield IncrementalForward(module, parallel, cache, vocab_size)
    finally:
        if hook is not None:
            hook.remove()
        for attention in attentions:
            attention.cache = None
        module.rotary_pos_emb.offset = 0
        module.set_input_tensor(None)
        module.train(training)


@contextlib.contextmanager
def _whole_sequences(module: nn.Module) -> Iterator[None]:
    """Sequence parallelism is off inside the block: a step of one token cannot be split over tensor ranks."""
    if not module.config.sequence_parallel:
        yield
        return
    flags = ("sequence_parallel", "scatter_to_sequence_parallel", "reduce_scatter_embeddings")
    owners = [module.config, *module.modules()]
    on = [(owner, flag) for owner in owners for flag in flags if getattr(owner, flag, False)]
    try:
        for owner, flag in on:
            setattr(owner, flag, False)
        yield
    finally:
        for owner, flag in on:
            setattr(owner, flag, True)

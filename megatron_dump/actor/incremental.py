"""Forward passes of generation over the training weights, through all tensor ranks and pipeline stages."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_dump.actor.kv_cache import KVCache
from megatron_dump.actor.model import core_attentions
from megatron_dump.actor.parallel import Parallel


class IncrementalForward:
    """Rows that grow; every rank of the model replica calls it in step.

    A pass is one sequence to the model, whoever its tokens belong to: the cache keeps them apart. Where experts are
    split, every pass is a collective of all ranks of a pipeline stage: those without work take part by `idle`, as long
    as there is `work` anywhere.
    """

    def __init__(self, module: nn.Module, parallel: Parallel, cache: KVCache, vocab_size: int) -> None:
        self.module, self.parallel, self.cache, self.vocab_size = module, parallel, cache, vocab_size
        self._last: Tensor | None = None  # the tokens of a pass whose logits are wanted; None: all

    def prefill(self, prompts: Sequence[np.ndarray], slots: np.ndarray) -> Tensor | None:
        """Put prompts into their slots; logits behind the last token of each, [G, V], on the last stage only."""
        lengths = np.array([len(p) for p in prompts])
        self.cache.begin_prefill(slots)
        self._last = self._tensor(np.cumsum(lengths) - 1)
        positions = np.concatenate([np.arange(n) for n in lengths])
        return self._pass(self._tensor(np.concatenate(prompts)), self._tensor(positions))

    def decode(self, tokens: Tensor) -> Tensor | None:
        """Append one token to every row, int64 [rows]; logits behind it, [rows, V], on the last stage only."""
        return self._pass(tokens, self.cache.begin_decode())

    def idle(self) -> None:
        """A pass over nothing that matters."""
        self.cache.begin_idle()
        nothing = torch.zeros(1, dtype=torch.int64, device=self.cache.device)
        self._pass(nothing, nothing)

    def work(self, mine: bool) -> bool:
        """Is there work for this replica or, where experts are split, for any?"""
        place = self.parallel
        if place.expert_size == 1 or place.data_size == 1:
            return mine
        flag = torch.tensor(mine, dtype=torch.int32, device=self.cache.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=place.data_group)
        return bool(flag)

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

    @torch.no_grad()
    def _pass(self, tokens: Tensor, positions: Tensor) -> Tensor | None:
        """Tokens int64 [N] at their positions."""
        place, module = self.parallel, self.module
        module.rotary_pos_emb.place(positions, self.cache.prompt_length + self.cache.n_own)
        if not place.is_first_stage:
            shape = (len(tokens), 1, module.config.hidden_size)
            hidden = torch.empty(shape, dtype=module.config.params_dtype, device=tokens.device)
            dist.recv(hidden, place.previous_stage_rank, group=place.pipeline_group)
            module.set_input_tensor(hidden)
        out = module(
            input_ids=tokens[None], position_ids=positions[None], attention_mask=None, runtime_gather_output=True
        )
        self._last = None
        if not place.is_last_stage:
            dist.send(out.contiguous(), place.next_stage_rank, group=place.pipeline_group)
            return None
        return out[0, :, : self.vocab_size]  # behind it: padding of the embedding

    def only_last(self, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Before the output layer: only states whose logits are wanted, so that a prefill makes no [N, V]."""
        return args if self._last is None else (args[0].index_select(0, self._last), *args[1:])

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.cache.device)


@contextlib.contextmanager
def incremental_forward(
    module: nn.Module, parallel: Parallel, vocab_size: int, cache: KVCache
) -> Iterator[IncrementalForward]:
    """Put a key/value cache under the model for the length of the block."""
    attentions, training = core_attentions(module), module.training
    model = IncrementalForward(module, parallel, cache, vocab_size)
    module.eval()
    for attention in attentions:
        attention.cache = cache
    hook = module.output_layer.register_forward_pre_hook(model.only_last) if parallel.is_last_stage else None
    try:
        with _whole_sequences(module):
            yield model
    finally:
        if hook is not None:
            hook.remove()
        for attention in attentions:
            attention.cache = None
        module.rotary_pos_emb.place(None)
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

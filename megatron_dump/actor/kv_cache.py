"""The keys and values of completions in the making: a group's prompt once, every row's own tokens behind it.

Rows come and go: a row that is done is free for a completion of a later group, at once (continuous batching; Yu et al.,
Orca, OSDI 2022). That a group shares its prompt's keys and values saves memory and reads (Juravsky et al., Hydragen,
2402.05099, whose split of the softmax is `cached_attention.merge`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_dump.actor import cached_attention

FREE = -1


@dataclasses.dataclass
class _Layer:
    """Rotated keys and values of one layer: of prompts [slots, heads, positions, dim], of rows likewise."""

    prompt_keys: Tensor
    prompt_values: Tensor
    own_keys: Tensor
    own_values: Tensor


class KVCache:
    """Room for `n_rows` completions of at most `n_own` tokens, and for the prompts they continue.

    Which rows and prompts are there is known on the host, so that only the attention itself runs on the device.
    """

    def __init__(self, n_rows: int, n_own: int, prompt_length: int, device: torch.device) -> None:
        self.n_own, self.prompt_length, self.device = n_own, prompt_length, device
        self.slots = np.full(n_rows, FREE)  # which prompt a row continues, or FREE
        self.own = np.zeros(n_rows, np.int64)  # tokens of its own that a row has in the cache
        self.prompts = np.zeros(0, np.int64)  # tokens of each prompt
        self.peak_bytes = 0  # of the keys and values of this stage
        self._layers: dict[int, _Layer] = {}
        self._sharing: cached_attention.Sharing | None = None  # None: rows have come or gone
        self._pass: cached_attention.Prefill | cached_attention.Decode | None = None  # None: an idle pass

    @property
    def free(self) -> int:
        return int((self.slots == FREE).sum())

    def admit(self, lengths: Sequence[int], counts: Sequence[int]) -> list[np.ndarray]:
        """Give each new prompt a slot and `counts[i]` free rows: their numbers, int64 [counts[i]]."""
        unused = np.setdiff1d(np.arange(len(self.prompts)), self.slots)
        if len(unused) < len(lengths):
            self._add_slots(len(lengths) - len(unused))
            unused = np.setdiff1d(np.arange(len(self.prompts)), self.slots)
        rows = np.split(np.flatnonzero(self.slots == FREE)[: sum(counts)], np.cumsum(counts)[:-1])
        for slot, length, mine in zip(unused, lengths, rows, strict=False):
            self.prompts[slot] = length
            self.slots[mine], self.own[mine] = slot, 0
        self._sharing = None
        return rows

    def release(self, rows: np.ndarray) -> None:
        """These rows are done. They take part in passes, for nothing, until they are given away or dropped."""
        self.slots[rows] = FREE

    def compact(self) -> np.ndarray:
        """Drop the free rows and the prompts that nobody continues: which rows are left, int64."""
        rows = np.flatnonzero(self.slots != FREE)
        kept, self.slots = np.unique(self.slots[rows], return_inverse=True)
        self.own, self.prompts, self._sharing = self.own[rows], self.prompts[kept], None
        of_rows, of_slots = self._tensor(rows), self._tensor(kept)
        for layer in self._layers.values():
            layer.prompt_keys, layer.prompt_values = layer.prompt_keys[of_slots], layer.prompt_values[of_slots]
            layer.own_keys, layer.own_values = layer.own_keys[of_rows], layer.own_values[of_rows]
        return rows

    def begin_prefill(self, slots: np.ndarray) -> None:
        """The next pass is over the prompts in these slots, one behind the other."""
        self._pass = cached_attention.Prefill.of(self.prompts[slots], self._tensor(slots))

    def begin_decode(self) -> Tensor:
        """The next pass is over one new token a row: their positions, int64 [rows]."""
        if self._sharing is None:
            self._sharing = cached_attention.Sharing.of(self.slots, self.prompts, self.device)
            self.peak_bytes = max(self.peak_bytes, self._bytes())
        taken = self.slots != FREE
        own = np.where(taken, self.own, self.own[taken].max())  # a free row is no reason for a mask
        self._pass = cached_attention.Decode.of(own, self.n_own, self._sharing)
        self.own[taken] += 1
        return self._tensor(np.where(taken, self.prompts[self.slots], 0) + own)

    def begin_idle(self) -> None:
        """The next pass is over a token that nobody asked for: nothing is read or kept."""
        self._pass = None

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attention of the tokens of this pass: [N, 1, heads, dim] each -> [N, 1, heads × dim]."""
        if self._pass is None:
            return torch.zeros_like(query).flatten(2)
        if layer not in self._layers:
            self._layers[layer] = self._make_layer(key[:, 0])
        held = self._layers[layer]
        if isinstance(self._pass, cached_attention.Prefill):
            out = self._pass.attend(query[:, 0], key[:, 0], value[:, 0], held.prompt_keys, held.prompt_values, scale)
        else:
            self._pass.store(held.own_keys, key[:, 0])
            self._pass.store(held.own_values, value[:, 0])
            own, prompts = (held.own_keys, held.own_values), (held.prompt_keys, held.prompt_values)
            out = self._pass.attend(query[:, 0], own, prompts, scale)
        return out.flatten(1)[:, None]

    def _bytes(self) -> int:
        tensors = [tensor for layer in self._layers.values() for tensor in vars(layer).values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def _make_layer(self, like: Tensor) -> _Layer:
        heads, dim = like.size(1), like.size(2)
        prompts, own = (len(self.prompts), heads, self.prompt_length, dim), (len(self.own), heads, self.n_own, dim)
        # Zeros: what is masked gets weight 0, and 0 × NaN would be NaN.
        return _Layer(like.new_zeros(prompts), like.new_zeros(prompts), like.new_zeros(own), like.new_zeros(own))

    def _add_slots(self, n: int) -> None:
        self.prompts = np.append(self.prompts, np.zeros(n, np.int64))
        for layer in self._layers.values():
            more = layer.prompt_keys.new_zeros(n, *layer.prompt_keys.shape[1:])
            layer.prompt_keys = torch.cat([layer.prompt_keys, more])
            layer.prompt_values = torch.cat([layer.prompt_values, more])

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device)

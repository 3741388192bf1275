"""Attention over a KVCache: of prompts to themselves, and of each row's new token to its prompt and its own tokens.

Plain matrix products: with one query a row, several query heads to a key head, and rows that share a prompt, they are
faster on CPU than torch's fused kernel, which takes each query head of each row by itself.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Part = tuple[Tensor, Tensor, Tensor]  # weighted sum of values, largest score, sum of weights


def part(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> Part:
    """Attention to some of the keys, not yet normalised.

    query [B, M, dim], scaled; keys, values [B, T, dim]; bias [B, 1, T]: -inf where nothing may be seen.
    [B, M, dim], [B, M, 1], [B, M, 1].
    """
    scores = torch.bmm(query, keys.transpose(1, 2)).float()
    if bias is not None:
        scores += bias
    largest = scores.amax(-1, keepdim=True)
    weights = scores.sub_(largest).exp_()
    return torch.bmm(weights.to(values.dtype), values), largest, weights.sum(-1, keepdim=True)


def merge(a: Part, b: Part) -> Tensor:
    """Attention to the keys of both parts: the softmax over all of them (2402.05099, section 3)."""
    largest = torch.maximum(a[1], b[1])
    of_a, of_b = (a[1] - largest).exp_(), (b[1] - largest).exp_()
    return (a[0] * of_a + b[0] * of_b) / (a[2] * of_a + b[2] * of_b)


@dataclasses.dataclass(frozen=True)
class Prefill:
    """A pass over whole prompts, one behind the other: N tokens in G prompts."""

    slots: Tensor  # int64 [G]: where their keys and values go
    padded: Tensor  # int64 [G × longest]: which token, prompts padded at the right (with anything)
    packed: Tensor  # int64 [N]: where a token is among those

    @classmethod
    def of(cls, lengths: np.ndarray, slots: Tensor) -> Prefill:
        width = int(lengths.max())
        real = np.arange(width) < lengths[:, None]  # [G, longest]
        padded = np.where(real, np.cumsum(real).reshape(real.shape) - 1, 0)
        return cls(
            slots,
            torch.from_numpy(padded.ravel()).to(slots.device),
            torch.from_numpy(np.flatnonzero(real)).to(slots.device),
        )

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, prompt_keys: Tensor, prompt_values: Tensor, scale: float
    ) -> Tensor:
        """Causal attention, [N, heads, dim] each -> the same shape as query; keys and values are kept."""
        q, k, v = (self._pad(t) for t in (query, key, value))
        width = k.size(2)
        prompt_keys[:, :, :width].index_copy_(0, self.slots, k)
        prompt_values[:, :, :width].index_copy_(0, self.slots, v)
        # Padding is at the right: no token looks at any.
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.size(1) != k.size(1))
        return out.transpose(1, 2).flatten(0, 1).index_select(0, self.packed)

    def _pad(self, tokens: Tensor) -> Tensor:
        """[N, heads, dim] -> [G, heads, longest, dim], contiguous: torch's CPU kernel is slow on strides."""
        padded = tokens.index_select(0, self.padded).unflatten(0, (len(self.slots), -1))
        return padded.transpose(1, 2).contiguous()


@dataclasses.dataclass(frozen=True)
class Sharing:
    """Which rows continue which prompt: they are stacked, up to M a prompt, to meet its keys together."""

    members: Tensor  # int64 [slots × M]: a row of the batch (any, where there are fewer)
    places: Tensor  # int64 [rows]: where a row is among them (anywhere, if it is free)
    width: int  # of the longest prompt
    bias: Tensor | None  # float [slots, 1, width]: -inf behind the end of a shorter prompt

    @classmethod
    def of(cls, slots: np.ndarray, prompts: np.ndarray, device: torch.device) -> Sharing:
        """slots int64 [rows], -1 for a free one; prompts int64 [slots]: their lengths."""
        rows = np.flatnonzero(slots >= 0)
        rows = rows[np.argsort(slots[rows], kind="stable")]
        counts = np.bincount(slots[rows], minlength=len(prompts))
        most = int(counts.max())
        among = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)  # which of its prompt's rows
        members, places = np.zeros(len(prompts) * most, np.int64), np.zeros(len(slots), np.int64)
        places[rows] = slots[rows] * most + among
        members[places[rows]] = rows
        used = prompts[counts > 0]
        width, bias = int(used.max()), None
        if (used < width).any():
            hidden = np.arange(width) >= np.maximum(prompts, 1)[:, None]
            bias = torch.from_numpy(np.where(hidden, -np.inf, 0.0).astype(np.float32)[:, None]).to(device)
        return cls(torch.from_numpy(members).to(device), torch.from_numpy(places).to(device), width, bias)

    def attend(self, query: Tensor, keys: Tensor, values: Tensor) -> Part:
        """query [rows, key heads, query heads of each, dim], scaled; keys, values [slots, key heads, T, dim]."""
        n, (rows, heads, shared, dim) = len(keys), query.shape
        stacked = query.flatten(1).index_select(0, self.members).view(n, -1, heads, shared, dim)
        stacked = stacked.transpose(1, 2).reshape(n * heads, -1, dim)
        keys, values = (t[:, :, : self.width].flatten(0, 1) for t in (keys, values))
        bias = None if self.bias is None else self.bias.repeat_interleave(heads, 0)
        result = torch.cat([t.to(torch.float32) for t in part(stacked, keys, values, bias)], -1)
        result = result.view(n, heads, -1, shared, dim + 2).transpose(1, 2).reshape(len(self.members), -1)
        out, largest, total = (
            result.index_select(0, self.places).view(rows * heads, shared, dim + 2).split([dim, 1, 1], -1)
        )
        return out, largest, total


@dataclasses.dataclass(frozen=True)
class Decode:
    """A pass over one new token of every row."""

    at: Tensor  # int64 [rows]: where in its row's own cache the token goes
    width: int  # of the longest row, the new token included
    bias: Tensor | None  # float [rows, 1, width]: -inf behind the new token of a shorter row
    sharing: Sharing
    capacity: int
    _places: dict[int, Tensor] = dataclasses.field(default_factory=dict)  # in a layer with so many heads

    @classmethod
    def of(cls, own: np.ndarray, capacity: int, sharing: Sharing) -> Decode:
        device, width, bias = sharing.places.device, int(own.max()) + 1, None
        if (own < width - 1).any():
            hidden = torch.from_numpy(np.arange(width) > own[:, None]).to(device)
            bias = torch.zeros(hidden.shape, device=device).masked_fill_(hidden, -torch.inf)[:, None]
        return cls(torch.from_numpy(own).to(device), width, bias, sharing, capacity)

    def store(self, cache: Tensor, new: Tensor) -> None:
        """Put [rows, heads, dim] where they belong in [rows, heads, capacity, dim]."""
        rows, heads, dim = new.shape
        if heads not in self._places:  # the same for every layer
            first = torch.arange(rows * heads, device=new.device).view(rows, heads) * self.capacity
            self._places[heads] = (first + self.at[:, None]).flatten()
        cache.view(-1, dim).index_copy_(0, self._places[heads], new.reshape(-1, dim))

    def attend(self, query: Tensor, own: tuple[Tensor, Tensor], prompts: tuple[Tensor, Tensor], scale: float) -> Tensor:
        """[rows, heads, dim] -> the same shape; keys and values [.., key heads, T, dim] of rows and of prompts."""
        rows, heads, dim = query.shape
        grouped = (query * scale).view(rows, own[0].size(1), -1, dim)
        keys, values = (t.view(-1, self.capacity, dim)[:, : self.width] for t in own)
        bias = None if self.bias is None else self.bias.repeat_interleave(own[0].size(1), 0)
        mine = part(grouped.flatten(0, 1), keys, values, bias)
        return merge(self.sharing.attend(grouped, *prompts), mine).to(query.dtype).view(rows, heads, dim)

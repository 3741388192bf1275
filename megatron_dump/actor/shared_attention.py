"""Causal attention of rollouts that share their prompts: each completion sees its group's prompt, and itself."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from megatron_dump.actor.shared_prompts import Family, SharedPrompts


def attend(shared: SharedPrompts, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """query [S, 1, heads, dim], key and value [S, 1, key/value heads, dim] -> [S, 1, heads × dim]."""
    sizes = [*(size for family in shared.families for size in family.sizes), 1]
    parts = zip(*(_moved(t[:, 0], shared.padded, shared.packed).split(sizes) for t in (query, key, value)), strict=True)
    out = [piece for family in shared.families for piece in _family(family, parts, scale)]
    out.append(out[0].new_zeros(1, out[0].size(1)))  # of padding
    return _moved(torch.cat(out), shared.packed, shared.padded)[:, None]


def _family(family: Family, parts: Any, scale: float) -> list[Tensor]:
    """The attention's output at each of a family's parts, [tokens, heads × dim]; takes them off `parts`."""
    q, k, v = (part.transpose(0, 1)[None] for part in next(parts))  # [1, heads, P, dim]
    pieces = [_attend(q, k, v, scale, is_causal=True)]
    for n, length in family.blocks:
        query, key, value = (part.unflatten(0, (n, length)).transpose(1, 2) for part in next(parts))
        keys, values = (
            torch.cat([prompt.expand(n, -1, -1, -1), own], 2) for prompt, own in ((k, key), (v, value))
        )  # [n, heads, P + T, dim]
        pieces.append(_attend(query, keys, values, scale, attn_mask=_mask(length, keys.size(2), query)))
    return [piece.transpose(1, 2).flatten(2).flatten(0, 1) for piece in pieces]


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, **mask: Any) -> Tensor:
    if not q.is_cuda:  # torch's CPU kernel is slower on strides than the copies are
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=q.size(1) != k.size(1), **mask)


def _mask(queries: int, keys: int, like: Tensor) -> Tensor:
    """The last query sees all keys, the one before it all but one, and so on."""
    if like.is_cuda:  # torch's fused kernels know this mask by name
        return causal_lower_right(queries, keys)
    hidden = torch.ones(queries, keys, dtype=torch.bool, device=like.device).triu_(keys - queries + 1)
    return torch.zeros(queries, keys, dtype=like.dtype, device=like.device).masked_fill_(hidden, -torch.inf)


class _Moved(torch.autograd.Function):
    """[N, …] -> [M, …], rows chosen by `to`; `back` [N] says for each of the N where it went.

    For tokens that go to one place each: the gradient is moved back, too, where index_select would add up. Padding
    goes to many places, but has no gradient in any: `back` may name any of them.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, to: Tensor, back: Tensor) -> Tensor:  # pyright: ignore
        ctx.save_for_backward(back)
        return rows.index_select(0, to)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore
        (back,) = ctx.saved_tensors
        return grad.index_select(0, back), None, None


def _moved(rows: Tensor, to: Tensor, back: Tensor) -> Tensor:
    return _Moved.apply(rows, to, back)  # pyright: ignore[reportReturnType]

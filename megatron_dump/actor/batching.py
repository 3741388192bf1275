"""Rollouts as padded arrays, and those as micro-batches on the device: of equal row counts, or under a token budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_dump.actor.shared_prompts import SharedPrompts, beginnings, share
from megatron_dump.types import Completion, TrainBatch

PAD_TO = 8  # sequence lengths are rounded up to a multiple: fewer distinct shapes


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """Some rows of a TrainBatch on the device, cut to the longest of them."""

    rows: np.ndarray  # int64 [n], which rows of the batch; n < B: rows without a token fill it up
    tokens: Tensor  # int64 [B, T]
    sampled: Tensor  # int64 [M], places b T + t of the tokens inside the mask (t > 0): those that get log-probabilities
    mask: Tensor
    advantages: Tensor
    rollout_logprobs: Tensor
    old_logprobs: Tensor | None
    ref_logprobs: Tensor | None
    weights: Tensor | None
    shared: SharedPrompts | None = None  # the same rollouts as the layers compute them; None: row by row

    @property
    def inputs(self) -> Tensor:
        """What the layers compute, int64 [B, T] or [1, S]."""
        return self.tokens if self.shared is None else self.shared.tokens


def pad_rollouts(
    prompts: Sequence[np.ndarray],
    completions: Sequence[Completion],
    advantages: np.ndarray,
    global_tokens: float,
    weights: np.ndarray | None = None,
    n_rows: int | None = None,
    pad_to: int = PAD_TO,
) -> TrainBatch:
    """A TrainBatch: row i is prompts[i] followed by completions[i], zeros behind (never attended to).

    Its length is a multiple of `pad_to`. Rows of weight 0, and those that fill the batch up to `n_rows`, have an empty
    mask: they count nowhere.
    """
    n = len(completions) if n_rows is None else n_rows
    lengths = [len(p) + len(c.token_ids) for p, c in zip(prompts, completions, strict=True)]
    shape = (n, _round_up(max(lengths, default=1), pad_to))
    tokens, mask, logprobs = np.zeros(shape, np.int64), np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    counts = np.ones(len(completions), bool) if weights is None else weights != 0
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        start, end = len(prompt), lengths[i]
        tokens[i, :start] = prompt
        tokens[i, start:end] = completion.token_ids
        mask[i, start:end] = counts[i]
        logprobs[i, start:end] = completion.logprobs * counts[i]
    batch = TrainBatch(tokens, mask, _filled(advantages * counts, n), logprobs, global_tokens)
    if weights is not None:
        batch.weights = _filled(weights, n)
    return batch


def _filled(values: np.ndarray, n: int) -> np.ndarray:
    """float32 [n]: zeros behind."""
    return np.pad(values, (0, n - len(values))).astype(np.float32)


def used_lengths(batch: TrainBatch) -> np.ndarray:
    """int64 [N]: tokens up to the last one inside the mask; 1 for a row without any, which needs no length."""
    sampled = batch.loss_mask[:, ::-1] > 0  # the completion ends a row
    return np.where(sampled.any(axis=1), batch.tokens.shape[1] - np.argmax(sampled, axis=1), 1)


def equal_rows(lengths: np.ndarray, size: int) -> list[np.ndarray]:
    """Rows in order of their length, or place, `size` at a time. ValueError when it does not divide their number."""
    n = len(lengths)
    if n % size:
        raise ValueError(f"micro-batch size {size} does not divide the {n} rollouts of this rank")
    order = np.argsort(lengths, kind="stable")
    return [order[i : i + size] for i in range(0, n, size)]


def under_budget(lengths: np.ndarray, budget: int, pad_to: int = PAD_TO) -> list[np.ndarray]:
    """Rows in as few micro-batches as there can be of at most `budget` tokens, rows × longest row, padded.

    The rows are sorted and each micro-batch takes as many as its longest allows, so no other cut of the sorted rows
    has fewer. Longest first: memory that served the largest shape serves the others.
    ValueError when one row alone is over the budget.
    """
    order = np.argsort(-lengths, kind="stable")
    parts, start = [], 0
    while start < len(order):
        longest = _round_up(int(lengths[order[start]]), pad_to)
        if longest > budget:
            raise ValueError(f"a rollout of {longest} tokens, padded, exceeds the budget of {budget} of a micro-batch")
        parts.append(order[start : start + budget // longest])
        start += len(parts[-1])
    return parts


def divide(
    batch: TrainBatch, size: int, budget: int | None, pad_to: int = PAD_TO, share_prompts: bool = False
) -> tuple[list[np.ndarray], bool]:
    """The rows of each micro-batch, under a `budget` if there is one, else `size` of them; and: do they share prompts?

    They do if that is wanted and saves enough. ValueError as in `equal_rows` and `under_budget`.
    """
    if share_prompts:
        alike = beginnings(batch.tokens, sampled_tokens(batch))
        parts = equal_rows(alike.order, size) if budget is None else alike.under_budget(budget, pad_to)
        if alike.pays(parts):
            return parts, True
    lengths = used_lengths(batch)
    return equal_rows(lengths, size) if budget is None else under_budget(lengths, budget, pad_to), False


def split_into(parts: list[np.ndarray], lengths: np.ndarray, n: int) -> list[np.ndarray]:
    """`parts` as exactly n >= len(parts) micro-batches: the largest is halved, again and again; empty ones fill up."""
    parts = list(parts)
    while len(parts) < n:
        sizes = [len(rows) * lengths[rows].max() if len(rows) > 1 else 0 for rows in parts]
        largest = int(np.argmax(sizes)) if sizes else 0
        if not sizes or not sizes[largest]:
            return parts + [np.empty(0, np.int64)] * (n - len(parts))
        rows = parts[largest]
        parts[largest : largest + 1] = [rows[: (len(rows) + 1) // 2], rows[(len(rows) + 1) // 2 :]]
    return parts


def sampled_tokens(batch: TrainBatch) -> np.ndarray:
    """bool [N, T]: the tokens that get log-probabilities. The first of a row is given, whatever the mask says."""
    inside = batch.loss_mask > 0
    inside[:, :1] = False
    return inside


def cut(
    batch: TrainBatch, rows: np.ndarray, device: torch.device, pad_to: int = PAD_TO, share_prompts: bool = False
) -> MicroBatch:
    """These rows on the device, as long as the longest of them needs; a row without a token if there are none.

    With `share_prompts` the layers compute them as one sequence, its length a multiple of `pad_to`.
    """
    width = batch.tokens.shape[1]
    length = min(width, _round_up(int(used_lengths(batch)[rows].max(initial=1)), pad_to))

    def take(array: np.ndarray) -> Tensor:
        taken = array[rows, :length] if array.ndim == 2 else array[rows]
        if not len(rows):
            taken = np.zeros((1, *taken.shape[1:]), taken.dtype)
        return torch.from_numpy(taken).to(device)

    def optional(array: np.ndarray | None) -> Tensor | None:
        return None if array is None else take(array)

    inside = sampled_tokens(batch)[rows, :length]
    return MicroBatch(
        rows=rows,
        tokens=take(batch.tokens),
        sampled=torch.from_numpy(np.flatnonzero(inside)).to(device),
        mask=take(batch.loss_mask),
        advantages=take(batch.advantages),
        rollout_logprobs=take(batch.rollout_logprobs),
        old_logprobs=optional(batch.old_logprobs),
        ref_logprobs=optional(batch.ref_logprobs),
        weights=optional(batch.weights),
        shared=share(batch.tokens[rows, :length], inside, pad_to, device) if share_prompts else None,
    )


def _round_up(length: int, unit: int) -> int:
    return -(-length // unit) * unit

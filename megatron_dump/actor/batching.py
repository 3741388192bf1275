"""Rollouts as padded arrays, and those as micro-batches on the device."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_dump.types import Completion, TrainBatch

PAD_TO = 8  # sequence lengths are rounded up to a multiple: fewer distinct shapes


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """Some rows of a TrainBatch on the device, cut to the longest of them."""

    rows: np.ndarray  # int64 [B], which rows of the batch
    tokens: Tensor
    mask: Tensor
    advantages: Tensor
    rollout_logprobs: Tensor
    old_logprobs: Tensor | None
    ref_logprobs: Tensor | None
    weights: Tensor | None


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


def micro_batches(batch: TrainBatch, size: int, device: torch.device, pad_to: int = PAD_TO) -> list[MicroBatch]:
    """Cut a batch into micro-batches of `size` rows of similar length, each as long as its longest row needs.

    Their lengths are multiples of `pad_to`.

    Raises ValueError when `size` does not divide the batch.
    """
    n, width = batch.tokens.shape
    if n % size:
        raise ValueError(f"micro-batch size {size} does not divide the {n} rollouts of this rank")
    sampled = batch.loss_mask[:, ::-1] > 0  # the completion ends a row; a row without one needs no length
    used = np.where(sampled.any(axis=1), width - np.argmax(sampled, axis=1), 1)
    order = np.argsort(used, kind="stable")

    def cut(rows: np.ndarray) -> MicroBatch:
        length = min(width, _round_up(int(used[rows].max()), pad_to))

        def take(array: np.ndarray | None) -> Tensor | None:
            return None if array is None else torch.from_numpy(array[rows, :length]).to(device)

        return MicroBatch(
            rows=rows,
            tokens=torch.from_numpy(batch.tokens[rows, :length]).to(device),
            mask=torch.from_numpy(batch.loss_mask[rows, :length]).to(device),
            advantages=torch.from_numpy(batch.advantages[rows]).to(device),
            rollout_logprobs=torch.from_numpy(batch.rollout_logprobs[rows, :length]).to(device),
            old_logprobs=take(batch.old_logprobs),
            ref_logprobs=take(batch.ref_logprobs),
            weights=None if batch.weights is None else torch.from_numpy(batch.weights[rows]).to(device),
        )

    return [cut(order[i : i + size]) for i in range(0, n, size)]


def _round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple

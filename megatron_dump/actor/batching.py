"""Rollouts as padded arrays, and those as micro-batches on the device."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_dump.types import Completion, TrainBatch

_PAD_TO = 8  # sequence lengths are rounded up to a multiple: fewer distinct shapes


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


def pad_rollouts(
    prompts: Sequence[np.ndarray], completions: Sequence[Completion], advantages: np.ndarray, global_tokens: float
) -> TrainBatch:
    """A TrainBatch of N rollouts: row i is prompts[i] followed by completions[i], zeros behind (never attended to)."""
    lengths = [len(p) + len(c.token_ids) for p, c in zip(prompts, completions, strict=True)]
    shape = (len(lengths), _round_up(max(lengths)))
    tokens, mask, logprobs = np.zeros(shape, np.int64), np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        start, end = len(prompt), lengths[i]
        tokens[i, :start] = prompt
        tokens[i, start:end] = completion.token_ids
        mask[i, start:end] = 1.0
        logprobs[i, start:end] = completion.logprobs
    return TrainBatch(tokens, mask, advantages.astype(np.float32), logprobs, global_tokens)


def micro_batches(batch: TrainBatch, size: int, device: torch.device) -> list[MicroBatch]:
    """Cut a batch into micro-batches of `size` rows of similar length, each as long as its longest row needs.

    Raises ValueError when `size` does not divide the batch.
    """
    n, width = batch.tokens.shape
    if n % size:
        raise ValueError(f"micro-batch size {size} does not divide the {n} rollouts of this rank")
    used = width - np.argmax(batch.loss_mask[:, ::-1] > 0, axis=1)  # the completion ends a row
    order = np.argsort(used, kind="stable")

    def cut(rows: np.ndarray) -> MicroBatch:
        length = min(width, _round_up(int(used[rows].max())))

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
        )

    return [cut(order[i : i + size]) for i in range(0, n, size)]


def _round_up(length: int) -> int:
    return -(-length // _PAD_TO) * _PAD_TO

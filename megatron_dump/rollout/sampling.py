"""Picking tokens from logits, reproducibly."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """How completions are sampled; NeMo-Aligner's `sampling_params` and `length_params`."""

    max_length: int  # tokens of a completion at most, its stop token included
    stop_ids: tuple[int, ...]
    temperature: float = 1.0
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    use_greedy: bool = False
    min_length: int = 0  # tokens before a stop token can be drawn


def uniforms(seed: int, step: int, group_id: int, sample: int, n: int) -> np.ndarray:
    """The n random numbers in [0, 1) that decide one completion: float64 [n]."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, step, group_id, sample)))).random(n)


def request_seed(seed: int, step: int, group_id: int, sample: int) -> int:
    """The number in [0, 2^63) that decides one completion of an engine, of the same parts as `uniforms`."""
    return int(np.random.SeedSequence((seed, step, group_id, sample)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def pick_tokens(
    logits: Tensor, uniform: Tensor, options: SamplingOptions, too_short: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One token a row by inverting the distribution function at `uniform`: tokens int64 [B], logprobs float32 [B].

    logits [B, V]; uniform float64 [B]; too_short bool [B]: rows that may not end yet (None: none is). The
    log-probability is that of softmax(logits / temperature), before min_length, top-k and top-p cut it: what the
    trainer computes for the same token.
    """
    scores = logits.float() if options.temperature == 1.0 else logits.float() / options.temperature
    largest = scores.amax(-1, keepdim=True)
    weights = (scores - largest).exp_()  # [B, V]: probabilities up to a factor
    total = weights.sum(-1)
    allowed = scores
    if too_short is not None:
        allowed = _without_stops(scores, options.stop_ids, too_short)
        weights = (allowed - allowed.amax(-1, keepdim=True)).exp_()  # a stop token may have had all of it
    tokens = allowed.argmax(-1) if options.use_greedy else _invert(_truncate(weights, options), uniform)
    chosen = (scores.gather(-1, tokens[:, None]) - largest)[:, 0]
    return tokens, chosen - total.log()


def _without_stops(scores: Tensor, stop_ids: tuple[int, ...], too_short: Tensor) -> Tensor:
    known = [i for i in stop_ids if i < scores.size(-1)]
    stops = torch.tensor(known, dtype=torch.int64, device=scores.device)
    return scores.index_fill(-1, stops, -torch.inf).where(too_short[:, None], scores)


def _truncate(weights: Tensor, options: SamplingOptions) -> Tensor:
    """Zero what top-k and top-p (nucleus sampling, 1904.09751) leave out; not normalised again."""
    if options.top_k > 0:  # tokens as likely as the last of them stay, too
        least = weights.topk(min(options.top_k, weights.size(-1)), -1).values[:, -1:]
        weights = weights.where(weights >= least, 0.0)
    if options.top_p < 1.0:
        ordered, index = weights.sort(dim=-1, descending=True, stable=True)
        sums = ordered.cumsum(-1, dtype=torch.float64)
        kept = ordered.where(sums - ordered < options.top_p * sums[:, -1:], 0.0)
        weights = torch.zeros_like(weights).scatter_(-1, index, kept)
    return weights


def _invert(weights: Tensor, uniform: Tensor) -> Tensor:
    """The first token at which the sum of the weights exceeds `uniform` × their total: int64 [B].

    In two levels, so that of [B, V] no running sum is made: which block of tokens, and which token in it.
    """
    width = math.isqrt(weights.size(-1) - 1) + 1
    blocks = F.pad(weights, (0, -weights.size(-1) % width)).unflatten(-1, (-1, width))
    sums = blocks.sum(-1).double().cumsum(-1)  # [B, blocks]
    target = uniform * sums[:, -1]
    block = _first_above(sums, target)
    before = F.pad(sums, (1, 0)).gather(-1, block[:, None])[:, 0]
    inside = blocks.gather(1, block[:, None, None].expand(-1, 1, width))[:, 0].double().cumsum(-1)
    return block * width + _first_above(inside, target - before)


def _first_above(sums: Tensor, target: Tensor) -> Tensor:
    """Where the rising [B, N] first exceeds [B]: a step of it, also when rounding puts the target on its end."""
    below_end = torch.nextafter(sums[:, -1], sums.new_zeros(()))
    return torch.searchsorted(sums, torch.minimum(target, below_end)[:, None], right=True)[:, 0]

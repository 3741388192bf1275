"""Picking tokens from logits, reproducibly."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
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


def pick_tokens(logits: Tensor, uniform: Tensor, options: SamplingOptions) -> tuple[Tensor, Tensor]:
    """One token a row by inverting the distribution function at `uniform`: tokens int64 [B], logprobs float32 [B].

    logits [B, V]; uniform float64 [B]. The log-probability is that of softmax(logits / temperature), before top-k and
    top-p cut it: what the trainer computes for the same token.
    """
    logprobs = torch.log_softmax(logits.float() / options.temperature, -1)
    if options.use_greedy:
        tokens = logprobs.argmax(-1)
    else:
        weights = _truncate(logprobs.exp().double(), options)
        cumulative = weights.cumsum(-1)
        threshold = uniform[:, None] * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, threshold, right=True)[:, 0]
        # Rounding may put the threshold on the end: the last token with any weight is meant then.
        last = weights.size(-1) - 1 - (weights.flip(-1) > 0).int().argmax(-1)
        tokens = torch.minimum(tokens, last)
    return tokens, logprobs.gather(-1, tokens[:, None])[:, 0]


def _truncate(probabilities: Tensor, options: SamplingOptions) -> Tensor:
    """Zero what top-k and top-p (nucleus sampling, 1904.09751) leave out; not normalised again."""
    if options.top_k > 0:
        kept = probabilities.topk(min(options.top_k, probabilities.size(-1)), -1)
        probabilities = torch.zeros_like(probabilities).scatter(-1, kept.indices, kept.values)
    if options.top_p < 1.0:
        ordered, index = probabilities.sort(-1, descending=True)
        total = ordered.sum(-1, keepdim=True)
        before = ordered.cumsum(-1) - ordered
        ordered = ordered.masked_fill(before >= options.top_p * total, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, index, ordered)
    return probabilities

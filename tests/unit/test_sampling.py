"""Sampling against transformers' logits processors, and what is reported as a log-probability."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from megatron_dump.rollout.sampling import SamplingOptions, pick_tokens

STOPS = (3, 11)
OPTIONS = {
    "all": {},
    "temperature": {"temperature": 0.6},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.7},
    "top_k and top_p": {"top_k": 9, "top_p": 0.5, "temperature": 1.7},
    "min_length": {"min_length": 4},
    "min_length and top_p": {"min_length": 4, "top_p": 0.4, "temperature": 1.3},
    "top_k above the vocabulary": {"top_k": 100},
}


def _processors(options: SamplingOptions) -> LogitsProcessorList:
    """In the order of transformers' generate()."""
    found = LogitsProcessorList()
    if options.min_length:
        found.append(MinNewTokensLengthLogitsProcessor(0, options.min_length, list(STOPS), device="cpu"))
    found.append(TemperatureLogitsWarper(options.temperature))
    if options.top_k:
        found.append(TopKLogitsWarper(options.top_k))
    if options.top_p < 1:
        found.append(TopPLogitsWarper(options.top_p))
    return found


@pytest.mark.parametrize("made", [0, 3, 4])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("vocabulary", [29, 36, 37])
def test_the_distribution_is_that_of_transformers(name, made, vocabulary):
    """An even grid of uniforms gives each token its share, to one part of the grid."""
    options = SamplingOptions(max_length=9, stop_ids=STOPS, **OPTIONS[name])
    logits = 2 * torch.randn(4, vocabulary, generator=torch.Generator().manual_seed(vocabulary))
    n = 5000
    uniform = torch.arange(n, dtype=torch.float64) / n
    for row in logits:
        processed = _processors(options)(torch.zeros(1, made, dtype=torch.int64), row[None].clone())
        expected = torch.softmax(processed, -1)[0]
        too_short = torch.full((n,), made < options.min_length)
        tokens, logprobs = pick_tokens(row.expand(n, -1), uniform, options, too_short)
        counts = torch.bincount(tokens, minlength=vocabulary)
        assert torch.all((counts - n * expected).abs() <= 1.01)
        assert torch.all(counts[expected == 0] == 0)
        uncut = torch.log_softmax(row / options.temperature, -1)
        torch.testing.assert_close(logprobs, uncut[tokens], rtol=1e-5, atol=1e-5)


def test_greedy_takes_the_most_likely_that_is_allowed():
    logits = torch.randn(50, 29, generator=torch.Generator().manual_seed(0))
    logits[:, 3] = 9.0
    options = SamplingOptions(max_length=9, stop_ids=STOPS, use_greedy=True, min_length=2, temperature=0.5)
    uniform = torch.zeros(50, dtype=torch.float64)
    assert torch.equal(pick_tokens(logits, uniform, options)[0], logits.argmax(-1))
    too_short = torch.arange(50) % 2 == 0
    tokens, logprobs = pick_tokens(logits, uniform, options, too_short)
    allowed = logits.clone()
    allowed[:, list(STOPS)] = -torch.inf
    assert torch.equal(tokens, torch.where(too_short, allowed.argmax(-1), logits.argmax(-1)))
    torch.testing.assert_close(logprobs, torch.log_softmax(logits / 0.5, -1).gather(-1, tokens[:, None])[:, 0])


def test_a_stop_token_with_all_the_weight_can_be_forbidden():
    logits = torch.tensor([[0.0, 1.0, 500.0, 2.0]])
    options = SamplingOptions(max_length=9, stop_ids=(2, 77), min_length=1)
    uniform = torch.tensor([0.999], dtype=torch.float64)
    tokens, logprobs = pick_tokens(logits, uniform, options, torch.tensor([True]))
    assert tokens.item() == 3
    assert logprobs.item() == pytest.approx(-498, abs=1e-3)


def test_the_ends_of_the_unit_interval_give_tokens_that_can_be():
    """Also where rounding puts the target on the sum of all weights, and in a vocabulary of uneven blocks."""
    generator = torch.Generator().manual_seed(1)
    logits = 30 * torch.randn(400, 1031, generator=generator)
    logits[:, -20:] = -1e4  # nothing of them is left in fp32
    logits[:, :7] = -1e4
    options = SamplingOptions(max_length=1, stop_ids=(0,))
    for value in (0.0, float(np.nextafter(1.0, 0.0))):
        tokens, _ = pick_tokens(logits, torch.full((400,), value, dtype=torch.float64), options)
        assert torch.all(logits.gather(-1, tokens[:, None]) > -1e4)


def test_equal_tokens_at_the_edge_of_the_nucleus_do_not_widen_it():
    options = SamplingOptions(max_length=1, stop_ids=(0,), top_p=0.5)
    uniform = torch.arange(1000, dtype=torch.float64) / 1000
    tokens, _ = pick_tokens(torch.zeros(1000, 8), uniform, options)
    assert len(set(tokens.tolist())) == 4

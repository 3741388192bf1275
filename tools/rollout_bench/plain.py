"""transformers on the same work: its generate(), and the loop one would write around its key/value cache."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache, Qwen2ForCausalLM

from rollout_bench.problem import Work


@torch.no_grad()
def plain_loop(model: Qwen2ForCausalLM, work: Work) -> tuple[Tensor, Tensor, int]:
    """Each prompt prefilled once, its cache repeated for every sample: tokens and their log-probabilities, [rows, T].

    And the bytes that the cache has in the end.
    """
    cache = DynamicCache()
    logits = model(torch.from_numpy(work.token_ids()), past_key_values=cache, use_cache=True, logits_to_keep=1).logits[
        :, -1
    ]
    cache.batch_repeat_interleave(work.samples)
    logits = logits.repeat_interleave(work.samples, 0)
    tokens, logprobs = [], []
    for t in range(work.tokens):
        scores = logits.log_softmax(-1)
        tokens.append(torch.multinomial(scores.exp(), 1))
        logprobs.append(scores.gather(-1, tokens[-1]))
        if t + 1 < work.tokens:
            logits = model(tokens[-1], past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
    held = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    return torch.cat(tokens, 1), torch.cat(logprobs, 1), held


@torch.no_grad()
def hf_generate(model: Qwen2ForCausalLM, work: Work) -> Tensor:
    """generate(): each prompt is prefilled `samples` times; no log-probabilities. Tokens [rows, T]."""
    ids = torch.from_numpy(work.token_ids())
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        num_return_sequences=work.samples,
        max_new_tokens=work.tokens,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[:, work.prompt_tokens :]

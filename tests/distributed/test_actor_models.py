"""Log-probabilities of every model family against transformers, however the model is split."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.distributed.launch import run_ranks
from tests.distributed.tiny import FAMILIES, make_actor, random_rollouts, share_of, write_model

TEMPERATURE = 0.7
SPLITS = {  # ranks, keys of `model:`
    "1": (1, {}),
    "TP2xPP2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True}),
    "CP2": (2, {"context_parallel_size": 2}),
}


@pytest.fixture(scope="module", params=[*FAMILIES, "qwen2 tied"])
def model(request, tmp_path_factory):
    """A folder and its log-probabilities of the sampled tokens of random_rollouts(16), by transformers."""
    family, *tied = request.param.split()
    path = str(tmp_path_factory.mktemp("model"))
    hf = write_model(path, tied=bool(tied), family=family)
    prompts, completions, _ = random_rollouts(16)
    rows = []
    for prompt, completion in zip(prompts, completions, strict=True):
        tokens = torch.from_numpy(np.concatenate([prompt, completion.token_ids]))[None]
        with torch.no_grad():
            logprobs = torch.log_softmax(hf(tokens).logits / TEMPERATURE, -1)[0]
        rows.append(logprobs[:-1].gather(-1, tokens[0, 1:, None])[len(prompt) - 1 :, 0].numpy())
    return path, rows


@pytest.mark.parametrize("split", SPLITS)
def test_logprobs_equal_transformers(model, split):
    path, expected = model
    world, keys = SPLITS[split]

    def rank():
        actor = make_actor(path, model=keys)
        batch = share_of(actor)
        policy = actor.compute_logprobs(batch)
        reference = actor.compute_logprobs(batch, reference=True)
        if policy is None or reference is None:
            return None
        return batch.loss_mask, policy * batch.loss_mask, reference * batch.loss_mask

    results = [r for r in run_ranks(rank, world) if r is not None]
    assert len(results) == world // keys.get("pipeline_model_parallel_size", 1)  # the last stage
    for mask, policy, reference in results:
        for i, row in enumerate(expected):
            np.testing.assert_allclose(policy[i, mask[i] > 0], row, atol=1e-5)
        np.testing.assert_array_equal(policy, reference)

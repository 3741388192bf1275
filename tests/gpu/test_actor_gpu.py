"""The actor in bf16 on a CUDA device, beside transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.distributed.tiny import make_actor, random_rollouts, share_of, write_model

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    if not torch.cuda.is_available():
        pytest.fail("tests marked gpu need a CUDA device; deselect them with -m 'not gpu'")
    path = str(tmp_path_factory.mktemp("model"))
    return path, write_model(path)


@pytest.mark.parametrize("dynamic", [False, True])
def test_three_steps_in_bf16_and_log_probabilities_as_transformers_has_them(model, dynamic):
    path, hf = model
    settings = {"dynamic_batching": {"enabled": dynamic, "train_mb_tokens": 64}, "optim": {"lr": 1e-3}}
    actor = make_actor(path, trainer={"precision": "bf16"}, model=settings)
    assert next(actor.modules[0].parameters()).is_cuda
    batch = share_of(actor)
    ours = actor.compute_logprobs(batch)
    assert ours is not None
    prompts, completions, _ = random_rollouts(16)
    rounded = hf.to("cuda")
    for parameter in rounded.parameters():  # not the rotary frequencies
        parameter.data = parameter.data.to(torch.bfloat16)
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        tokens = torch.from_numpy(np.concatenate([prompt, completion.token_ids]))[None].cuda()
        with torch.no_grad():
            logprobs = torch.log_softmax(rounded(tokens).logits.float() / 0.7, -1)[0]
        expected = logprobs[:-1].gather(-1, tokens[0, 1:, None])[len(prompt) - 1 :, 0].cpu().numpy()
        row = ours[i, len(prompt) : len(prompt) + len(expected)]
        # bf16 has 8 bits and this model's logits reach tens: neither side is exact, they agree on average
        assert np.abs(row - expected).mean() < 0.1
    before = [p.detach().clone() for p in actor.modules[0].parameters()]
    for seed in range(3):
        batch = share_of(actor, seed)
        batch.ref_logprobs = actor.compute_logprobs(batch, reference=True)
        metrics = actor.train_step(batch)
        assert all(np.isfinite(value) for value in metrics.values())
        assert metrics["actor/grad_norm"] > 0
    assert any(not torch.equal(p, q) for p, q in zip(before, actor.modules[0].parameters(), strict=True))

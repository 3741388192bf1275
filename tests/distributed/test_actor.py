"""The Megatron actor against transformers, and every layout against one rank."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.distributed.launch import run_ranks
from tests.distributed.tiny import make_actor, random_rollouts, share_of, write_model

LAYOUTS = {"TP2": (2, 1, 2), "PP2": (1, 2, 2), "DP2": (1, 1, 2), "TP2xPP2": (2, 2, 4), "TP2xPP2xDP2": (2, 2, 8)}


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def model(request, tmp_path_factory):
    path = str(tmp_path_factory.mktemp("model"))
    return path, write_model(path, tied=request.param)


def _hf_logprobs(model, prompts, completions, temperature: float) -> list[np.ndarray]:
    rows = []
    for prompt, completion in zip(prompts, completions, strict=True):
        tokens = torch.from_numpy(np.concatenate([prompt, completion.token_ids]))[None]
        with torch.no_grad():
            logprobs = torch.log_softmax(model(tokens).logits / temperature, -1)[0]
        rows.append(logprobs[:-1].gather(-1, tokens[0, 1:, None])[:, 0].numpy()[len(prompt) - 1 :])
    return rows


@pytest.mark.parametrize("layout", ["TP2", "PP2", "TP2xPP2"])
def test_logprobs_equal_transformers(model, layout):
    path, hf = model
    tensor, pipeline, world = LAYOUTS[layout]

    def rank():
        actor = make_actor(path, tensor, pipeline)
        batch = share_of(actor)
        policy = actor.compute_logprobs(batch)
        reference = actor.compute_logprobs(batch, reference=True)
        return None if policy is None else (policy * batch.loss_mask, reference * batch.loss_mask)

    prompts, completions, _ = random_rollouts(16)
    expected = _hf_logprobs(hf, prompts, completions, 0.7)
    results = [r for r in run_ranks(rank, world) if r is not None]
    assert len(results) == tensor
    for policy, reference in results:
        for i, row in enumerate(expected):
            start = len(prompts[i])
            np.testing.assert_allclose(policy[i, start : start + len(row)], row, atol=2e-5)
        np.testing.assert_array_equal(policy, reference)


def _train(path: str, tensor: int, pipeline: int, micro: int = 4) -> list[dict[str, float]]:
    actor = make_actor(path, tensor, pipeline, model={"micro_batch_size": micro})
    return [_step(actor, seed) for seed in range(3)]


def _step(actor, seed: int) -> dict[str, float]:
    batch = share_of(actor, seed)
    batch.old_logprobs = actor.compute_logprobs(batch)
    if batch.old_logprobs is not None:  # as if the policy had moved since: exercises ratio and clipping
        batch.old_logprobs = batch.old_logprobs + 0.3 * np.sin(np.arange(batch.tokens.shape[1], dtype=np.float32))
    batch.ref_logprobs = actor.compute_logprobs(batch, reference=True)
    return actor.train_step(batch)


@pytest.fixture(scope="module")
def single(model):
    return run_ranks(lambda: _train(model[0], 1, 1), 1)[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_equals_one_rank(model, single, layout):
    tensor, pipeline, world = LAYOUTS[layout]
    for metrics in run_ranks(lambda: _train(model[0], tensor, pipeline), world):
        for ours, theirs in zip(metrics, single, strict=True):
            assert ours.keys() == theirs.keys()
            for key in ours:
                assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-5), key


def test_micro_batch_size_changes_nothing(model, single):
    for ours, theirs in zip(run_ranks(lambda: _train(model[0], 1, 1, micro=2), 1)[0], single, strict=True):
        for key in ours:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-5), key


def test_a_row_counts_as_often_as_its_weight_says(model):
    """Row 0 with weight 2 and row 1 with weight 0 train like row 0 twice and no row 1; rows that fill up not at all."""

    def updates() -> list[dict[str, float]]:
        prompts, completions, advantages = random_rollouts(14)
        results = []
        twice = np.array([0, 0, *range(2, 14)])
        for rows, weights in ((np.arange(14), np.array([2.0, 0.0] + [1.0] * 12)), (twice, None)):
            actor = make_actor(model[0])
            batch = actor.make_batch(
                [prompts[i] for i in rows], [completions[i] for i in rows], advantages[rows], 100.0, weights, 15
            )
            assert len(batch.tokens) == 16 and not batch.loss_mask[14:].any()  # whole micro-batches of 4
            batch.ref_logprobs = actor.compute_logprobs(batch, reference=True) + 0.1
            results.append(actor.train_step(batch))
        return results

    weighted, repeated = run_ranks(updates, 1)[0]
    for key in ("actor/loss", "actor/pg_loss", "actor/kl_loss", "actor/grad_norm"):
        assert weighted[key] == pytest.approx(repeated[key], rel=1e-5), key
    assert weighted["actor/entropy"] != pytest.approx(repeated["actor/entropy"], rel=1e-3)  # a metric, not weighted


def test_hugging_face_round_trip_is_exact(model, tmp_path):
    from safetensors.torch import load_file

    run_ranks(lambda: make_actor(model[0], 2, 2).save_hf(str(tmp_path)), 4)
    saved = {k: v for file in tmp_path.glob("*.safetensors") for k, v in load_file(file).items()}
    original = load_file(f"{model[0]}/model.safetensors")
    assert saved.keys() == original.keys()
    for name, tensor in original.items():
        assert torch.equal(saved[name], tensor), name

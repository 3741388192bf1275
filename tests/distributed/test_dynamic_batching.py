"""Dynamic micro-batches train like those of equal sizes, whatever budget and layout and whoever trains a rollout."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_dump.actor import convert
from megatron_dump.batches import balanced
from tests.distributed.launch import run_ranks
from tests.distributed.runs import make_data, rows, train
from tests.distributed.tiny import make_actor, random_rollouts, write_model

N = 16


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("model"))
    write_model(path)
    return path


def _dynamic(budget: int, logprob: int | None = None, unit: int = 8) -> dict:
    return {"enabled": True, "train_mb_tokens": budget, "logprob_mb_tokens": logprob, "sequence_length_round": unit}


def _deal(deal: str, costs: np.ndarray, ranks: int) -> list[np.ndarray]:
    if deal == "balanced":
        return balanced(costs, ranks)
    if deal == "lopsided":  # one row for the last rank, none for the second last
        return [np.arange(N - 1), *[np.arange(0)] * (ranks - 2), np.arange(N - 1, N)]
    return np.array_split(np.arange(N), ranks)


def _train(path: str, tensor: int, pipeline: int, deal: str = "in order", **settings):
    """Metrics of three steps, and this stage's weights after them."""
    actor = make_actor(path, tensor, pipeline, model=settings)
    metrics = []
    for seed in range(3):
        prompts, completions, advantages = random_rollouts(N, seed)
        lengths = np.array([len(c.token_ids) for c in completions])
        mine = _deal(deal, lengths + [len(p) for p in prompts], actor.parallel.data_size)[actor.parallel.data_rank]
        weights = np.where(np.arange(N) % 5 == 3, 0.0, 1.25)
        batch = actor.make_batch(
            [prompts[i] for i in mine],
            [completions[i] for i in mine],
            advantages[mine],
            float(lengths.sum()),
            weights[mine],
        )
        batch.old_logprobs = actor.compute_logprobs(batch)
        if batch.old_logprobs is not None:  # as if the policy had moved since
            batch.old_logprobs = batch.old_logprobs + 0.3 * np.sin(np.arange(batch.tokens.shape[1], dtype=np.float32))
        batch.ref_logprobs = actor.compute_logprobs(batch, reference=True)
        metrics.append(actor.train_step(batch))
    named = convert.named_hf_weights(actor.modules, actor.arch, actor.parallel)
    return metrics, {name: weight.numpy().copy() for name, weight in named}


@pytest.fixture(scope="module")
def single(model):
    return run_ranks(lambda: _train(model, 1, 1), 1)[0]


CASES = {  # tensor, pipeline, ranks, deal, settings
    "one budget": (1, 1, 1, "in order", {"dynamic_batching": _dynamic(64)}),
    "a row each": (1, 1, 1, "in order", {"dynamic_batching": _dynamic(24)}),
    "all at once, other lengths": (1, 1, 1, "in order", {"dynamic_batching": _dynamic(4096, 48, unit=12)}),
    "chunks of one token": (1, 1, 1, "in order", {"grpo": {"logprob_chunk_size": 1}}),
    "TP2, one chunk": (2, 1, 2, "in order", {"grpo": {"logprob_chunk_size": None}}),
    "TP2, chunks": (2, 1, 2, "in order", {"dynamic_batching": _dynamic(64), "grpo": {"logprob_chunk_size": 5}}),
    "DP2": (1, 1, 2, "balanced", {"dynamic_batching": _dynamic(64)}),
    "DP3, lopsided": (1, 1, 3, "lopsided", {"dynamic_batching": _dynamic(48)}),
    "PP2": (1, 2, 2, "in order", {"dynamic_batching": _dynamic(64)}),
    "PP2 x DP2, lopsided": (1, 2, 4, "lopsided", {"dynamic_batching": _dynamic(40, 64)}),
    "TP2 x PP2 x DP2": (2, 2, 8, "balanced", {"dynamic_batching": _dynamic(64)}),
}


@pytest.mark.parametrize("case", CASES)
def test_training_equals_equal_micro_batches_on_one_rank(model, single, case):
    tensor, pipeline, world, deal, settings = CASES[case]
    expected_metrics, expected = single
    seen = set()
    for metrics, weights in run_ranks(lambda: _train(model, tensor, pipeline, deal, **settings), world):
        for ours, theirs in zip(metrics, expected_metrics, strict=True):
            assert ours.keys() == theirs.keys()
            for key in ours:
                assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-5), key
        for name, weight in weights.items():
            # Adam makes a step of a gradient that is all rounding too: single weights may differ, the whole does not
            assert np.linalg.norm(weight - expected[name]) < 1e-4 * np.linalg.norm(expected[name]), name
            np.testing.assert_allclose(weight, expected[name], atol=3e-3, err_msg=name)  # each has moved up to 3e-2
        seen |= weights.keys()
    assert seen == expected.keys()


def test_log_probabilities_come_back_in_the_order_of_the_rows(model):
    def rank(settings):
        actor = make_actor(model, model=settings)
        prompts, completions, advantages = random_rollouts(N)
        batch = actor.make_batch(prompts, completions, advantages, 1.0)
        return actor.compute_logprobs(batch), batch.loss_mask

    (usual, mask), (dynamic, _) = (
        run_ranks(rank, 1, settings)[0] for settings in ({}, {"dynamic_batching": _dynamic(56)})
    )
    np.testing.assert_allclose(dynamic, usual, atol=2e-6)
    assert ((usual != 0) == (mask > 0)).all()


def test_a_rollout_over_the_budget_is_told_on_every_rank(model):
    def rank():
        actor = make_actor(model, model={"dynamic_batching": _dynamic(16)})
        prompts, completions, advantages = random_rollouts(N)
        long = int(np.argmax([len(p) + len(c.token_ids) for p, c in zip(prompts, completions, strict=True)]))
        i = long if actor.parallel.data_rank else int(np.argmin([len(c.token_ids) for c in completions]))
        batch = actor.make_batch([prompts[i]], [completions[i]], advantages[[i]], 1.0)
        try:
            actor.train_step(batch)
        except RuntimeError as error:
            return str(error)

    messages = run_ranks(rank, 2)
    assert messages[0] == messages[1]
    assert "model.dynamic_batching: rank 1 failed: ValueError: a rollout of 24 tokens" in messages[0]


def test_a_run_on_two_ranks_by_tokens_equals_one_of_equal_sizes(tmp_path):
    """The whole loop, from recorded completions, with two updates a step and groups that the filter rejects."""
    data = make_data(tmp_path)
    common = {
        "trainer.grpo.max_steps": 2,
        "model.global_batch_size": 16,
        "trainer.grpo.curriculum.filter": "{name: zero_variance, max_refills: 0}",
    }
    train(
        1,
        data,
        tmp_path / "one",
        **common,
        **{
            "trainer.grpo.inference_backend.record": tmp_path / "rollouts",
        },
    )
    train(
        2,
        data,
        tmp_path / "two",
        **common,
        **{
            "trainer.grpo.inference_backend.type": "recorded",
            "trainer.grpo.inference_backend.path": tmp_path / "rollouts",
            "model.dynamic_batching.enabled": "true",
            "model.dynamic_batching.train_mb_tokens": 1024,
        },
    )
    compared = 0
    for ours, theirs in zip(rows(tmp_path / "two"), rows(tmp_path / "one"), strict=True):
        for key in theirs:
            if key.startswith(("actor/", "critic/", "curriculum/")):
                assert ours[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-4), key
                compared += 1
    assert compared > 20


def test_a_budget_too_small_for_the_data_is_refused_at_the_start(tmp_path):
    data = make_data(tmp_path)
    with pytest.raises(RuntimeError, match=r"train_mb_tokens=64: the longest prompt, \d+ tokens, .* raise it to at"):
        train(
            1,
            data,
            tmp_path / "run",
            **{
                "model.dynamic_batching.enabled": "true",
                "model.dynamic_batching.train_mb_tokens": 64,
            },
        )

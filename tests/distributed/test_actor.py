"""The Megatron actor: what rows count, checkpoints, export."""

from __future__ import annotations

import numpy as np
import pytest

from tests.distributed.launch import run_ranks
from tests.distributed.tiny import make_actor, random_rollouts, train_one_step, write_model


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def model(request, tmp_path_factory):
    path = str(tmp_path_factory.mktemp("model"))
    return path, write_model(path, tied=request.param)


def _train(path: str) -> list[dict[str, float]]:
    actor = make_actor(path)
    return [train_one_step(actor, seed) for seed in range(3)]


@pytest.fixture(scope="module")
def single(model):
    return run_ranks(lambda: _train(model[0]), 1)[0]


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

"""Generation ahead of training, with the real actor and generator."""

import os

import numpy as np
import pytest

from megatron_dump.assemble import build_trainer
from megatron_dump.batches import update_shares
from megatron_dump.collect import with_advantages
from megatron_dump.curriculum.codec import outcomes_from_json
from megatron_dump.curriculum.replay import read_log, verify
from megatron_dump.rollout import Request
from megatron_dump.scoring import local_outcomes
from tests.distributed.launch import RankFailed, run_ranks
from tests.distributed.runs import SCRIPT, arguments, draws, make_data, rows, train


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("kk"))


def weights(trainer) -> list[np.ndarray]:
    return [parameter.detach().numpy().copy() for parameter in trainer.actor.module.parameters()]


def plain_steps(trainer, steps):
    """The loop written out: draw, generate, score, observe, train, one after the other."""
    collector, actor, curriculum = trainer.collector, trainer.actor, trainer.curriculum
    for step in range(steps):
        draw = curriculum.draw(step)
        requests = [
            Request(int(g), trainer.dataset[int(row)], int(n))
            for g, row, n in zip(draw.group_ids, draw.prompt_ids, draw.rollouts, strict=True)
        ]
        prompts = {r.group_id: r.prompt for r in requests}
        completions = collector.generator.generate(step, requests)
        scores = collector.scorer.score("reward", completions, prompts)
        outcomes = local_outcomes(step, completions, prompts, scores, trainer.dataset.sources)
        outcomes = with_advantages(outcomes, trainer.config.normalize_rewards)
        curriculum.observe(outcomes)
        for share in update_shares(
            outcomes, np.empty(0, np.int64), trainer.updates, 1, 0, trainer.loss_agg_mode, trainer.max_length
        ):
            mine = [completions[i] for i in share.rows]
            batch = actor.make_batch(
                [prompts[c.group_id].token_ids for c in mine],
                mine,
                share.advantages,
                share.global_tokens,
                share.weights,
                share.n_rows,
            )
            batch.ref_logprobs = actor.compute_logprobs(batch, reference=True)
            actor.train_step(batch)


def both_loops(data, folder):
    """(weights of the trainer's loop, of the plain one) after three steps."""
    ended = []
    for name, run in (("fit", lambda t: t.fit()), ("plain", lambda t: plain_steps(t, 3))):
        trainer = build_trainer(SCRIPT.read_config(arguments(1, data, folder / name))[1])
        trainer.resume()
        run(trainer)
        ended.append(weights(trainer))
        trainer.collector.scorer.close()
    return ended


def test_without_staleness_it_is_the_synchronous_loop_bit_for_bit(data, tmp_path):
    [(ours, plain)] = run_ranks(both_loops, 1, data, tmp_path, timeout_s=300)
    assert all(np.array_equal(a, b) for a, b in zip(ours, plain, strict=True))


def killed(command, after):
    """A run whose process ends in the middle of the step after `after`."""
    trainer = build_trainer(SCRIPT.read_config(command)[1])
    trainer.resume()
    train_step = trainer.train
    trainer.train = lambda *args: train_step(*args) if trainer.step < after else os._exit(0)
    trainer.fit()


def test_a_run_ahead_corrects_and_resumes_on_another_layout(data, tmp_path):
    """TP=2 x DP=2, killed in its fourth step after a checkpoint of the third, and TP=2 from there."""
    settings = {
        "trainer.grpo.max_staleness": 2,
        "model.grpo.importance_sampling_cap": 2.0,
        "trainer.grpo.max_steps": 5,
        "trainer.grpo.save_interval": 3,
        "trainer.grpo.curriculum.sources": "{name: uniform}",
    }
    train(4, data, tmp_path / "whole", tensor=2, **settings)
    with pytest.raises(RankFailed):
        run_ranks(killed, 4, arguments(4, data, tmp_path / "parts", tensor=2, **settings), 3, timeout_s=300)
    train(2, data, tmp_path / "parts", tensor=2, **settings)
    assert draws(tmp_path / "parts") == draws(tmp_path / "whole")
    for name in ("whole", "parts"):
        assert verify(read_log(tmp_path / name / "curriculum.jsonl")) == 5
        lines = rows(tmp_path / name, "curriculum.jsonl")
        told = [outcomes_from_json(line["outcomes"]) for line in lines if line["event"] == "observe"]
        prompts = [d["prompt_ids"] for d in draws(tmp_path / name)]
        assert [o.prompt_ids[::4].tolist() for o in told] == prompts  # every group of 4, once
        assert [o.ages.max() for o in told] == ([0, 1, 2, 2, 2] if name == "whole" else [0, 1, 2, 0, 1])
    metrics = rows(tmp_path / "whole")
    assert [row["rollout/age_max"] for row in metrics] == [0, 1, 2, 2, 2]
    assert metrics[0]["rollout/logprob_diff_max"] < 1e-4 < metrics[-1]["rollout/logprob_diff_max"]
    assert (
        abs(metrics[0]["rollout_corr/rollout_is_mean"] - 1)
        < 1e-5
        < abs(metrics[-1]["rollout_corr/rollout_is_mean"] - 1)
    )

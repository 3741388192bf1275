"""Generation ahead of training: what is drawn when, how old it is, and what a resumed run makes of it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from megatron_dump.collect import with_advantages
from megatron_dump.config import CurriculumConfig
from megatron_dump.curriculum.codec import draw_from_json, outcomes_from_json
from megatron_dump.curriculum.replay import read_log, verify
from megatron_dump.rollout import Request
from megatron_dump.scoring import local_outcomes
from tests.unit.guessing import Store, read, trainer, verdict


def ahead(folder, steps, staleness, **options):
    settings = {"max_staleness": staleness, **options.pop("settings", {})}
    return trainer(folder, steps, settings=settings, **options)


def events(folder):
    """(kind, step counted from 0) in their order."""
    lines = [line for line in read(folder, "curriculum.jsonl") if line["event"] in ("draw", "observe")]
    return [(line["event"], line["step"] - 1) for line in lines]


def draws(folder):
    return [draw_from_json(e["draw"]) for e in read(folder, "curriculum.jsonl") if e["event"] == "draw"]


def told(folder):
    return [outcomes_from_json(e["outcomes"]) for e in read(folder, "curriculum.jsonl") if e["event"] == "observe"]


def test_without_staleness_it_is_the_plain_loop(tmp_path):
    """Against the loop written out: draw, generate, score, observe, train."""
    run = trainer(tmp_path / "run", 6)
    run.fit()
    plain = trainer(tmp_path / "plain", 6)
    for step in range(6):
        draw = plain.curriculum.draw(step)
        requests = [
            Request(int(g), plain.dataset[int(row)], int(n))
            for g, row, n in zip(draw.group_ids, draw.prompt_ids, draw.rollouts, strict=True)
        ]
        completions = plain.actor.generate(step, requests)
        scores = [verdict(c.text, "") for c in completions]
        prompts = {r.group_id: r.prompt for r in requests}
        local = local_outcomes(step, completions, prompts, scores, plain.dataset.sources)
        plain.curriculum.observe(with_advantages(local, normalize=True))
        plain.actor.train_step(None)
    assert plain.curriculum.digest() == run.curriculum.digest()
    assert read(tmp_path / "plain", "curriculum.jsonl") == read(tmp_path / "run", "curriculum.jsonl")


@pytest.mark.parametrize("staleness", [1, 2, 5])
def test_draws_run_ahead_and_no_further(tmp_path, staleness):
    run = ahead(tmp_path, 6, staleness)
    run.fit()
    expected, drawn = [], 0
    for step in range(6):
        while drawn < min(step + 1 + staleness, 6):
            expected.append(("draw", drawn))
            drawn += 1
        expected.append(("observe", step))
    assert events(tmp_path) == expected
    for step, outcomes in enumerate(told(tmp_path)):
        assert outcomes.step == step
        assert (outcomes.ages == min(step, staleness)).all()  # one update a step
    metrics = read(tmp_path)
    assert [row["rollout/age_max"] for row in metrics] == [min(step, staleness) for step in range(6)]
    assert verify(read_log(tmp_path / "curriculum.jsonl")) == 6
    assert not run.curriculum.outstanding()


@pytest.mark.parametrize("policy", ["uniform", "dump_ucb"])
@pytest.mark.parametrize("staleness", [0, 1, 3])
@pytest.mark.parametrize("killed_after", [3, 4, 5])
def test_a_restart_loses_no_prompt_and_repeats_none(tmp_path, policy, staleness, killed_after):
    """Checkpoints after steps 2 and 4; killed at any time since: what was out is generated once more."""
    ahead(tmp_path / "whole", 9, staleness, name=policy).fit()
    store = Store()
    first = ahead(tmp_path / "parts", 9, staleness, name=policy, store=store, settings={"save_interval": 2})
    train, count = first.train, itertools.count(1)

    def until_killed(*args):
        if next(count) > killed_after:
            raise KeyboardInterrupt
        return train(*args)

    first.train = until_killed
    with pytest.raises(KeyboardInterrupt):
        first.fit()
    saved = killed_after // 2 * 2
    assert store.latest() == saved
    second = ahead(tmp_path / "parts", 9, staleness, name=policy, store=store)
    assert [d.step for d in second.curriculum.outstanding()] == list(range(saved, min(saved + staleness, 9)))
    second.fit()
    drawn, outcomes = draws(tmp_path / "parts"), told(tmp_path / "parts")
    assert [d.step for d in drawn] == list(range(9)) and [o.step for o in outcomes] == list(range(9))
    for draw, outcome in zip(drawn, outcomes, strict=True):  # every group once, every sample of it once
        assert np.array_equal(outcome.prompt_ids, np.repeat(draw.prompt_ids, draw.rollouts))
        assert np.array_equal(outcome.group_ids, np.repeat(draw.group_ids, draw.rollouts))
    assert verify(read_log(tmp_path / "parts" / "curriculum.jsonl")) == 9
    assert [row["step"] for row in read(tmp_path / "parts")] == list(range(1, 10))
    # what was out at the checkpoint is drawn already, and is what the undisturbed run drew
    upto = 9 if policy == "uniform" or staleness == 0 else saved + staleness
    for ours, theirs in list(zip(drawn, draws(tmp_path / "whole"), strict=True))[:upto]:
        assert np.array_equal(ours.prompt_ids, theirs.prompt_ids) and np.array_equal(ours.weights, theirs.weights)


def test_refills_and_pre_rollouts_go_on_ahead(tmp_path):
    prompts = {"name": "cures", "subsets": 2, "steps_per_subset": 2, "pre_rollouts": 3}
    blocks = {"filter": {"name": "zero_variance", "max_refills": 2}}
    run = ahead(tmp_path, 6, 2, prompts=prompts, blocks=blocks, size=30)
    run.fit()
    assert verify(read_log(tmp_path / "curriculum.jsonl")) == 6
    assert any(not draw.train for draw in draws(tmp_path)) and run.curriculum.step == 6
    assert any(e["rejected"] is not None for e in read(tmp_path, "curriculum.jsonl") if e["event"] == "draw")
    assert not run.curriculum.outstanding()


def test_a_changed_curriculum_draws_what_was_out_anew(tmp_path):
    store = Store()
    ahead(tmp_path, 4, 2, store=store, settings={"save_interval": 2}).fit()
    del store.saved[4]
    changed = {"max_staleness": 2}
    changed["curriculum"] = CurriculumConfig(resume_changed="allow")
    run = trainer(tmp_path, 6, store=store, settings=changed, name="uniform")
    run.fit()
    assert run.step == 6 and [d.step for d in draws(tmp_path)][-4:] == [2, 3, 4, 5]
    assert verify(read_log(tmp_path / "curriculum.jsonl")) == 6

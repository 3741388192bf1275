"""Every policy in the real loop: ragged groups, filter and refills, missing rewards, alarms, changed resumes."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from megatron_dump.curriculum.codec import outcomes_from_json
from megatron_dump.curriculum.replay import read_log, verify
from megatron_dump.rewards import register_reward, reward_fn
from megatron_dump.types import Score
from tests.distributed.runs import REPO, draws, make_data, rows, train

BLOCK = "trainer.grpo.curriculum"
SOURCES = ("kk_logic_2", "kk_logic_3", "kk_logic_4")
OWN = REPO / "tests/unit/own_policies.py"


def _nan_if_long(text: str, ground_truth: str) -> Score:
    score = reward_fn("kk")(text, ground_truth)
    return Score(math.nan, False, True) if len(text) % 3 == 0 else score


def _by_length(text: str, ground_truth: str) -> Score:
    """Half right, half wrong whatever the model can do: groups differ, and some are all alike."""
    return Score(float(len(text) % 2), len(text) % 2 == 1, True)


register_reward("test_nan", _nan_if_long)


def _broken(text: str, ground_truth: str) -> Score:
    return Score(0.0, False, False)


register_reward("test_broken", _broken)
register_reward("test_by_length", _by_length)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


def rewards(name: str, *sources: str) -> dict[str, str]:
    """Overrides that judge `sources` (default: all) by another reward function."""
    return {f"model.data.rewards.{source}": name for source in sources or SOURCES}


POLICIES = {
    "static, thompson, knapsack": {
        "sources": "{name: static, weights: {kk_logic_2: 1, kk_logic_3: 2, kk_logic_4: 1}}",
        "prompts": "{name: thompson}",
        "budget": "{name: knapsack}",
    },
    "E2H Gaussian, cures": {"sources": "{name: easy_to_hard}", "prompts": "{name: cures, floor: 0.1}"},
    "E2H cosine, neyman": {"sources": "{name: easy_to_hard, kind: cosine}", "budget": "{name: neyman}"},
    "sec, CurES with pre-rollouts": {
        "sources": "{name: sec}",
        "prompts": "{name: cures, subsets: 12, steps_per_subset: 2, pre_rollouts: 2}",
        "pass_rates": "{discount: 1.0, prior: flat}",
        "budget": "{name: neyman}",
    },
    "robust with audits": {"sources": "{name: dump_ucb_robust}", "audit": "{every: 2, prompts: 2}"},
    "uniform": {"sources": "{name: uniform}"},
    "proportional": {"sources": "{name: proportional, temperature: 2.0}"},
    "own": {
        "sources": f"{{name: {OWN}:Struggling, prior: 2.0}}",
        "prompts": f"{{name: {OWN}:LeastDrawn}}",
        "budget": f"{{name: {OWN}:WrongShare}}",
    },
}


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_trains_and_its_log_replays(data, tmp_path, name):
    overrides = {f"{BLOCK}.{block}": value for block, value in POLICIES[name].items()}
    train(2, data, tmp_path, 2, **overrides, **rewards("test_by_length"))
    logged = rows(tmp_path)
    assert [row["step"] for row in logged] == [1, 2, 3]
    for row, draw in zip(logged, draws(tmp_path), strict=True):
        assert math.isfinite(row["actor/loss"]) and row["actor/grad_norm"] > 0
        assert sum(draw["weights"]) == pytest.approx(1, abs=1e-12)
        assert sum(row.get(f"curriculum/{s}/quota", 0) for s in SOURCES) == row["train/n_rollouts"] == 32
    assert verify(read_log(tmp_path / "curriculum.jsonl")) == 3
    if "pre_rollouts" in POLICIES[name].get("prompts", ""):
        assert sum(logged[0][f"curriculum/{s}/n_pre_rollouts"] for s in SOURCES) > 0
        assert sum(logged[1][f"curriculum/{s}/n_pre_rollouts"] for s in SOURCES) == 0


def test_a_resumed_run_of_own_policies_is_the_uninterrupted_one(data, tmp_path):
    own = {f"{BLOCK}.{block}": value for block, value in POLICIES["own"].items()}
    own |= {f"{BLOCK}.filter": f"{{name: {OWN}:NoneRight}}", **rewards("test_by_length")}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(1, data, whole, **own)
    for last in (2, 3):
        train(1, data, parts, **own, **{"trainer.grpo.max_steps": last, "trainer.grpo.save_interval": 2})
    assert rows(parts, "curriculum.jsonl")[-1] == rows(whole, "curriculum.jsonl")[-1]
    assert draws(parts) == draws(whole) and verify(read_log(parts / "curriculum.jsonl")) == 3
    other = own | {f"{BLOCK}.sources": "{name: uniform}", "trainer.grpo.max_steps": 4}
    with pytest.raises(RuntimeError, match=r"curriculum sources differs: .*own_policies.py:Struggling"):
        train(1, data, parts, **other)
    with pytest.raises(RuntimeError, match=r"curriculum.sources.name: 'nope.py:X' cannot be imported"):
        train(1, data, tmp_path / "new", **{f"{BLOCK}.sources": "{name: nope.py:X}"})


RAGGED = {
    f"{BLOCK}.sources": "{name: dump_ucb_robust}",
    f"{BLOCK}.prompts": "{name: cures, subsets: 10, steps_per_subset: 3, pre_rollouts: 4}",
    f"{BLOCK}.budget": "{name: neyman}",
    f"{BLOCK}.filter": "{name: zero_variance, max_refills: 1}",
    f"{BLOCK}.pass_rates": "{discount: 1.0, prior_strength: 0.2}",  # groups of 2 to 16
    "model.grpo.loss_agg_mode": "prompt-mean",
    "model.optim.lr": 1e-4,
    "model.global_batch_size": 16,  # two updates a step
    **rewards("test_by_length"),
}


def test_ragged_filtered_groups_train_alike_on_any_layout(data, tmp_path):
    """Neyman's budget and refills at TP=2 x DP=2 against one rank, on the same completions."""
    four, one = tmp_path / "four", tmp_path / "one"
    train(4, data, four, 2, **RAGGED, **{"trainer.grpo.inference_backend.record": four / "rollouts"})
    recorded = {"type": "recorded", "path": four / "rollouts"}
    train(1, data, one, **RAGGED, **{f"trainer.grpo.inference_backend.{k}": v for k, v in recorded.items()})
    assert draws(one) == draws(four)
    assert len({n for draw in draws(one) if isinstance(draw["rollouts"], list) for n in draw["rollouts"]}) > 2
    short = 0
    for ours, theirs in zip(rows(four), rows(one), strict=True):
        assert ours.keys() == theirs.keys()
        short += ours["train/n_kept"] < ours["train/n_rollouts"]
        for key in ours:
            if not key.startswith(("timing_s/", "perf/")):
                assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-4), (ours["step"], key)
    assert short  # some groups were rejected
    assert [e["kind"] for e in rows(four, "events.jsonl")] == [e["kind"] for e in rows(one, "events.jsonl")]


def test_the_loss_is_the_mean_that_its_mode_says(data, tmp_path):
    """On one recording of ragged groups. With ratio 1 a rollout's loss is -A: in the means over rollouts the advantages
    of a group cancel, in the token mean the longer answers count more; and every mode has its own gradient."""
    ragged = {k: v for k, v in RAGGED.items() if "filter" not in k and "loss_agg" not in k}
    ragged |= {"trainer.grpo.max_steps": 1, "model.global_batch_size": 32, "trainer.grpo.normalize_rewards": "false"}
    ragged[f"{BLOCK}.prompts"] = "{name: cures, subsets: 10, pre_rollouts: 4, floor: 1.0}"  # prompts of every pass rate
    norms = set()
    for mode in ("token-mean", "seq-mean-token-mean", "prompt-mean"):
        where = {"trainer.grpo.inference_backend.record": tmp_path / "rollouts"}
        if norms:
            where = {
                f"trainer.grpo.inference_backend.{k}": v
                for k, v in (("type", "recorded"), ("path", tmp_path / "rollouts"))
            }
        train(1, data, tmp_path / mode, **ragged, **where, **{"model.grpo.loss_agg_mode": mode})
        (row,) = rows(tmp_path / mode)
        told = [outcomes_from_json(e["outcomes"]) for e in rows(tmp_path / mode, "curriculum.jsonl") if "outcomes" in e]
        trained = told[-1]
        assert trained.kept.all() and len(set(np.bincount(trained.group_ids)) - {0}) > 1
        expected = (
            -(trained.advantages * trained.lengths).sum() / trained.lengths.sum() if mode == "token-mean" else 0.0
        )
        assert row["actor/pg_loss"] == pytest.approx(expected, abs=1e-6)
        assert (abs(expected) > 1e-3) == (mode == "token-mean")
        norms.add(round(row["actor/grad_norm"], 5))
    assert len(norms) == 3


def test_a_step_without_a_group_worth_training_on_trains_nothing_and_goes_on(data, tmp_path):
    """DAPO's filter aborts at its cap; ours says so and continues."""
    settings = {f"{BLOCK}.filter": "{name: zero_variance, max_refills: 2}", "trainer.grpo.max_steps": 2}
    train(2, data, tmp_path, **settings, **rewards("test_broken"))
    logged = rows(tmp_path)
    assert [row["train/n_kept"] for row in logged] == [0, 0]
    assert [row["train/n_rollouts"] for row in logged] == [96, 96]  # two refills of 32
    assert all("actor/loss" not in row for row in logged)
    events = rows(tmp_path, "events.jsonl")
    short = [e for e in events if e["kind"] == "short_batch"]
    assert [e["step"] for e in short] == [1, 2]
    assert "trains on 0 of 32 rollouts after 2 refills" in short[0]["message"]


def test_rollouts_without_a_finite_reward_are_dropped_and_named(data, tmp_path):
    train(2, data, tmp_path, **rewards("test_nan", "kk_logic_3"))
    logged, events = rows(tmp_path), rows(tmp_path, "events.jsonl")
    dropped = [e for e in events if e["kind"] == "dropped"]
    assert dropped and {e["source"] for e in dropped} == {"kk_logic_3"}
    for row, draw in zip(logged, draws(tmp_path), strict=True):
        assert math.isfinite(row["actor/loss"]) and np.isfinite(draw["weights"]).all()
        assert row["train/n_rollouts"] - row["train/n_kept"] == row.get("curriculum/kk_logic_3/n_dropped", 0)


def test_a_broken_verifier_raises_the_alarm(data, tmp_path):
    settings = {f"{BLOCK}.alarm": "{after: 16}", f"{BLOCK}.sources": "{name: uniform}"}
    train(1, data, tmp_path, **settings, **rewards("test_broken", "kk_logic_4"))
    alarms = [e for e in rows(tmp_path, "events.jsonl") if e["kind"] == "alarm"]
    assert [e["source"] for e in alarms if e["source"] == "kk_logic_4"] == ["kk_logic_4"]  # once
    assert rows(tmp_path)[-1]["curriculum/kk_logic_4/alarm"] == 1


def test_a_changed_curriculum_resumes_only_when_allowed(data, tmp_path):
    saving = {"trainer.grpo.save_interval": 2}
    train(1, data, tmp_path, **{"trainer.grpo.max_steps": 2}, **saving)
    changed = {f"{BLOCK}.sources": "{name: sec}", "trainer.grpo.max_steps": 3, **saving}
    with pytest.raises(RuntimeError, match="curriculum sources differs: the checkpoint has .*dump_ucb.*sec"):
        train(1, data, tmp_path, **changed)
    train(1, data, tmp_path, **changed, **{f"{BLOCK}.resume_changed": "allow"})
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3]
    notices = [e["message"] for e in rows(tmp_path, "events.jsonl") if e["kind"] == "notice"]
    assert any("curriculum sources was" in message for message in notices)
    assert verify(read_log(tmp_path / "curriculum.jsonl")) == 3
    assert json.loads((tmp_path / "checkpoints/step_3/state.json").read_text())["curriculum"]["step"] == 3

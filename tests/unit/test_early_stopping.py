"""Early stopping and the best checkpoint, by any metric: the rule by hand, and whole runs around a guessing policy."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from megatron_dump import config as schema
from megatron_dump import evaluate
from megatron_dump.actor import checkpoint_files as files
from megatron_dump.actor.retention import best
from megatron_dump.config import CheckpointCallbackParams
from megatron_dump.early_stopping import EarlyStopping
from megatron_dump.stopping import Outcome
from tests.unit.guessing import Store, read, trainer

ACCURACY = "val/accuracy"


def ends_after(values, **options) -> int | None:
    """The check (from 1) after which it is over."""
    early = EarlyStopping("m", **options)
    for check, value in enumerate(values, 1):
        early.observe(check, {"m": value})
        if early.is_over:
            return check
    return None


@pytest.mark.parametrize(
    ("values", "options", "check"),
    [
        ([1, 2, 3, 4], {"patience": 1}, None),
        ([3, 2, 2, 2], {"patience": 2}, 3),
        ([3, 2, 4, 2, 2], {"patience": 2}, 5),  # an improvement begins anew
        ([3, 3.4, 3.6, 3.9], {"patience": 1, "min_delta": 0.5}, 2),
        ([3, 2, 3.2, 3.4], {"patience": 2, "min_delta": 0.5}, 3),  # compared with the best, not the last
        ([3, 2, 1, 1], {"patience": 1, "mode": "min"}, 4),
        ([math.nan, math.nan], {"patience": 2}, 2),
        ([math.inf, 1, 0, 0], {"patience": 2}, 4),
        ([1, 1 + 0.5], {"patience": 1, "min_delta": 0.5}, 2),  # more than, not as much
    ],
)
def test_the_rule_by_hand(values, options, check):
    assert ends_after(values, **options) == check


@given(st.lists(st.integers(-5, 5), max_size=30), st.integers(1, 5), st.integers(0, 29))
def test_a_saved_count_goes_on(values, patience, cut):
    whole, first, second = (EarlyStopping("m", min_delta=0, patience=patience) for _ in range(3))
    for i, value in enumerate(values):
        whole.observe(i, {"m": value})
        if i == cut:
            second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        (first if i < cut else second).observe(i, {"m": value})
    if len(values) > cut:
        assert (second.best, second.best_step, second.waited) == (whole.best, whole.best_step, whole.waited)
    other = EarlyStopping("other")
    other.load_state_dict(whole.state_dict())
    assert other.best is None and other.waited == 0


def test_a_missing_metric():
    with pytest.raises(ValueError, match=r"early_stopping_callback_params\.monitor=val/acuracy.*near it are val/accur"):
        EarlyStopping("val/acuracy").observe(1, {ACCURACY: 0.5})
    lax = EarlyStopping("val/acuracy", strict=False, patience=1)
    assert lax.observe(1, {}) is None and not lax.is_over


def plateau(monkeypatch, *accuracies):
    """Validations that find these, and the last for ever."""
    left = list(accuracies)
    found = lambda *_: {ACCURACY: left.pop(0) if len(left) > 1 else left[0]}  # noqa: E731
    monkeypatch.setattr(evaluate, "summary", found)


def run(folder, early: EarlyStopping, *, store=None, steps=12, **settings):
    made = trainer(folder, steps, store=store or Store(), settings={"val_check_interval": 2, **settings})
    made.course.stopping.early, made.course.monitor_end = early, early.monitor
    return made


def test_a_run_ends_when_its_validation_no_longer_improves(tmp_path, monkeypatch):
    plateau(monkeypatch, 0.1, 0.5, 0.4, 0.3)
    store, early = Store(), EarlyStopping(ACCURACY, patience=2)
    outcome = run(tmp_path, early, store=store, save_interval=10).fit()
    assert (outcome.state, outcome.step, outcome.max_steps) == ("finished", 8, 12)
    assert "val/accuracy has not improved by more than 0.001 in 2 checks" in outcome.reason
    assert "best 0.5 at step 4" in outcome.reason
    assert list(store.saved) == [8]  # the state it ended in, though no save was due
    said = [event["message"] for event in read(tmp_path, "events.jsonl")]
    assert "val/accuracy improved from 0.1 to 0.5" in said
    assert any("the run stops after step 8 of 12" in line and "go on" not in line for line in said)
    # the same command again trains nothing; with more patience it goes on
    monkeypatch.undo()
    plateau(monkeypatch, 0.2)
    again = trainer(tmp_path, 12, store=store, settings={"val_check_interval": 2, "save_interval": 10})
    for patience, state, step in ((2, "finished", 8), (3, "finished", 10)):
        early = EarlyStopping(ACCURACY, patience=patience)
        again.course.stopping.early, again.course.monitor_end = early, ACCURACY
        again.resume()
        outcome = again.fit()
        assert (outcome.state, outcome.step) == (state, step) and early.best == 0.5


def test_without_checkpoints_none_is_written_at_an_early_end(tmp_path, monkeypatch):
    plateau(monkeypatch, 0.5)
    store = Store()
    outcome = run(tmp_path, EarlyStopping(ACCURACY, patience=1, verbose=False), store=store).fit()
    assert (outcome.state, outcome.step) == ("finished", 4) and not store.saved


def test_a_metric_of_the_step_is_checked_at_every_step(tmp_path):
    made = run(tmp_path, EarlyStopping("train/n_rollouts", patience=3))  # never changes
    assert made.fit() == Outcome("finished", 4, 12, made.course.stopping.early.why)


def test_a_run_that_is_always_better_ends_at_its_last_step(tmp_path):
    made = run(tmp_path, EarlyStopping("perf/generated_tokens", mode="min", patience=12))
    assert made.fit() == Outcome("finished", 12, 12)


def test_a_wrong_name_is_told_after_the_first_step(tmp_path):
    made = run(tmp_path / "a", EarlyStopping("critic/score/men"))
    with pytest.raises(RuntimeError, match="monitor=critic/score/men: it was not measured; near it are critic/score/m"):
        made.fit()
    made = trainer(tmp_path / "b", 4)
    made.course.monitor_best = "acter/kl"
    with pytest.raises(RuntimeError, match="checkpoint_callback_params.monitor=acter/kl: it was not measured"):
        made.fit()


def test_a_checkpoint_holds_what_its_step_and_its_validation_measured(tmp_path):
    store = Store()
    trainer(tmp_path, 4, store=store, settings={"save_interval": 1, "val_check_interval": 2}).fit()
    steps = {row["step"]: row for row in read(tmp_path) if "train/accuracy" in row}
    for step in range(1, 5):
        state = store.state(step)
        assert all(steps[step][key] == value for key, value in state["metrics"].items())
        assert ("val/accuracy" in state["validation"]) == (step % 2 == 0)


@pytest.mark.parametrize(
    ("values", "mode", "step"),
    [({1: 0.1, 2: 0.3, 3: 0.3}, "max", 3), ({1: 0.1, 2: 0.3}, "min", 1), ({1: None, 2: math.nan}, "max", None)],
)
def test_the_best_of_a_history(values, mode, step):
    assert best(values, CheckpointCallbackParams(monitor="x", mode=mode)) == step
    assert best(values, CheckpointCallbackParams(mode=mode)) is None


def test_the_link_to_the_best_moves_and_goes(tmp_path):
    for step in (1, 2):
        (tmp_path / f"step_{step}").mkdir()
        (tmp_path / "best.new").touch()  # of a kill
        files.link_best(tmp_path, step)
        assert (tmp_path / "best").resolve() == (tmp_path / f"step_{step}").resolve()
    assert files.steps(tmp_path) == [1, 2]
    files.link_best(tmp_path, None)
    files.link_best(tmp_path, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_1", "step_2"]


def config(early=None, manager=None, **grpo):
    return schema.load(
        OmegaConf.create(
            {
                "trainer": {"grpo": {"val_check_interval": 5, **grpo}},
                "pretrained_checkpoint": {"restore_from_path": "m"},
                "model": {"data": {"train_files": ["x"], "validation_files": ["y"]}},
                "exp_manager": {
                    "explicit_log_dir": "d",
                    "create_early_stopping_callback": True,
                    "early_stopping_callback_params": early or {},
                    **(manager or {}),
                },
            }
        )
    )


@pytest.mark.parametrize(
    ("early", "grpo", "message"),
    [
        ({"patience": 0}, {}, r"patience=0: must be at least 1"),
        ({"min_delta": -1}, {}, r"min_delta=-1\.0: must not be negative"),
        ({"mode": "up"}, {}, r"mode=up: known are max and min"),
        ({}, {"val_check_interval": 0}, r"monitor=val/accuracy: trainer\.grpo\.val_check_interval=0 measures it never"),
        ({"patients": 3}, {}, r"unknown key exp_manager\.early_stopping_callback_params\.patients; did you mean"),
    ],
)
def test_parameters_that_say_nothing(early, grpo, message):
    config()
    config({"monitor": "critic/score/mean"}, val_check_interval=0)
    with pytest.raises(schema.ConfigError, match=message):
        config(early, **grpo)


def test_a_checkpoint_kept_by_a_training_metric_needs_no_validation():
    params = {"checkpoint_callback_params": {"monitor": "critic/score/mean", "save_top_k": 2}}
    loaded = config({"monitor": "actor/entropy"}, params, save_interval=3, val_check_interval=0).exp_manager
    assert loaded.checkpoint_callback_params.monitor == "critic/score/mean"
    assert loaded.early_stopping_callback_params.monitor == "actor/entropy"

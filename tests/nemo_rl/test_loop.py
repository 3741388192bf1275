"""NeMo-RL's own script, setup, dataloaders, loop and checkpoints with the curriculum: `make test-nemo-rl`."""

from __future__ import annotations

import numpy as np
import pytest

from tests.nemo_rl import toys
from tests.nemo_rl.host import PROMPTS, SIZES, TRAINERS, Host, write_files

pytestmark = pytest.mark.nemo_rl

ROWS = [(source, i) for source, size in SIZES.items() for i in range(size)]  # as the curriculum numbers them
ROLLOUTS = PROMPTS * toys.GROUP
STEPS = 6


@pytest.fixture(scope="module")
def host(nemo_rl_folder, ray_session, tmp_path_factory):
    return Host(nemo_rl_folder, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module", params=TRAINERS)
def trainer(request):
    return request.param


@pytest.fixture(scope="module")
def whole(host, trainer, tmp_path_factory):
    """Six steps without an interruption."""
    return host.run(tmp_path_factory.mktemp("whole"), *TRAINERS[trainer])


def trained_advantages(data) -> list[float]:
    """One of every rollout: NeMo-RL gives each token of an answer the same."""
    first = data["token_mask"].argmax(dim=1, keepdim=True)
    return data["advantages"].gather(1, first)[:, 0].tolist()


def test_the_policy_is_trained_on_the_prompts_that_were_drawn(whole):
    assert whole.log.order == ["draw", "observe"] * STEPS
    assert [len(drawn) for drawn in whole.log.rows] == [PROMPTS] * STEPS
    assert whole.trained_rows() == [[ROWS[row] for row in drawn for _ in range(toys.GROUP)] for drawn in whole.log.rows]


def test_every_rollout_is_told_once_as_nemo_rl_rewards_and_trains_it(whole, trainer):
    samples = np.arange(toys.GROUP)
    for step, (drawn, told) in enumerate(zip(whole.log.rows, whole.log.outcomes, strict=True)):
        assert told.step == step
        assert told.group_ids.tolist() == np.repeat(whole.log.draws[step].group_ids, toys.GROUP).tolist()
        assert told.samples.tolist() == np.tile(samples, PROMPTS).tolist()
        rewards = np.array([[toys.reward(*ROWS[row], toys.answer(g, step)) for g in samples] for row in drawn])
        assert told.rewards.tolist() == rewards.reshape(-1).tolist()
        # by hand: the mean and deviation of the group's other rollouts
        others = np.array([[np.delete(group, g) for g in samples] for group in rewards])
        spread = others.std(axis=2, ddof=1)
        advantages = (rewards - others.mean(axis=2)) / np.where(spread > 0, spread + 1e-6, 1.0)
        assert told.advantages == pytest.approx(advantages.reshape(-1), abs=1e-5)
        assert told.advantages.tolist() == pytest.approx(trained_advantages(whole.trained[step]), abs=1e-5)
        cut = trainer == "grpo_train"  # the other does not say which rollouts were cut off
        assert told.finished.tolist() == [not cut or g != toys.GROUP - 1 for _ in drawn for g in samples]


def test_the_mix_follows_the_advantages_and_is_logged(whole):
    weights = np.array(whole.log.weights)
    assert weights[0] == pytest.approx([1 / 3] * 3)
    assert (weights[1:, 1] > 0.6).all()  # only the lively ones have advantages
    lively = [sum(ROWS[row][0] == "lively" for row in drawn) for drawn in whole.log.rows]
    assert sum(lively[1:]) > 0.6 * PROMPTS * (STEPS - 1)
    logged = whole.logged()["curriculum/kk-lively/weight"]
    assert [step for step, _ in logged] == list(range(1, STEPS + 1))
    assert [value for _, value in logged] == pytest.approx(weights[:, 1])


UNIFORM = ("~grpo.curriculum.sources.temperature", "grpo.curriculum.sources.name=uniform")
DYNAMIC = ("grpo.use_dynamic_sampling=true", "grpo.batch_multiplier=2")


@pytest.mark.parametrize("overrides", [(), DYNAMIC], ids=["all groups", "dynamic sampling"])
def test_a_killed_run_goes_on_from_its_checkpoint_with_the_same_draws(host, trainer, tmp_path, overrides):
    overrides = (*overrides, *TRAINERS[trainer])
    whole = host.run(tmp_path / "whole", *overrides)
    killed = host.run(tmp_path / "part", *overrides, dies_at=4)  # saved after two steps
    rest = host.run(tmp_path / "part", *overrides)
    assert len(killed.trained) == 3 and len(rest.trained) == 4
    done = len(whole.log.rows) - len(rest.log.rows)
    assert killed.log.rows == whole.log.rows[: len(killed.log.rows)]
    assert rest.log.rows == whole.log.rows[done:] and done >= 2
    assert rest.log.weights == whole.log.weights[done:]
    assert rest.state(STEPS) == whole.state(STEPS)
    assert rest.trained_rows() == whole.trained_rows()[2:]


def test_the_curriculum_hears_of_groups_that_dynamic_sampling_rejects(host, trainer, tmp_path):
    run = host.run(tmp_path, *DYNAMIC, *UNIFORM, *TRAINERS[trainer])
    assert run.log.order == ["draw", "observe"] * len(run.log.draws) and len(run.log.draws) > STEPS
    for drawn, told in zip(run.log.rows, run.log.outcomes, strict=True):
        assert len(drawn) == 2 * PROMPTS and len(told.rewards) == 2 * ROLLOUTS
        assert told.prompt_ids.tolist() == [row for row in drawn for _ in range(toys.GROUP)]
    seen = {ROWS[row][0] for drawn in run.log.rows for row in drawn}
    trained = {source for rows in run.trained_rows() for source, _ in rows}
    assert seen == set(toys.SOURCES) and trained == {"lively"}
    assert all(len(data["input_ids"]) == ROLLOUTS for data in run.trained)
    steps = [step for step, _ in run.logged().get("curriculum/kk-lively/weight", [])]
    if trainer != "grpo_train":  # it does not say at which step it is
        assert not steps
        return
    assert len(steps) == len(run.log.draws) and set(steps) == set(range(1, STEPS + 1)) and steps == sorted(steps)


def test_advantages_are_those_of_shaped_rewards_where_dynamic_sampling_filters_by_unshaped_ones(
    host, trainer, tmp_path
):
    """Every fourth rollout is cut off, which halves its reward. Two steps take no prompt twice.

    With leave-one-out baselines NeMo-RL filters single rollouts, and trains the rest of a group on a mean of its own.
    """
    shaping = ("grpo.reward_shaping.enabled=true", "++grpo.reward_shaping.stop_properly_penalty_coef=0.5")
    whole_groups = "grpo.use_leave_one_out_baseline=false"
    overrides = (DYNAMIC[0], *shaping, whole_groups, *UNIFORM, "grpo.max_num_steps=2", *TRAINERS[trainer])
    run = host.run(tmp_path, *overrides)
    told: dict[tuple[str, int], list[float]] = {}
    for outcomes in run.log.outcomes:
        for row, advantage in zip(outcomes.prompt_ids.tolist(), outcomes.advantages.tolist(), strict=True):
            told.setdefault(ROWS[row], []).append(advantage)
    for rows, data in zip(run.trained_rows(), run.trained, strict=True):
        expected = [told[row][i % toys.GROUP] for i, row in enumerate(rows)]
        assert trained_advantages(data) == pytest.approx(expected, abs=1e-4)


def test_other_data_or_settings_are_refused(host, tmp_path):
    host.run(tmp_path, "grpo.max_num_steps=2")
    with pytest.raises(ValueError, match=r"curriculum sources differs.*grpo\.curriculum\.resume_changed=allow"):
        host.run(tmp_path, *UNIFORM)
    with pytest.raises(ValueError, match="curriculum fingerprint differs"):
        host.run(tmp_path, files=write_files(tmp_path / "other", {**SIZES, "lost": 17}))


def test_like_task_names_are_refused(host, tmp_path):
    """kk/dull.jsonl and old/kk/dull.jsonl are one task: NeMo-RL keeps one of them."""
    files = [*write_files(tmp_path), write_files(tmp_path / "old")[0]]
    with pytest.raises(ValueError, match=r"4 data sets .* became 3 tasks \(kk-dull, kk-lively, kk-lost\)"):
        host.run(tmp_path, files=files)


def test_asynchronous_training_is_refused_before_models_are_loaded(host, tmp_path):
    with pytest.raises(ValueError, match=r"grpo\.async_grpo\.enabled=true: .* set false"):
        host.run(tmp_path, "grpo.async_grpo.enabled=true")

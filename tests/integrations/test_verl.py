"""verl's V1 trainer with the curriculum, as far as a CPU goes (see verl_run.py): `make test-integrations`."""

from __future__ import annotations

import math
import os

import numpy as np
import pytest

from tests.integrations.hosts import SOURCES, write_model
from tests.integrations.verl_run import GROUP, MAX_LENGTH, PROMPTS, forget, make_trainer, train

pytestmark = pytest.mark.integrations


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def queue(tmp_path_factory):
    """verl's TransferQueue on a Ray of this machine."""
    import ray
    import transfer_queue
    from omegaconf import OmegaConf

    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_prestart_worker_first_driver": "0"}  # processes nobody wants
    os.environ |= {"RAY_raylet_start_wait_time_s": "300"}  # a busy machine takes more than Ray's minute
    ray.init(num_cpus=4, include_dashboard=False, object_store_memory=100 << 20)
    storage = {"total_storage_size": 10000, "num_data_storage_units": 1}
    transfer_queue.init(OmegaConf.create({"backend": {"storage_backend": "SimpleStorage", "SimpleStorage": storage}}))
    yield
    transfer_queue.close()
    ray.shutdown()


def test_rows_are_those_that_were_drawn_and_the_mix_follows_the_advantages(queue, model, tmp_path):
    trainer = make_trainer(tmp_path, model)
    history = train(trainer, 6)
    log = trainer.log
    assert log.order == ["draw", "observe"] * 6
    long = {i for i in range(40) if i % 8 == 5}  # verl's filter takes them out, and numbers the others anew
    kept = [i for i in range(40) if i not in long]
    assert len(trainer.train_dataset) == len(kept) == trainer.curriculum.curriculum.n_rows
    for batch, drawn in zip(trainer.agent_loop_manager.batches, log.rows, strict=True):
        assert [info["index"] for info in batch["extra_info"]] == [kept[row] for row in drawn]
        assert batch["data_source"] == [SOURCES[kept[row] % 2] for row in drawn]
    assert log.weights[0] == pytest.approx([0.5, 0.5]) and log.weights[-1][1] > 0.9
    assert history[-1]["curriculum/lively/weight"] == pytest.approx(log.weights[-1][1])


def test_outcomes_are_verls_own_rewards_and_advantages(queue, model, tmp_path):
    trainer = make_trainer(tmp_path, model)
    train(trainer, 1)
    told = trainer.log.outcomes[0]
    infos = trainer.agent_loop_manager.batches[0]["extra_info"]
    position = [i for i in range(PROMPTS) for _ in range(GROUP)]
    lively = np.array([infos[i]["index"] % 2 for i in position])
    places = np.array([g for _ in range(PROMPTS) for g in range(GROUP)])
    assert told.group_ids.tolist() == position and told.samples.tolist() == places.tolist()
    assert told.rewards.tolist() == (lively * (places % 2)).tolist()
    # GRPO by hand: rewards 0, 1, 0, 1 have mean 1/2 and deviation sqrt(1/3)
    by_hand = lively * (places % 2 - 0.5) / (math.sqrt(1 / 3) + 1e-6)
    assert told.advantages == pytest.approx(by_hand, abs=1e-6)
    assert told.lengths.tolist() == [1 + (infos[i]["index"] + g) % MAX_LENGTH for i, g in zip(position, places)]


def test_group_sizes_of_a_budget_reach_the_agent_loop(queue, model, tmp_path):
    even = "data.curriculum.sources.temperature=100.0"  # both sources, all the time
    trainer = make_trainer(tmp_path, model, 40, "+data.curriculum.budget.name=neyman", even)
    train(trainer, 8)
    sizes = [batch["__rollout_n__"] for batch in trainer.agent_loop_manager.batches]
    assert sizes == [draw.rollouts.tolist() for draw in trainer.log.draws]
    assert all(sum(step) == PROMPTS * GROUP for step in sizes) and any(len(set(step)) > 1 for step in sizes)
    assert [len(outcomes.rewards) for outcomes in trainer.log.outcomes] == [PROMPTS * GROUP] * 8


def test_lost_rollouts_teach_nothing_and_hold_nothing_up(queue, model, tmp_path):
    trainer = make_trainer(tmp_path, model)
    trainer.agent_loop_manager.lost = {(row, 2) for row in range(40)}
    train(trainer, 2)
    rewards = trainer.log.outcomes[1].rewards.reshape(PROMPTS, GROUP)
    assert np.isnan(rewards[:, 2]).all() and np.isfinite(np.delete(rewards, 2, axis=1)).all()


@pytest.mark.parametrize("first", [3, 9])  # 35 rows are 8 steps: inside the first epoch, and inside the second
def test_a_resumed_run_draws_what_an_uninterrupted_one_does(queue, model, tmp_path, first):
    whole = make_trainer(tmp_path / "whole", model)
    train(whole, 12)
    part = make_trainer(tmp_path / "part", model)
    train(part, first)
    rest = make_trainer(tmp_path / "part", model)
    assert rest.global_steps == first
    train(rest, 12 - first)
    assert part.log.rows + rest.log.rows == whole.log.rows
    assert part.log.weights + rest.log.weights == whole.log.weights
    assert rest.curriculum.curriculum.digest() == whole.curriculum.curriculum.digest()


def test_a_draw_whose_feedback_was_lost_is_made_again(queue, model, tmp_path):
    """As when verl is killed while it generates, and the loader's state was saved in between."""
    trainer = make_trainer(tmp_path, model)
    train(trainer, 2)
    trainer.prepare_step()
    state = trainer.train_dataloader.state_dict()
    rest = make_trainer(tmp_path / "rest", model)
    rest.train_dataloader.load_state_dict(state)
    rest.prepare_step()
    forget()
    assert [b["index"] for b in rest.agent_loop_manager.batches[-1]["extra_info"]] == [
        b["index"] for b in trainer.agent_loop_manager.batches[-1]["extra_info"]
    ]


def test_other_data_are_refused(queue, model, tmp_path):
    train(make_trainer(tmp_path, model), 1)
    other = make_trainer(tmp_path, model, 42)
    with pytest.raises(ValueError, match="curriculum fingerprint differs.*data.curriculum.resume_changed=allow"):
        other.prepare_step()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.dataloader_num_workers=2", "data.dataloader_num_workers=2: loader processes read ahead"),
        ("algorithm.filter_groups.enable=True", "algorithm.filter_groups.enable=True: filtered groups"),
        ("+data.curriculum.sorces.name=sec", "data.curriculum.sorces: no such key; did you mean sources?"),
        ("+data.curriculum.source_key=topic", "data.curriculum.source_key: the data has no column 'topic'"),
        ("+data.curriculum.filter.name=zero_variance", "data.curriculum.filter.name: 'zero_variance', but"),
        ("data.curriculum.sources.name=best", "data.curriculum.sources.name: 'best' is unknown"),
    ],
)
def test_what_cannot_work_is_refused(model, tmp_path, override, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, model, 40, override)


def test_another_verl_is_refused_by_what_differs():
    from verl.trainer.ppo.v1 import PPOTrainerSync

    from megatron_dump.integrations.verl import CurriculumMixin

    class Later(PPOTrainerSync):
        def _compute_advantage(self, batch):
            raise NotImplementedError

    class Trainer(CurriculumMixin, Later):
        pass

    with pytest.raises(RuntimeError, match=r"verl 0.9.1 differs .*_compute_advantage takes \(batch\), expected \(ba"):
        Trainer(None)

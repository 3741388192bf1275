"""TRL's GRPOTrainer itself, on a random tiny model: `make test-integrations`."""

from __future__ import annotations

import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest

from tests.integrations.hosts import TOKENIZER, Log, rows, write_model

pytestmark = pytest.mark.integrations

ROOT = pathlib.Path(__file__).parents[2]
PROMPTS, GROUP = 4, 4
BLOCK = {"sources": {"name": "dump_ucb", "window": 64, "exploration": 0.0, "temperature": 0.2}, "correct_reward": 0.5}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def seen():
    """Rows that the reward function was given, [calls][N]."""
    return []


def lively(seen):
    """Answers of the source `dull` are all worth the same; those of `lively` differ, by place and by first letter."""

    def reward(completions, data_source, reward_model, **columns):
        seen.append([int(truth["ground_truth"]) for truth in reward_model])
        worth = [i % 2 + (c[0]["content"][:1] < "n") / 4 for i, c in enumerate(completions)]
        return [w if source == "lively" else 0.0 for w, source in zip(worth, data_source)]

    return reward


def scripted(seen):
    """Rewards that no completion changes: of the row and the place in the group."""

    def reward(completions, reward_model, **columns):
        seen.append([int(truth["ground_truth"]) for truth in reward_model])
        return [float((3 * row + 5 * (row % 2) * (i % GROUP)) % 7) for i, row in enumerate(seen[-1])]

    return reward


def make(model, out, reward, steps, block=BLOCK, n_rows=40, **options):
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from megatron_dump.integrations.trl import CurriculumMixin

    class Trainer(CurriculumMixin, GRPOTrainer):
        pass

    settings = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "save_steps": 2} | options
    config = GRPOConfig(
        output_dir=str(out),
        max_steps=steps,
        num_generations=GROUP,
        max_completion_length=6,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        report_to="none",
        bf16=False,
        use_cpu=True,
        logging_steps=1,
        disable_tqdm=True,
        seed=3,
        **settings,
    )
    data = Dataset.from_list(rows(n_rows))
    trainer = Trainer(model, reward, config, data, eval_dataset=data.select(range(8)), curriculum=block)
    return trainer, Log(trainer.curriculum.curriculum)


def weights_of(trainer):
    return {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}


def test_it_trains_on_what_was_drawn_and_the_mix_follows_the_rewards(model, tmp_path, seen):
    trainer, log = make(model, tmp_path, lively(seen), steps=6, eval_strategy="steps", eval_steps=3)
    before = weights_of(trainer)
    trainer.train()
    assert any((before[name] != value).any() for name, value in weights_of(trainer).items())
    assert log.order == ["draw", "observe"] * 6  # no draw before the feedback of the one before, and none for eval
    drawn = [sorted(row for row in step for _ in range(GROUP)) for step in log.rows]
    assert [sorted(batch) for batch in seen if len(batch) == PROMPTS * GROUP] == drawn
    assert log.weights[0] == pytest.approx([0.5, 0.5])
    assert log.weights[-1][1] > 0.9  # |advantage| is 0 for `dull`
    assert sum(row % 2 == 0 for step in log.rows[2:] for row in step) <= 1  # of 16, at weights below 0.1
    name = "curriculum/lively/weight"
    logged = [entry[name] for entry in trainer.state.log_history if name in entry]
    assert logged == pytest.approx([weights[1] for weights in log.weights])


def test_outcomes_are_trls_own_rewards_and_advantages(model, tmp_path, seen):
    trainer, log = make(model, tmp_path, lively(seen), steps=2)
    trainer.train()
    told = log.outcomes
    logged = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    assert [outcomes.rewards.mean() for outcomes in told] == pytest.approx(logged, abs=1e-6)
    kept = list(trainer._logs["advantages"])[-PROMPTS * GROUP :]
    assert told[-1].advantages.tolist() == pytest.approx(kept, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "first", "same"),
    [
        ({}, 2, "weights"),
        ({"ignore_data_skip": True}, 2, "draws"),  # transformers then leaves the generator's state alone as well
        ({"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1}, 4, "weights"),
        ({"num_iterations": 2}, 4, "weights"),
        ({"num_iterations": 2, "save_steps": 3}, 3, "prompts"),  # between two uses of the same completions
        ({"steps_per_generation": 4, "per_device_train_batch_size": 4, "save_steps": 1}, 1, "prompts"),
    ],
)
def test_a_resumed_run_draws_what_an_uninterrupted_one_does(model, tmp_path, options, first, same):
    whole, expected = make(model, tmp_path / "whole", scripted([]), steps=6, **options)
    whole.train()
    part, before = make(model, tmp_path / "part", scripted([]), steps=first, **options)
    part.train()
    seen: list[list[int]] = []
    rest, after = make(model, tmp_path / "part", scripted(seen), steps=6, **options)
    rest.train(resume_from_checkpoint=True)
    assert rest.state.global_step == 6
    assert before.rows + after.rows == expected.rows
    assert before.weights + after.weights == expected.weights
    if same == "weights":
        assert all((whole.model.state_dict()[name] == value).all() for name, value in weights_of(rest).items())
    if same == "prompts":  # TRL generates again what a checkpoint does not hold
        assert sorted(set(seen[0])) == sorted(before.rows[-1])


def test_two_processes_draw_the_same_as_one(model, tmp_path):
    alone, expected = make(model, tmp_path / "alone", scripted([]), steps=3)
    alone.train()
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([*launch, "-m", "tests.integrations.trl_ranks", model, str(tmp_path)], check=True, timeout=550)
    for rank in (0, 1):
        drawn = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert drawn["rows"] == expected.rows and drawn["weights"] == expected.weights
        mine = [step[2 * rank : 2 * rank + 2] for step in expected.rows]  # of four prompts
        assert drawn["seen"] == [[row for row in step for _ in range(GROUP)] for step in mine]
    assert drawn["told"] == [outcomes.rewards.tolist() for outcomes in expected.outcomes]


def test_the_example_trains_and_continues(tmp_path):
    for command in (
        "kk.generate --people 2-3 --per-size 8 --test-per-size 4 --names 8 --frames 1 --seed 1",
        f"kk.dataset --in {tmp_path}",
    ):
        subprocess.run([sys.executable, "-m", *command.split(), "--out", str(tmp_path)], check=True, timeout=300)
    path = ROOT / "examples" / "integrations" / "trl_grpo.py"
    spec = importlib.util.spec_from_file_location("trl_grpo", path)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    where = ["--data", str(tmp_path / "train.parquet"), "--out", str(tmp_path / "run"), "--model", str(TOKENIZER)]
    first = example.main([*where, "--steps", "1"])
    second = example.main([*where, "--steps", "2"])
    assert (first.state.global_step, second.state.global_step, second.curriculum.step) == (1, 2, 2)
    before, after = weights_of(first), weights_of(second)
    assert any((before[name] != after[name]).any() for name in before)


def test_a_checkpoint_holds_the_state_and_other_data_are_refused(model, tmp_path, seen):
    trainer, _ = make(model, tmp_path, lively(seen), steps=2)
    trainer.train()
    state = json.loads((tmp_path / "checkpoint-2" / "curriculum.json").read_text())
    assert state["curriculum"]["step"] == 2
    other, _ = make(model, tmp_path, lively(seen), steps=4, n_rows=42)
    with pytest.raises(ValueError, match="curriculum fingerprint differs.*curriculum.resume_changed=allow"):
        other.train(resume_from_checkpoint=True)
    (tmp_path / "checkpoint-2" / "curriculum.json").unlink()
    with pytest.raises(ValueError, match="it has no curriculum.json: saved without"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_what_cannot_work_is_refused(model, tmp_path, seen):
    budget = {**BLOCK, "budget": {"name": "neyman"}}
    with pytest.raises(ValueError, match="curriculum.budget.name: 'neyman', but this trainer rolls"):
        make(model, tmp_path, lively(seen), 2, block=budget)
    with pytest.raises(ValueError, match="curriculum.source_key: the data has no column 'topic'"):
        make(model, tmp_path, lively(seen), 2, block={**BLOCK, "source_key": "topic"})


def test_another_trl_is_refused_by_what_differs():
    from trl import GRPOTrainer

    from megatron_dump.integrations.trl import CurriculumMixin

    class Later(GRPOTrainer):
        def _calculate_rewards(self, batch):
            raise NotImplementedError

    class Trainer(CurriculumMixin, Later):
        pass

    with pytest.raises(RuntimeError, match=r"trl 1.16.0 differs .*_calculate_rewards takes \(batch\), expected \(inp"):
        Trainer(curriculum=BLOCK)

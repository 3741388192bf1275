"""The curriculum in NeMo-Aligner's trainers, on gloo ranks, against a stand-in with their recorded signatures."""

from __future__ import annotations

import inspect
import itertools
import json
import pathlib

import numpy as np
import pytest
import torch.distributed as dist
import torch.utils.data

from megatron_dump.curriculum import Curriculum
from megatron_dump.integrations import aligner_rollouts, nemo_aligner
from megatron_dump.integrations.aligner_curriculum import AlignerCurriculum
from tests.distributed.launch import RankFailed, run_ranks
from tests.unit import nemo_aligner_contract as contract
from tests.unit.curricula import outcomes

RECORD = json.loads((pathlib.Path(__file__).parent / "recorded_signatures" / "nemo_aligner.json").read_text())
BLOCK = {"sources": {"name": "dump_ucb", "temperature": 0.3}, "prompts": {"name": "cures"}}
GROUP = 4
TRAINERS = {"grpo": contract.GRPOTrainer, "reinforce": contract.ReinforceTrainer, "ppo": contract.PPOTrainer}
MIXINS = {
    "grpo": nemo_aligner.GRPOCurriculumMixin,
    "reinforce": nemo_aligner.ReinforceCurriculumMixin,
    "ppo": nemo_aligner.PPOCurriculumMixin,
}


def judge(row, sample, step):
    """(reward, ended): varied; every ninth rollout is cut off."""
    return (np.sin(row * 12.9898 + sample * 78.233 + step) > 0.2) * 1.0, (row + 3 * sample + step) % 9 > 0


def trainer(kind, folder, model_parallel=1, micro=1, judge=judge, block=BLOCK, data=None, **cfg):
    """A rank's trainer with its mixin, as a training script makes it."""
    data = data or contract.Dataset()
    group = 1 if kind == "ppo" else GROUP
    curriculum = AlignerCurriculum(
        block,
        data,
        [row["task_name"] for row in data.data],
        prompts_per_step=contract.PROMPTS,
        samples_per_prompt=group,
        seed=5,
        folder=folder,
        key=f"trainer.{kind}.curriculum",
        max_steps=40,
    )
    parallel, sampler = contract.ParallelState(model_parallel), contract.MegatronPretrainingRandomSampler
    if kind == "grpo":
        build, iterator = (
            nemo_aligner.grpo_dataloader_builder(curriculum, sampler),
            contract.GRPOBatchIterator(parallel),
        )
    else:
        build = nemo_aligner.rollout_dataloader_builder(curriculum, micro, parallel, sampler)
        iterator = contract.default_batch_iterator
    settings = contract.Config(
        max_epochs=3,
        num_prompts_per_grpo_step=contract.PROMPTS,
        samples_per_prompt=GROUP,
        generation_rollout_mbs=4,
        num_rollouts_per_prompt=GROUP,
        use_leave_one_out_baseline=True,
        normalize_rewards=True,
        parallel_state=parallel,
        **cfg,
    )
    checkpoints = []
    made = type("Trainer", (MIXINS[kind], TRAINERS[kind]), {})(
        settings,
        judge,
        None,
        None,
        build,
        validation(micro),
        contract.collate,
        None,
        iterator,
        contract.Logger(),
        checkpoints.append,
        None,
        curriculum=curriculum,
    )
    return made, checkpoints


def validation(micro):
    """A loader of the first prompts, as every rank takes them."""

    class Sampler(list):
        global_batch_size, micro_batch_size = 4, micro

    return lambda consumed_samples: torch.utils.data.DataLoader(contract.Dataset(), batch_sampler=Sampler([[0], [1]]))


def steps_of(kind, folder, steps, options):
    made, _ = trainer(kind, folder, **options)
    drawn = []
    for _ in range(steps):
        made.fit(1)
        drawn.append(made.curriculum.draw.prompt_ids.tolist())
    return drawn, made.generated, made.logger.logged


def by_hand(kind, steps, leave_one_out=True, normalize=True):
    """A Curriculum over the same rows, fed with advantages worked out rollout by rollout."""
    group = 1 if kind == "ppo" else GROUP
    blocks = {**BLOCK, "budget": {"name": "fixed"}}
    curriculum = Curriculum(contract.SOURCES, contract.PROMPTS, group, 5, blocks, "any", max_steps=40)
    drawn = []
    for step in range(steps):
        draw = curriculum.draw(step)
        judged = [[judge(row, n, step) for n in range(group)] for row in draw.prompt_ids.tolist()]
        rewards = np.array([[r for r, _ in row] for row in judged])
        advantages = np.array([[advantage(row, n, leave_one_out, normalize) for n in range(group)] for row in judged])
        places = np.repeat(np.arange(contract.PROMPTS), group)
        curriculum.observe(
            outcomes(
                step,
                draw.source_ids[places],
                advantages.reshape(-1),
                rewards.reshape(-1),
                places,
                samples=np.tile(np.arange(group), contract.PROMPTS),
                prompt_ids=draw.prompt_ids[places],
            )
        )
        drawn.append(draw.prompt_ids.tolist())
    return drawn


def advantage(group, n, leave_one_out, normalize):
    """Of the n-th of a prompt's (reward, ended): against those that ended, its own left out or not."""
    reward, ended = group[n]
    if not ended or sum(e for _, e in group) <= 1:
        return 0.0
    others = [r for i, (r, e) in enumerate(group) if e and (i != n or not leave_one_out)]
    std = np.sqrt(np.mean(np.square(others)) - np.mean(others) ** 2)
    return (reward - np.mean(others)) / (std if normalize and std > 0 else 1.0)


def test_the_stand_in_has_the_recorded_signatures():
    record = {name: p for version in RECORD["versions"].values() for name, p in version["signatures"].items()}
    for owner in TRAINERS.values():
        for name, expected in record.items():
            class_name, _, method = name.partition(":")[2].partition(".")
            if class_name == owner.__name__:
                assert parameters(getattr(owner, method)) == expected, name
    builders = [v for k, v in record.items() if k.endswith("build_dataloader")]
    assert all("consumed_samples" in b for b in builders)
    iterator = record["nemo_aligner/utils/batch_iterators.py:GRPOBatchIterator"]
    assert parameters(contract.GRPOBatchIterator.__call__) == iterator
    assert (
        parameters(contract.default_batch_iterator)
        == record["nemo_aligner/utils/batch_iterators.py:DefaultBatchIterator"]
    )
    assert parameters(contract.Logger.log_metrics) == ["metrics", "step", "prefix"]


def parameters(function):
    return [name for name in inspect.signature(function).parameters if name != "self"]


@pytest.mark.parametrize(("ranks", "model_parallel"), [(1, 1), (2, 1), (4, 2)])
def test_nemo_aligner_grpo_against_recorded_signatures(tmp_path, ranks, model_parallel):
    """Every rank draws the same ids; the ranks' rollouts are together the draw; the draws are the curriculum's."""
    runs = run_ranks(steps_of, ranks, "grpo", tmp_path, 5, {"model_parallel": model_parallel})
    expected = by_hand("grpo", 5)
    for drawn, _, _ in runs:
        assert drawn == expected
    replicas = ranks // model_parallel
    for step, rows in enumerate(expected):
        shares = [generated[step] for _, generated, _ in runs]
        assert all(len(share) == contract.PROMPTS * GROUP // replicas for share in shares)
        assert all(shares[rank] == shares[rank - rank % model_parallel] for rank in range(ranks))
        assert sorted(itertools.chain(*shares[::model_parallel])) == sorted(rows * GROUP)
    logged = runs[0][2]
    assert [step for step, _ in logged] == list(range(5)) and not any(run[2] for run in runs[1:])
    assert sum(v for k, v in logged[-1][1].items() if k.endswith("/weight")) == pytest.approx(1.0)
    assert all(key.startswith("train_rollouts/curriculum/") for key in logged[-1][1])


@pytest.mark.parametrize(("ranks", "model_parallel", "micro"), [(1, 1, 4), (2, 1, 2), (4, 2, 1)])
def test_nemo_aligner_reinforce_against_recorded_signatures(tmp_path, ranks, model_parallel, micro):
    """Rank r has prompts [r * mbs : (r + 1) * mbs] of every block, rolled out in turn; together they are the draw."""
    runs = run_ranks(steps_of, ranks, "reinforce", tmp_path, 5, {"model_parallel": model_parallel, "micro": micro})
    expected = by_hand("reinforce", 5, normalize=False)
    replicas = ranks // model_parallel
    for rank, (drawn, generated, _) in enumerate(runs):
        assert drawn == expected
        for step, rows in enumerate(expected):
            starts = range(rank // model_parallel * micro, contract.PROMPTS, replicas * micro)
            assert generated[step] == [row for s in starts for _ in range(GROUP) for row in rows[s : s + micro]]


def test_nemo_aligner_ppo_against_recorded_signatures(tmp_path):
    """reward - V at the prompt's last token; the mean over each source is what the metrics show."""
    runs = run_ranks(_ppo, 2, tmp_path)
    assert runs[0][0] == runs[1][0]
    rows, (_, metrics), longest, _ = runs[0]
    came = [row for run in runs for row in run[3]]
    data, sizes = contract.Dataset(), {source: [] for source in set(contract.SOURCES)}
    for place, row in enumerate(came):
        reward, ended = judge(row, 0, 0)
        value = (place * longest + data[row]["length"] - 1) / 100.0
        sizes[contract.SOURCES[row]].append(abs(reward - value) * ended)
    assert sorted(came) == sorted(rows)
    for source, values in sizes.items():
        if values:
            expected = pytest.approx(np.mean(values), rel=1e-6)
            assert metrics[f"train_rollouts/curriculum/{source}/mean_abs_adv"] == expected


def _ppo(folder):
    made, _ = trainer("ppo", folder, micro=2, block={"sources": {"name": "uniform"}})
    longest = made.generate_rollouts()["response_tokens"].shape[1]
    logged = made.logger.logged or [(0, {})]
    return made.curriculum.draw.prompt_ids.tolist(), logged[0], longest, made.generated[0]


@pytest.mark.parametrize("kind", ["grpo", "reinforce", "ppo"])
def test_nemo_aligner_against_recorded_signatures_a_resume_draws_the_same(tmp_path, kind):
    """Saved on two ranks, continued on four: the same draws, and in the end the same state, bit for bit."""
    whole = run_ranks(_saved, 2, kind, tmp_path / "whole", 6, None)[0]
    first = run_ranks(_saved, 2, kind, tmp_path / "parts", 3, None)[0]
    assert first[0] == whole[0][:3]
    again = run_ranks(_saved, 4, kind, tmp_path / "parts", 3, first[1])
    assert all(drawn == whole[0][3:] for drawn, _ in again)
    if kind != "ppo":  # whose critic, here, judges by the place of a rollout among the ranks'
        states = [(tmp_path / run / "curriculum" / "step_6.json").read_bytes() for run in ("whole", "parts")]
        assert states[0] == states[1]


def _saved(kind, folder, steps, state):
    block = {"sources": {"name": "uniform"}} if kind == "ppo" else BLOCK
    made, checkpoints = trainer(kind, folder, block=block)
    if state is not None:
        made.load_state_dict(state)
    drawn = []
    for _ in range(steps):
        made.fit(1)
        drawn.append(made.curriculum.draw.prompt_ids.tolist())
    made.save()
    return drawn, checkpoints[-1]


def test_nemo_aligner_against_recorded_signatures_validation_teaches_nothing(tmp_path):
    assert run_ranks(_validated, 1, tmp_path) == [True]


def _validated(folder):
    made, _ = trainer("reinforce", folder)
    made.fit(1)
    state = made.curriculum._hosted.curriculum.digest()
    made.run_validation()
    return made.curriculum._hosted.curriculum.digest() == state and len(made.logger.logged) == 1


def test_every_rank_hears_of_a_failure(tmp_path):
    with pytest.raises(RankFailed, match=r"step_7.json is missing: the checkpoint of step 7 had no curriculum"):
        run_ranks(_load, 2, tmp_path)
    with pytest.raises(RankFailed, match=r"trainer\.grpo\.curriculum\.budget\.name: 'neyman', but .* fixed"):
        run_ranks(steps_of, 2, "grpo", tmp_path, 1, {"block": {**BLOCK, "budget": {"name": "neyman"}}})
    assert run_ranks(_lost_rollout, 2, tmp_path) == [True, True]


def _load(folder):
    trainer("grpo", folder)[0].load_state_dict({"step": 7, "consumed_samples": 56})


def _lost_rollout(folder):
    made, _ = trainer("grpo", folder)
    batch, _, _ = made._run_inference(made.train_dataloader_builder, 0)
    batch["idx"][0] = batch["idx"][-1]
    with pytest.raises(RuntimeError, match="rank 0 failed: ValueError: 32 rollouts do not answer the 8 prompts"):
        made.create_grpo_training_data_from_inferences(batch)
    dist.barrier()
    return True


def test_what_the_trainers_cannot_do_is_refused(tmp_path):
    assert run_ranks(_refused, 1, tmp_path) == [True]


def _refused(folder):
    with pytest.raises(ValueError, match=r"critic_warmup_steps=2: .* set it to 0"):
        trainer("ppo", folder, critic_warmup_steps=2)
    build = trainer("reinforce", folder)[0].train_dataloader_builder
    with pytest.raises(ValueError, match="33 is not a multiple of num_rollouts_per_prompt 4: it counts rollouts"):
        build(consumed_samples=33)
    made, _ = trainer("grpo", folder)
    made.fit(1)
    made.consumed_samples = 3 * contract.PROMPTS
    with pytest.raises(RuntimeError, match=r"draw\(3\) out of order: the next step of this curriculum is 1"):
        made.fit(1)
    return True


def test_a_repeated_prompt_gets_its_rollouts_in_two_groups():
    order = aligner_rollouts.order_of(["a", "b", "a"], ["a", "b", "a", "a", "b", "a"], 2)
    assert order.tolist() == [0, 2, 1, 4, 3, 5]
    with pytest.raises(ValueError, match="asked for 1 times and has 1 rollouts"):
        aligner_rollouts.order_of(["a", "b"], ["a", "a", "b"], 2)
    with pytest.raises(ValueError, match="asked for 0 times and has 2 rollouts"):
        aligner_rollouts.order_of(["a"], ["a", "a", "b", "b"], 2)


@pytest.mark.parametrize("leave_one_out", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_advantages_are_the_trainers(leave_one_out, normalize):
    rng = np.random.default_rng(3)
    groups = [
        [(float(r), bool(e)) for r, e in zip(rng.normal(size=5).round(1), rng.random(5) < p)]
        for p in (0.0, 0.2, 0.5, 0.8, 1.0)
    ]
    places = np.repeat(np.arange(5), 5)
    mixed = rng.permutation(25)
    flat = [rollout for group in groups for rollout in group]
    rewards, ended = (np.array([rollout[i] for rollout in flat])[mixed] for i in range(2))
    found = aligner_rollouts.ended_advantages(rewards, ended.astype(bool), places[mixed], leave_one_out, normalize)
    expected = np.array([advantage(group, n, leave_one_out, normalize) for group in groups for n in range(5)])[mixed]
    np.testing.assert_allclose(found, expected, atol=1e-6)

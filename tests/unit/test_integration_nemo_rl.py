"""The curriculum in NeMo-RL, against a stand-in with its recorded signatures (nemo_rl_contract.py says what that is).

The first test holds the stand-in, and what the integration asks for, to the record.
"""

from __future__ import annotations

import collections
import inspect
import json
import pathlib
import runpy
import shutil
import sys

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from megatron_dump.curriculum import Curriculum
from megatron_dump.integrations import nemo_rl, nemo_rl_host
from megatron_dump.integrations.raw_rows import fingerprint_of_rows
from tests.integrations.hosts import Log
from tests.unit import nemo_rl_contract as contract
from tests.unit.curricula import outcomes

RECORD = json.loads((pathlib.Path(__file__).parent / "recorded_signatures" / "nemo_rl.json").read_text())
EXAMPLE = pathlib.Path(__file__).parents[2] / "examples" / "nemo_rl"
DUMP = {"sources": {"name": "dump_ucb", "temperature": 0.3}}


def recorded(version: str, name: str) -> list[str] | None:
    """Parameters of `module:callable` in the record."""
    module, _, path = name.partition(":")
    if path == "calculate_baseline_and_std_per_prompt":  # grpo_sync imports it from there
        module = "nemo_rl.algorithms.utils"
    return RECORD["versions"][version]["signatures"][f"{module.replace('.', '/')}.py:{path}"]


def parameters(function) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


def uneven(task, idx, sample, draws):
    """math-hard is half right: something to learn. The others are always right, or never."""
    return sample % 2 if task == "math-hard" else task == "math-easy"


def varied(task, idx, sample, draws):
    return np.sin(len(task) * 12.9898 + idx * 78.233 + sample * 3.7 + draws) > 0.2


def begin(monkeypatch, config, sizes=contract.SIZES):
    """A run of the stand-in up to the trainer: its modules, and what `setup` returned by class."""
    host = contract.install_modules(monkeypatch)
    nemo_rl.install()
    parts = host["nemo_rl.algorithms.grpo"].setup(config, None, contract.datasets(sizes), None, policy_factory=None)
    return host, {type(part).__name__: part for part in parts}


def train(monkeypatch, config, reward, batches, sync=False, save_every=0):
    """Batches of a run, and its parts."""
    host, parts = begin(monkeypatch, config)
    trainer = (
        host["nemo_rl.algorithms.grpo_sync"].grpo_train_sync if sync else host["nemo_rl.algorithms.grpo"].grpo_train
    )
    seen: list[contract.Batch] = []
    trainer(
        parts["MultipleDataloaderWrapper"],
        parts["CheckpointManager"],
        parts["dict"],
        config,
        reward,
        batches,
        seen,
        save_every,
    )
    return seen, parts


def items(batches):
    return [list(zip(batch["task_name"], batch["idx"])) for batch in batches]


def test_what_is_asked_of_nemo_rl_is_what_the_recorded_signatures_say():
    for known, versions in (("0.6", ["0.6.0"]), ("0.7", ["0.7.0", "main, August 2026"])):
        for version in versions:
            for name, expected in nemo_rl_host.SIGNATURES[known].items():
                assert recorded(version, name) == expected.split(), (version, name)
    for name, expected in nemo_rl_host.SYNC_SIGNATURES.items():
        assert recorded("0.7.0", name) == recorded("main, August 2026", name) == expected.split()
    for name in nemo_rl_host.SIGNATURES["0.7"] | nemo_rl_host.SYNC_SIGNATURES:
        owner = contract
        for part in name.partition(":")[2].split("."):
            owner = getattr(owner, part)
        assert parameters(owner) == recorded("0.7.0", name), name
    wrapper = "nemo_rl.data.dataloader:MultipleDataloaderWrapper.__next__"
    assert parameters(contract.MultipleDataloaderWrapper.__next__) == recorded("0.7.0", wrapper)
    assert parameters(contract.rl_collate_fn) == recorded("0.7.0", "nemo_rl.data.collate_fn:rl_collate_fn")


@pytest.mark.parametrize("sync", [False, True])
def test_nemo_rl_against_recorded_signatures_batches_are_those_of_a_curriculum(monkeypatch, tmp_path, sync):
    """A Curriculum by hand, fed with advantages worked out here, draws what the host's loop was given."""
    config = contract.master_config(tmp_path, DUMP, sections={"data_plane": {"enabled": sync}})
    seen, _ = train(monkeypatch, config, varied, 12, sync)
    names = sorted(contract.SIZES)
    rows = [(name, i) for name in names for i in range(contract.SIZES[name])]
    blocks = {**DUMP, "prompts": {"name": "epoch"}, "budget": {"name": "fixed"}}
    sources = [name for name, _ in rows]
    reference = Curriculum(sources, contract.PROMPTS, contract.GROUP, 42, blocks, "any", max_steps=100)
    for step, batch in enumerate(seen):
        draw = reference.draw(step)
        assert items([batch])[0] == [rows[i] for i in draw.prompt_ids]
        assert len(batch["message_log"]) == contract.PROMPTS and int(batch["batch_max_length"].max()) == 2
        rewards = np.array([[varied(*rows[i], s, step) for s in range(contract.GROUP)] for i in draw.prompt_ids], float)
        others = (rewards.sum(1, keepdims=True) - rewards) / (contract.GROUP - 1)
        spread = np.array([[np.delete(row, s).std(ddof=1) for s in range(contract.GROUP)] for row in rewards])
        advantages = (rewards - others) / np.where(spread > 0, spread + 1e-6, 1.0)
        groups = np.repeat(np.arange(contract.PROMPTS), contract.GROUP)
        reference.observe(
            outcomes(
                step,
                draw.source_ids[groups],
                advantages.astype(np.float32).reshape(-1),
                rewards.reshape(-1),
                groups,
                samples=np.tile(np.arange(contract.GROUP), contract.PROMPTS),
                prompt_ids=draw.prompt_ids[groups],
            )
        )


@pytest.mark.parametrize("sync", [False, True])
def test_nemo_rl_against_recorded_signatures_the_mix_follows_the_weights(monkeypatch, tmp_path, sync):
    config = contract.master_config(tmp_path, DUMP, sections={"data_plane": {"enabled": sync}})
    seen, parts = train(monkeypatch, config, uneven, 60, sync)
    drawn = collections.Counter(name for batch in seen for name in batch["task_name"])
    logged = [metrics for _, metrics in parts["Logger"].logged]
    expected = {
        name: contract.PROMPTS * sum(metrics[f"curriculum/{name}/weight"] for metrics in logged)
        for name in contract.SIZES
    }
    for name, count in expected.items():
        assert abs(drawn[name] - count) < 4 * np.sqrt(count)  # independent draws: 4 standard deviations at most
    last = collections.Counter(name for batch in seen[-20:] for name in batch["task_name"])
    assert last["math-hard"] > last["math-easy"] + last["kk-3"]
    assert all(len(batch["task_name"]) == contract.PROMPTS for batch in seen)
    assert [step for step, _ in parts["Logger"].logged] == list(range(1, 61))


def test_nemo_rl_against_recorded_signatures_feedback_comes_before_the_filter(monkeypatch, tmp_path):
    """Dynamic sampling rejects two thirds of the groups; the curriculum has seen them all."""
    config = contract.master_config(tmp_path, DUMP, use_dynamic_sampling=True)
    seen, parts = train(monkeypatch, config, uneven, 30)
    logged = parts["Logger"].logged
    per_batch = contract.PROMPTS * contract.GROUP
    rollouts = [sum(v for k, v in metrics.items() if k.endswith("/n_rollouts")) for _, metrics in logged]
    assert rollouts == [per_batch] * len(seen)
    rejected = [batch for batch in seen if set(batch["task_name"]) - {"math-hard"}]
    assert rejected and len(logged) == len(seen) >= 30
    steps = [step for step, _ in logged]
    assert steps == sorted(steps) and steps[-1] < len(seen)  # steps of the trainer: some took several batches
    assert any(metrics.get("curriculum/math-easy/frac_zero_std") == 1.0 for _, metrics in logged)


@pytest.mark.parametrize("others", [True, False])
def test_nemo_rl_against_recorded_signatures_advantages_are_of_shaped_rewards(monkeypatch, tmp_path, others):
    """v0.7 filters by the deviation of rewards before they are shaped, and trains with the one after."""
    host = contract.install_modules(monkeypatch)
    config = contract.master_config(tmp_path, DUMP, use_leave_one_out_baseline=others)
    parts = contract.setup(config, None, contract.datasets(), None)
    batches = nemo_rl.attach(config, parts[2], parts[5], parts[4])
    log = Log(batches.hosted.curriculum)
    repeated, prompts = contract._rollouts(next(parts[2]), varied, 0)
    raw = repeated["unshaped_total_reward"] = repeated["total_reward"]
    shaped = repeated["total_reward"] = raw - torch.tensor([0.0, 0.0, 0.0, 0.5]).repeat(contract.PROMPTS)
    before, after = (
        contract.calculate_baseline_and_std_per_prompt(prompts, rewards, None, others) for rewards in (raw, shaped)
    )
    host["nemo_rl.algorithms.grpo"].dynamic_sampling(repeated, before[1], after[0], 1, config, None)
    expected = (shaped - after[0]) / torch.where(after[1] > 0, after[1] + 1e-6, 1.0)
    assert log.outcomes[0].advantages == pytest.approx(expected.numpy(), abs=1e-5)


@pytest.mark.parametrize("sync", [False, True])
@pytest.mark.parametrize("prompts", ["epoch", "cures", "thompson"])
def test_nemo_rl_against_recorded_signatures_a_resume_draws_the_same(monkeypatch, tmp_path, sync, prompts):
    block = {**DUMP, "prompts": {"name": prompts}}
    sections = {"data_plane": {"enabled": sync}}
    config = contract.master_config(tmp_path / "all", block, sections=sections)
    seen, _ = train(monkeypatch, config, lambda *key: varied(*key[:3], 0), 9, sync, save_every=4)
    shutil.copytree(tmp_path / "all" / "step_4", tmp_path / "part" / "step_4")
    config = contract.master_config(tmp_path / "part", block, sections=sections)
    again, parts = train(monkeypatch, config, lambda *key: varied(*key[:3], 0), 5, sync, save_every=4)
    assert items(again) == items(seen[4:])
    assert parts["Logger"].logged[0][0] == 5
    files = [
        (tmp_path / run / f"step_{step}" / "curriculum.json").read_bytes() for run, step in (("all", 8), ("part", 8))
    ]
    assert files[0] == files[1]  # bit for bit: the state after eight batches


def test_nemo_rl_against_recorded_signatures_a_changed_run_is_refused(monkeypatch, tmp_path):
    train(monkeypatch, contract.master_config(tmp_path, DUMP), varied, 2, save_every=2)
    other = {"sources": {"name": "uniform"}}
    with pytest.raises(ValueError, match=r"curriculum sources differs.*grpo\.curriculum\.resume_changed=allow"):
        begin(monkeypatch, contract.master_config(tmp_path, other))
    config = contract.master_config(tmp_path, DUMP)
    with pytest.raises(ValueError, match="curriculum fingerprint differs"):
        begin(monkeypatch, config, {**contract.SIZES, "kk-3": 21})
    begin(monkeypatch, contract.master_config(tmp_path, {**other, "resume_changed": "allow"}))
    (tmp_path / "step_2" / "curriculum.json").unlink()
    with pytest.raises(ValueError, match=r"step_2 was saved without a curriculum \(curriculum.json is missing\)"):
        begin(monkeypatch, config)


@pytest.mark.parametrize(
    ("sections", "grpo", "message"),
    [
        ({}, {"async_grpo": {"enabled": True}}, "grpo.async_grpo.enabled=true: .* set false"),
        ({"async_rl": {"max_lag": 1}}, {}, "async_rl: the single controller has no custom dataloader"),
        ({"data": {"use_multiple_dataloader": False}}, {}, "data.use_multiple_dataloader: must be true"),
        ({"data": {"custom_dataloader": "a.b"}}, {}, f"data.custom_dataloader: 'a.b' must be {contract.FUNCTION}"),
        ({}, {"curriculum": {**DUMP, "source_key": "level"}}, r"grpo\.curriculum\.source_key: .* drop it"),
        ({}, {"curriculum": None}, "grpo.curriculum: no such block"),
        ({}, {"curriculum": {"sources": {"name": "dump"}}}, r"grpo\.curriculum\.sources\.name: 'dump' is unknown"),
        ({}, {"curriculum": {**DUMP, "filter": {"name": "zero_variance"}}}, r"grpo\.curriculum\.filter\.name"),
        ({}, {"curriculum": {**DUMP, "budget": {"name": "neyman"}}}, r"grpo\.curriculum\.budget\.name.* fixed"),
    ],
)
def test_nemo_rl_against_recorded_signatures_what_cannot_work_is_refused(
    monkeypatch, tmp_path, sections, grpo, message
):
    with pytest.raises(ValueError, match=message) as error:
        begin(monkeypatch, contract.master_config(tmp_path, DUMP, sections=sections, **grpo))
    assert "\n" not in str(error.value)


def test_nemo_rl_against_recorded_signatures_like_task_names_are_refused(monkeypatch, tmp_path):
    """data/kk/3.parquet and old/kk/3.parquet are both task kk-3: NeMo-RL keeps one of them."""
    config = contract.master_config(tmp_path, DUMP)
    config.data["train"].append({"data_path": "/old/kk/3.parquet"})
    with pytest.raises(ValueError, match=r"4 data sets \(.*/old/kk/3.parquet\) became 3 tasks .*; rename"):
        begin(monkeypatch, config)


def test_nemo_rl_against_recorded_signatures_a_changed_signature_is_refused(monkeypatch):
    host = contract.install_modules(monkeypatch, "0.9.0")

    def dynamic_sampling(repeated_batch, std, baseline, generated, master_config, timer, batch_cache=None):
        raise AssertionError

    grpo = host["nemo_rl.algorithms.grpo"]
    monkeypatch.setattr(grpo, "dynamic_sampling", dynamic_sampling)
    with pytest.raises(RuntimeError) as error:
        nemo_rl.install()
    text = str(error.value)
    assert text.startswith("NeMo-RL 0.9.0") and "\n" not in text
    assert "dynamic_sampling takes (repeated_batch, std, baseline, generated, master_config" in text
    assert "init_tmp_checkpoint" not in text and "setup" not in text  # only what differs
    monkeypatch.delattr(grpo, "dynamic_sampling")
    with pytest.raises(RuntimeError, match="nemo_rl.algorithms.grpo:dynamic_sampling is missing"):
        nemo_rl.install()
    host = contract.install_modules(monkeypatch)
    monkeypatch.setattr(host["nemo_rl.algorithms.grpo"], "grpo_train", lambda: None)
    with pytest.raises(RuntimeError, match="grpo_train does not call dynamic_sampling"):
        nemo_rl.install()


def test_nemo_rl_against_recorded_signatures_the_sync_trainer_is_probed_when_it_trains(monkeypatch, tmp_path):
    host = contract.install_modules(monkeypatch)
    nemo_rl.install()
    sync = host["nemo_rl.algorithms.grpo_sync"]
    monkeypatch.setattr(sync, "calculate_baseline_and_std_per_prompt", lambda prompts, rewards: None)
    setup = host["nemo_rl.algorithms.grpo"].setup
    setup(contract.master_config(tmp_path, DUMP), None, contract.datasets(), None)
    with pytest.raises(
        RuntimeError, match=r"calculate_baseline_and_std_per_prompt takes \(prompts, rewards\), expected"
    ):
        config = contract.master_config(tmp_path, DUMP, sections={"data_plane": {"enabled": True}})
        setup(config, None, contract.datasets(), None)


def test_nemo_rl_against_recorded_signatures_version_0_6_is_known(monkeypatch, tmp_path):
    """No sync trainer, no policy_factory, and its configuration is a mapping."""
    host = contract.install_modules(monkeypatch, "0.6.0")
    monkeypatch.setitem(sys.modules, "nemo_rl.algorithms.grpo_sync", None)

    def setup(master_config, tokenizer, dataset, val_dataset, processor=None):
        return contract.setup(contract.MasterConfig(**master_config), tokenizer, dataset, val_dataset, processor)

    monkeypatch.setattr(host["nemo_rl.algorithms.grpo"], "setup", setup)
    nemo_rl.install()
    config = contract.master_config(tmp_path, DUMP)
    parts = host["nemo_rl.algorithms.grpo"].setup(config.model_dump(), None, contract.datasets(), None)
    batch = next(next(part for part in parts if isinstance(part, contract.MultipleDataloaderWrapper)))
    assert len(batch["task_name"]) == contract.PROMPTS


def test_nemo_rl_against_recorded_signatures_misuse_is_told(monkeypatch, tmp_path):
    config = contract.master_config(tmp_path, DUMP)
    _, parts = begin(monkeypatch, config)
    wrapper = parts["MultipleDataloaderWrapper"]
    next(wrapper)
    with pytest.raises(RuntimeError, match="has no curriculum: start with .*not observed"):
        next(wrapper)  # the last batch's outcomes have not come
    fresh = contract.setup(config, None, contract.datasets(), None)[2]
    with pytest.raises(RuntimeError, match="has no curriculum: start with"):
        next(fresh)
    _, parts = begin(monkeypatch, config)
    parts["MultipleDataloaderWrapper"].set_records({"chosen_task": "kk-3"})
    with pytest.raises(ValueError, match="records chosen_task: the curriculum knows what to draw"):
        next(parts["MultipleDataloaderWrapper"])


@pytest.mark.parametrize("change", ["order", "length"])
def test_nemo_rl_against_recorded_signatures_other_rollouts_are_refused(monkeypatch, tmp_path, change):
    host, parts = begin(monkeypatch, contract.master_config(tmp_path, DUMP))
    batch = next(parts["MultipleDataloaderWrapper"])
    repeated, _ = contract._rollouts(batch, varied, 0)
    indices = list(range(repeated.size))
    repeated = repeated.select_indices(indices[::-1] if change == "order" else indices[:-1])
    rewards = repeated["total_reward"]
    message = "rollout 0 has .* the batch had" if change == "order" else "31 rollouts came of 8 prompts"
    with pytest.raises(RuntimeError, match=message):
        host["nemo_rl.algorithms.grpo"].dynamic_sampling(repeated, rewards, rewards, 1, None, None, None)


def test_the_fingerprint_is_of_the_rows_alone():
    rows = [{"b": 1, "a": np.arange(3)}, {"a": "x\n", "b": None}]
    assert fingerprint_of_rows(rows) == fingerprint_of_rows([{"a": [0, 1, 2], "b": 1}, {"b": None, "a": "x\n"}])
    assert fingerprint_of_rows(rows) != fingerprint_of_rows(rows[::-1])
    assert fingerprint_of_rows([{"image": object()}]) == fingerprint_of_rows([{"image": object()}])


def test_the_example_is_a_configuration_that_the_curriculum_takes(monkeypatch, tmp_path):
    example = OmegaConf.load(EXAMPLE / "math_levels_qwen2.5_megatron.yaml")
    assert isinstance(example.defaults, str)  # one parent, NeMo-RL's
    data = OmegaConf.to_container(example.data, resolve=True)
    tasks = ["-".join(entry["data_path"].split("/")[-2:]).split(".")[0] for entry in data["train"]]  # as NeMo-RL does
    assert len(set(tasks)) == len(tasks) == 5
    grpo = OmegaConf.to_container(example.grpo)
    monkeypatch.setattr(contract, "GROUP", grpo["num_generations_per_prompt"])
    config = contract.master_config(tmp_path, None, sections={"data": data}, **grpo)
    sizes = dict.fromkeys(tasks, 40)
    monkeypatch.setattr(contract, "SIZES", sizes)
    host, parts = begin(monkeypatch, config, sizes)
    seen: list[contract.Batch] = []
    host["nemo_rl.algorithms.grpo"].grpo_train(
        parts["MultipleDataloaderWrapper"], parts["CheckpointManager"], parts["dict"], config, varied, 2, seen, 0
    )
    assert [len(batch["task_name"]) for batch in seen] == [64, 64] and set(seen[0]["task_name"]) == set(tasks)


def test_the_run_script_installs_before_nemo_rl_s_script_imports_setup(monkeypatch, tmp_path):
    contract.install_modules(monkeypatch)
    script, told = tmp_path / "run_grpo.py", tmp_path / "told"
    script.write_text(
        "import sys\nfrom nemo_rl.algorithms.grpo import setup\n"
        "open(sys.argv[1], 'w').write(setup.__wrapped__.__name__ + ' ' + __name__)\n"
    )
    monkeypatch.setattr(sys, "argv", ["run_grpo_curriculum.py", str(script), str(told)])
    runpy.run_path(str(EXAMPLE / "run_grpo_curriculum.py"), run_name="__main__")
    assert told.read_text() == "setup __main__"
    monkeypatch.setattr(sys, "argv", ["run_grpo_curriculum.py", "--config", "x.yaml"])
    with pytest.raises(SystemExit, match="first argument must be NeMo-RL's script"):
        runpy.run_path(str(EXAMPLE / "run_grpo_curriculum.py"), run_name="__main__")

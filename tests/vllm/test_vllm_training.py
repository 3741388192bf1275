"""Training runs whose rollouts vLLM generates: kk-tiny, a few steps, one and two ranks."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

import psutil
import pytest

from tests.distributed.runs import REPO, arguments, make_data, rows, train

pytestmark = pytest.mark.vllm

BACKEND = "trainer.grpo.inference_backend"
STEPS = 3


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


def _run(world, data, log_dir, tensor=1, **overrides):
    train(
        world,
        data,
        log_dir,
        tensor,
        **{
            f"{BACKEND}.type": "vllm",
            f"{BACKEND}.record": log_dir / "rollouts",
            "trainer.grpo.max_steps": STEPS,
            "model.grpo.length_params.max_length": 24,
            **overrides,
        },
    )
    return rows(log_dir)


def _rollouts(log_dir, step=0) -> list[dict]:
    """Of a step, in global order."""
    found = [
        json.loads(line)
        for path in (log_dir / "rollouts").glob(f"step_{step}_*.jsonl")
        for line in path.read_text().splitlines()
    ]
    return sorted(found, key=lambda row: (row["group_id"], row["sample"]))


@pytest.fixture(scope="module")
def one_rank(data, tmp_path_factory):
    log_dir = tmp_path_factory.mktemp("one")
    return _run(1, data, log_dir), log_dir


def _check(logged):
    assert [row["step"] for row in logged] == list(range(1, STEPS + 1))
    for row in logged:
        assert row["rollout/logprob_diff_max"] < 1e-3, row["step"]
        assert row["timing_s/sync"] > 0


def test_one_rank_trains_on_its_engines_rollouts(one_rank):
    logged, log_dir = one_rank
    _check(logged)
    for step in range(STEPS):
        found = _rollouts(log_dir, step)
        assert {row["policy_version"] for row in found} == {step}  # one update a step
        assert len({(row["group_id"], row["sample"]) for row in found}) == len(found) == 32
    assert logged[-1]["actor/kl_loss"] > 0  # the policy has moved


@pytest.mark.parametrize("tensor", [1, 2])
def test_two_ranks_train_as_one(data, one_rank, tmp_path, tensor):
    """An engine for each of two replicas; or one engine for a replica of two ranks."""
    expected, log_dir = one_rank
    logged = _run(2, data, tmp_path, tensor)
    _check(logged)
    assert len(list((tmp_path / "engines").iterdir())) == 2 // tensor

    assert _sampled(tmp_path) == _sampled(log_dir)
    assert logged[0]["actor/grad_norm"] == pytest.approx(expected[0]["actor/grad_norm"], rel=1e-3)
    logs = {str(path) for path in (tmp_path / "engines").iterdir()}
    assert not [p for p in psutil.process_iter() if logs & _open_files(p)]


def test_several_engines_of_a_replica_sample_what_one_does(data, one_rank, tmp_path):
    logged = _run(1, data, tmp_path, **{f"{BACKEND}.engines": 2, f"{BACKEND}.pool.min_chunk_tokens": 64})
    _check(logged)
    assert len(list((tmp_path / "engines").iterdir())) == 2
    for step in range(STEPS):
        assert _sampled(tmp_path, step) == _sampled(one_rank[1], step)


def test_generation_runs_ahead_of_training(data, tmp_path):
    """The engine works on the next step while this one is trained: its rollouts are a version old, and corrected."""
    ahead = {"trainer.grpo.max_staleness": 1, "model.grpo.importance_sampling_cap": 2.0}
    logged = _run(2, data, tmp_path, **ahead)
    assert [row["rollout/age_max"] for row in logged] == [0, 1, 1]
    for step in range(STEPS):
        assert {row["policy_version"] for row in _rollouts(tmp_path, step)} == {max(step - 1, 0)}
    assert logged[0]["rollout/logprob_diff_max"] < 1e-3
    assert abs(logged[0]["rollout_corr/rollout_is_mean"] - 1) < 1e-4


def test_engines_and_reward_workers_on_ray(data, one_rank, tmp_path):
    """The documented command: two ranks, two engines that they share, a cluster of the run's own."""
    temporary = pathlib.Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))  # Ray's sockets have long names
    settings = {
        f"{BACKEND}.type": "vllm",
        f"{BACKEND}.record": tmp_path / "rollouts",
        f"{BACKEND}.ray.enabled": "true",
        f"{BACKEND}.engines": 2,
        f"{BACKEND}.ray.num_cpus": 4,
        f"{BACKEND}.ray.temp_dir": temporary,
        "model.data.reward_workers.ray_actors": 1,
        "model.data.reward_workers.workers": 1,
        "trainer.grpo.max_steps": STEPS,
        "model.grpo.length_params.max_length": 24,
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "examples/train_gpt_grpo.py"]
    env = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    ran = subprocess.run(
        command + arguments(2, data, tmp_path, **settings),
        cwd=REPO,
        env=env,
        capture_output=True,
        text=True,
        timeout=400,
    )
    try:
        assert ran.returncode == 0, ran.stderr[-4000:]
        logged = rows(tmp_path)
        _check(logged)
        assert [_sampled(tmp_path, step) for step in (0, 1)] == [_sampled(one_rank[1], step) for step in (0, 1)]
        assert logged[0]["critic/rewards/mean"] == one_rank[0][0]["critic/rewards/mean"]
        assert not [p for p in psutil.process_iter(["cmdline"]) if str(temporary) in " ".join(p.info["cmdline"] or [])]
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sampled(folder, step=0):
    return [(row["group_id"], row["sample"], row["token_ids"]) for row in _rollouts(folder, step)]


def _open_files(process) -> set[str]:
    try:
        return {file.path for file in process.open_files()}
    except psutil.Error:  # gone, or somebody else's
        return set()


def test_an_option_that_vllm_does_not_know_ends_the_run_with_a_line(data, tmp_path):
    with pytest.raises(RuntimeError, match=r"ConfigError: .*vllm.enforce_eagr: unknown to vLLM"):
        _run(1, data, tmp_path, **{f"{BACKEND}.vllm.enforce_eagr": "true"})

"""Training runs whose rollouts vLLM generates: kk-tiny, a few steps, one and two ranks."""

from __future__ import annotations

import json

import psutil
import pytest

from tests.distributed.runs import make_data, rows, train

pytestmark = pytest.mark.vllm

BACKEND = "trainer.grpo.inference_backend"
STEPS = 3


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


def _run(world, data, log_dir, tensor=1, **overrides):
    train(
        world, data, log_dir, tensor,
        **{f"{BACKEND}.type": "vllm", f"{BACKEND}.record": log_dir / "rollouts", "trainer.grpo.max_steps": STEPS,
           "model.grpo.length_params.max_length": 24, **overrides},
    )  # fmt: skip
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

    def sampled(folder):
        return [(row["group_id"], row["sample"], row["token_ids"]) for row in _rollouts(folder)]

    assert sampled(tmp_path) == sampled(log_dir)
    assert logged[0]["actor/grad_norm"] == pytest.approx(expected[0]["actor/grad_norm"], rel=1e-3)
    logs = {str(path) for path in (tmp_path / "engines").iterdir()}
    assert not [p for p in psutil.process_iter() if logs & _open_files(p)]


def _open_files(process) -> set[str]:
    try:
        return {file.path for file in process.open_files()}
    except psutil.Error:  # gone, or somebody else's
        return set()


def test_an_option_that_vllm_does_not_know_ends_the_run_with_a_line(data, tmp_path):
    with pytest.raises(RuntimeError, match=r"ConfigError: .*vllm.enforce_eagr: unknown to vLLM"):
        _run(1, data, tmp_path, **{f"{BACKEND}.vllm.enforce_eagr": "true"})

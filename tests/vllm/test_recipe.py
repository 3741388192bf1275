"""The recipe that needs vLLM, for two steps."""

from __future__ import annotations

import pytest

from tests.distributed.launch import run_ranks
from tests.distributed.runs import make_data, one_rank, rows

pytestmark = pytest.mark.vllm


def test_async_vllm_generates_a_step_ahead(tmp_path):
    data = make_data(tmp_path / "data")
    settings = {
        "model.data.train_files": f"[{data / 'train.parquet'}]",
        "model.data.validation_files": "[]",
        "exp_manager.explicit_log_dir": tmp_path,
        "trainer.grpo.max_steps": 3,
        "trainer.grpo.samples_per_prompt": 4,
        "model.global_batch_size": 64,
        "model.grpo.length_params.max_length": 24,
    }
    command = ["--config-name=async_vllm", *(f"{key}={value}" for key, value in settings.items())]
    run_ranks(one_rank, 2, command, timeout_s=400)
    logged = rows(tmp_path)
    assert [row["step"] for row in logged] == [1, 2, 3]
    assert [row["rollout/age_max"] for row in logged] == [0, 1, 1]
    assert all("rollout_corr/rollout_is_mean" in row for row in logged)
    assert len(list((tmp_path / "engines").iterdir())) == 2

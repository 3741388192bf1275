"""Whole runs of examples/train_gpt_grpo.py on forked ranks: layouts, resume, logs, errors."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.distributed.runs import REPO, arguments, draws, make_data, rows, train

PHASES = ("gen", "reward", "old_log_prob", "ref", "adv", "update_actor", "sync", "step")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def recorded(data, tmp_path_factory):
    """Eight ranks, TP=2 x PP=2 x DP=2, two optimizer steps a step; their completions are kept."""
    log_dir = tmp_path_factory.mktemp("eight")
    weights = train(
        8,
        data,
        log_dir,
        2,
        2,
        **{
            "trainer.grpo.inference_backend.record": log_dir / "rollouts",
            "trainer.grpo.inference_backend.reshard": "false",
            "model.global_batch_size": 16,
        },
    )
    return log_dir, weights


def test_eight_ranks_train_as_one(data, recorded, tmp_path):
    eight, _ = recorded
    train(
        1,
        data,
        tmp_path,
        **{
            "trainer.grpo.inference_backend.type": "recorded",
            "trainer.grpo.inference_backend.path": eight / "rollouts",
            "model.global_batch_size": 16,
        },
    )
    compared = 0
    for ours, theirs in zip(rows(eight), rows(tmp_path), strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours:
            if not key.startswith(("timing_s/", "perf/")):
                assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-4), (ours["step"], key)
                compared += key in ("actor/loss", "actor/grad_norm")
    assert compared == 6
    assert rows(eight)[2]["actor/kl_loss"] > 0  # the policy has moved


def test_every_step_logs_the_keys_and_weights_that_sum_to_one(recorded):
    log_dir, weights = recorded
    assert len(set(weights)) == 1  # every rank received the same
    sources = ("kk_logic_2", "kk_logic_3", "kk_logic_4")
    logged_rows, drawn = rows(log_dir), draws(log_dir)
    assert [row["step"] for row in logged_rows] == [draw["step"] for draw in drawn] == [1, 2, 3]
    for row, draw in zip(logged_rows, drawn, strict=True):
        logged = [row[f"curriculum/{s}/weight"] for s in sources]
        assert sum(logged) == pytest.approx(1.0, abs=1e-12)
        assert logged == draw["weights"]
        for key in (
            "actor/pg_loss actor/grad_norm actor/entropy actor/kl_loss actor/pg_clipfrac actor/lr critic/score/mean "
            "critic/rewards/mean critic/advantages/mean response_length/mean response_length/max "
            "response_length/clip_ratio perf/throughput rollout/logprob_diff_mean rollout/logprob_diff_max"
        ).split():
            assert np.isfinite(row[key]), key
        for phase in PHASES:
            assert row[f"timing_s/{phase}"] >= 0
        for name in ("ucb", "mean_abs_adv", "bonus", "n_prompts", "n_rollouts", "pass_rate"):
            assert all(f"curriculum/{s}/{name}" in row for s in sources), name
        assert sum(row[f"curriculum/{s}/n_rollouts"] for s in sources) == 32
        assert row["rollout/logprob_diff_max"] < 1e-4
    assert logged_rows[0]["curriculum/kk_logic_2/weight"] == pytest.approx(1 / 3)
    assert drawn[1]["weights"] != drawn[0]["weights"]


@pytest.mark.parametrize("ranks_after", [2, 1])
def test_a_resumed_run_draws_what_an_uninterrupted_one_draws(data, tmp_path, ranks_after):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(2, data, whole, **{"trainer.grpo.max_steps": 4})
    train(2, data, parts, **{"trainer.grpo.max_steps": 2, "trainer.grpo.save_interval": 2})
    (parts / "metrics.jsonl").open("a").write('{"step": 3, "lost": 1}\n')  # written after the checkpoint, then killed
    train(ranks_after, data, parts, **{"trainer.grpo.max_steps": 4, "trainer.grpo.save_interval": 2})
    expected, resumed = draws(whole), draws(parts)
    assert resumed == expected
    for ours, theirs in zip(rows(parts), rows(whole), strict=True):
        assert ours["actor/grad_norm"] == pytest.approx(theirs["actor/grad_norm"], rel=1e-3)


def test_a_run_that_would_differ_is_not_resumed(data, tmp_path):
    train(1, data, tmp_path, **{"trainer.grpo.max_steps": 1, "trainer.grpo.save_interval": 1})
    other = {"model.data.train_files": f"[{data / 'test.parquet'}]", "trainer.grpo.max_steps": 2}
    with pytest.raises(RuntimeError, match=r"curriculum fingerprint differs: the checkpoint has"):
        train(1, data, tmp_path, **other)
    changed = {"model.grpo.sampling_params.temperature": 0.5, "trainer.grpo.max_steps": 2}
    with pytest.raises(
        RuntimeError, match=r"model.grpo.sampling_params.temperature: the checkpoint has 1.0, this run 0.5"
    ):
        train(1, data, tmp_path, **changed)


def test_completions_that_cannot_fit_the_model_are_refused(data, tmp_path):
    with pytest.raises(
        RuntimeError, match=r"max_length=500: with the longest prompt of train, \d+ tokens, it exceeds .* 512"
    ):
        train(1, data, tmp_path, **{"model.grpo.length_params.max_length": 500})


def _parquet_without_source(folder) -> pathlib.Path:
    table = pq.read_table(folder / "train.parquet").drop_columns(["data_source"])
    pq.write_table(table, folder / "no_source.parquet")
    return folder / "no_source.parquet"


ERRORS = {
    "unknown key": (
        lambda data: {"trainer.grpo.max_stepz": 5},
        r"unknown key trainer\.grpo\.max_stepz; did you mean trainer\.grpo\.max_steps\?",
    ),
    "missing file": (
        lambda data: {"model.data.train_files": "[nowhere.parquet]"},
        r"model\.data\.train_files: no such file: nowhere\.parquet",
    ),
    "world size": (
        lambda data: {"model.tensor_model_parallel_size": 2, "model.pipeline_model_parallel_size": 2},
        r"tensor_model_parallel_size=2 × model\.pipeline_model_parallel_size=2 = 4 .* world size 2: start 4 ranks",
    ),
    "other world": (
        lambda data: {"trainer.devices": 8},
        r"trainer\.num_nodes=1 × trainer\.devices=8 = 8 ranks, but 2 were started: make them agree",
    ),
    "generation": (
        lambda data: {
            "model.context_parallel_size": 2,
            "model.share_prompts": "false",
            "trainer.grpo.inference_backend.reshard": "false",
        },
        r"model\.context_parallel_size=2: generation cannot .*; set trainer\.grpo\.inference_backend\.reshard=true",
    ),
    "no source column": (
        lambda data: {"model.data.train_files": f"[{_parquet_without_source(data)}]"},
        r"trainer\.grpo\.curriculum\.source_key.*data_source.*no_source\.parquet|no_source\.parquet.*data_source",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_bad_input_is_one_clear_line_on_every_rank(data, tmp_path, case):
    overrides, pattern = ERRORS[case]
    ranks = []
    for rank in range(2):
        command = [
            sys.executable,
            str(REPO / "examples/train_gpt_grpo.py"),
            *arguments(2, data, tmp_path, **overrides(data)),
        ]
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "1",
            "OMP_NUM_THREADS": "1",
        }
        ranks.append(subprocess.Popen(command, cwd=REPO, env=environment, stderr=subprocess.PIPE, text=True))
    for rank, process in enumerate(ranks):
        _, errors = process.communicate(timeout=120)
        lines = [line for line in errors.splitlines() if "error:" in line]
        assert process.returncode == 1
        assert len(lines) == 1 and lines[0].startswith(f"[rank {rank}] error: ")
        assert re.search(pattern, lines[0]), lines[0]
        assert "Traceback" not in errors


@pytest.mark.slow
def test_the_documented_command_runs(data, tmp_path):
    """torchrun with eight ranks, as README has it."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=8",
        "examples/train_gpt_grpo.py",
        "--config-name=kk_cpu",
        "model.tensor_model_parallel_size=2",
        "model.pipeline_model_parallel_size=2",
        "trainer.grpo.max_steps=3",
        "trainer.grpo.samples_per_prompt=8",
        "model.micro_batch_size=16",
        f"model.data.train_files=[{data / 'train.parquet'}]",
        f"model.data.validation_files=[{data / 'test.parquet'}]",
        f"exp_manager.explicit_log_dir={tmp_path}",
        "trainer.grpo.val_samples_per_prompt=1",
        "trainer.grpo.num_prompts_per_grpo_step=4",
        "model.global_batch_size=32",
    ]
    run = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=400, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "test accuracy" in run.stdout and "mean" in run.stdout
    for name in ("report.html", "report.png", "config.yaml"):
        assert (tmp_path / name).stat().st_size > 0
        assert name == "config.yaml" or str(tmp_path / name) in run.stdout

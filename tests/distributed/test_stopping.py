"""Runs that are told to stop, on several ranks: where they stop, what is kept, and how they go on."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest

from megatron_dump.assemble import build_trainer, join, make_stopping
from megatron_dump.curriculum.codec import outcomes_from_json
from megatron_dump.curriculum.replay import read_log, verify
from megatron_dump.stopping import StopSignal
from megatron_dump.types import Score
from tests.distributed.launch import run_ranks
from tests.distributed.runs import REPO, SCRIPT, arguments, draws, make_data, rows

STEPS = 3


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("kk"))


def life(command, signalled=None, job_s=None):
    """A run's life on one rank; `signalled` (rank, step) gets SIGUSR1 in the middle of that step, twice.

    job_s: the Slurm job's end after the model is loaded. (How it ended, this rank's weights, seconds left to the job).
    """
    stop_signal = StopSignal()
    stop_signal.hold()
    config = SCRIPT.read_config(command)[1]
    grid = join(config)
    trainer = build_trainer(config, None, grid, make_stopping(config, grid.rank, stop_signal))
    trainer.resume()
    if job_s:
        os.environ["SLURM_JOB_END_TIME"] = str(int(time.time() + job_s))
        trainer.course.stopping = make_stopping(config, grid.rank, stop_signal)
    train = trainer.train

    def disturbed(*args):
        if signalled == (grid.rank, trainer.step + 1):
            os.kill(os.getpid(), signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGUSR1)
        return train(*args)

    trainer.train = disturbed
    begun = time.monotonic()
    outcome = trainer.fit()
    if outcome.state == "stopped":
        assert 0 < trainer.course.checkpoints.longest_save_s < time.monotonic() - begun
    left = (trainer.course.stopping.end or 0.0) - time.time()
    trainer.close()
    return outcome, [parameter.detach().numpy().copy() for parameter in trainer.actor.module.parameters()], left


def lives(world, data, folder, *, tensor=1, signalled=None, job_s=None, **settings):
    settings = {"trainer.grpo.max_steps": STEPS, **settings}
    return run_ranks(life, world, arguments(world, data, folder, tensor, **settings), signalled, job_s, timeout_s=300)


def checkpoints(folder: pathlib.Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").glob("*"))


def what_was_computed(folder: pathlib.Path) -> list[dict]:
    return [{k: v for k, v in row.items() if not k.startswith(("timing_s/", "perf/"))} for row in rows(folder)]


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """TP=2 x DP=2, never disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, lives(4, data, folder, tensor=2)


@pytest.mark.parametrize("in_background", [False, True])
def test_a_signal_to_one_rank_stops_all_after_the_step_and_costs_nothing(data, whole, tmp_path, in_background):
    expected, undisturbed = whole
    settings = {"exp_manager.checkpoint_callback_params.async_save": str(in_background).lower()}
    stopped = lives(4, data, tmp_path, tensor=2, signalled=(2, 2), **settings)
    assert {(o.state, o.step, o.max_steps, o.reason) for o, *_ in stopped} == {
        ("stopped", 2, STEPS, "SIGUSR1 was received")
    }
    assert checkpoints(tmp_path) == ["step_2"] and [row["step"] for row in rows(tmp_path)] == [1, 2]
    [event] = [row for row in rows(tmp_path, "events.jsonl") if "SIGUSR1" in row["message"]]
    assert event["step"] == 2 and "stops after step 2 of 3, to go on from step 2" in event["message"]
    resumed = lives(4, data, tmp_path, tensor=2, **settings)
    assert {(o.state, o.step, o.reason) for o, *_ in resumed} == {("finished", STEPS, "")}
    assert what_was_computed(tmp_path) == what_was_computed(expected)
    assert draws(tmp_path) == draws(expected) and len(draws(expected)) == STEPS
    for (_, ours, _), (_, theirs, _) in zip(resumed, undisturbed, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_generation_ahead_stops_and_loses_nothing(data, tmp_path):
    settings = {
        "trainer.grpo.max_staleness": 1,
        "model.grpo.importance_sampling_cap": 2.0,
        "trainer.grpo.save_interval": 2,
        "trainer.grpo.curriculum.sources": "{name: uniform}",
    }
    lives(4, data, tmp_path / "whole", tensor=2, **settings)
    stopped = lives(4, data, tmp_path / "parts", tensor=2, signalled=(3, 2), **settings)
    assert {(o.state, o.step) for o, *_ in stopped} == {("stopped", 2)}
    assert checkpoints(tmp_path / "parts") == ["step_2"]  # due anyway, and not written twice
    lives(4, data, tmp_path / "parts", tensor=2, **settings)
    assert draws(tmp_path / "parts") == draws(tmp_path / "whole")
    told = [e["outcomes"] for e in rows(tmp_path / "parts", "curriculum.jsonl") if e["event"] == "observe"]
    drawn = [d["prompt_ids"] for d in draws(tmp_path / "parts")]
    assert [outcomes_from_json(o).prompt_ids[::4].tolist() for o in told] == drawn  # every group of 4, once
    assert verify(read_log(tmp_path / "parts" / "curriculum.jsonl")) == STEPS


def test_a_run_ends_with_the_step_that_spends_its_tokens(data, tmp_path):
    """What it has spent is in the checkpoint: with a larger budget the run goes on, and ends by the sum."""
    settings = {
        "trainer.grpo.val_check_interval": 50,
        "trainer.grpo.save_interval": 50,
        "trainer.grpo.max_steps": 50,
        "model.data.validation_files": f"[{data / 'test.parquet'}]",
    }
    budget = "trainer.grpo.max_generated_tokens"
    first = lives(2, data, tmp_path, **settings, **{budget: 1})
    assert {(o.state, o.step, o.reason) for o, *_ in first} == {("finished", 1, f"{budget}=1 reached")}
    [spent] = [row["perf/generated_tokens"] for row in rows(tmp_path) if "perf/generated_tokens" in row]
    again = lives(2, data, tmp_path, **settings, **{budget: int(spent) + 1})
    assert {(o.state, o.step) for o, *_ in again} == {("finished", 2)}
    assert checkpoints(tmp_path) == ["step_1", "step_2"]
    assert [row["step"] for row in rows(tmp_path) if "val/kk_logic_2/accuracy" in row] == [0, 1, 2]


def slow(text: str, ground_truth: str) -> Score:
    time.sleep(0.1)
    return Score(float(len(text) % 2), False, True, "", {})


def test_a_run_stops_before_its_job_ends(data, tmp_path):
    """Steps of 16 completions / 2 processes x 0.1 s, and more; 10 of the job's 30 s are for the checkpoint."""
    settings = {
        "trainer.grpo.max_steps": 500,
        "exp_manager.time_reserve_s": 10,
        "trainer.grpo.save_interval": 50,
        "model.data.rewards": "{kk_logic_*: tests.distributed.test_stopping:slow}",
        "model.grpo.length_params.max_length": 8,
    }
    ended = lives(2, data, tmp_path, job_s=30, **settings)
    outcome, longest = ended[0][0], max(row["timing_s/step"] for row in rows(tmp_path))
    assert {(o.state, o.step) for o, *_ in ended} == {("stopped", outcome.step)}
    assert "no time is left for another step and a checkpoint before 20" in outcome.reason
    assert outcome.step >= 2 and checkpoints(tmp_path) == [f"step_{outcome.step}"]
    for _, _, left in ended:  # neither late nor much too early
        assert 0 < left <= 10 + 2 * longest


def script(folder, data, *more: str) -> list[str]:
    settings = {"trainer.grpo.max_steps": 300, "model.data.reward_workers.workers": 2}
    command = [*arguments(2, data, folder, 2, **settings), *more]
    return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "examples/train_gpt_grpo.py", *command]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}


def test_the_script_is_signalled_as_slurm_does_it(data, tmp_path):
    """torchrun under `trap '' USR1`; the signal goes to every process below, reward processes included."""
    outcome = tmp_path / "job" / "outcome.json"
    command = script(tmp_path / "run", data, f"exp_manager.outcome_file={outcome}")
    (tmp_path / "log").touch()
    with (tmp_path / "log").open("w") as log:
        run = subprocess.Popen(
            ["bash", "-c", "trap '' USR1; exec \"$@\"", "-", *command],
            cwd=REPO,
            env=environment(),
            stdout=log,
            stderr=log,
        )
    try:
        metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 240
        while not (metrics.exists() and metrics.stat().st_size):
            assert run.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.05)
        below = psutil.Process(run.pid).children(recursive=True)
        assert len(below) == 2 + 2  # ranks, and the reward processes of the one replica
        for process in [psutil.Process(run.pid), *below]:
            process.send_signal(signal.SIGUSR1)
        assert run.wait(240) == 0, (tmp_path / "log").read_text()
    finally:
        if run.poll() is None:
            for process in [*psutil.Process(run.pid).children(recursive=True), run]:  # ranks lead sessions of their own
                process.kill()
    told = json.loads(outcome.read_text())
    steps = len(rows(tmp_path / "run"))
    assert told == {"state": "stopped", "step": steps, "max_steps": 300, "reason": "SIGUSR1 was received"}
    assert checkpoints(tmp_path / "run") == [f"step_{steps}"] and (tmp_path / "run" / "report.html").exists()
    words = (tmp_path / "log").read_text()
    assert words.count("SIGUSR1 was received; the run stops after step") == 1

    (tmp_path / "run" / "STOP").touch()
    ended = subprocess.run(command, cwd=REPO, env=environment(), capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(outcome.read_text())["state"] == "ended" and json.loads(outcome.read_text())["step"] == steps
    assert ended.stdout.count(f"not started, {steps} of 300 steps are done: the file STOP is in") == 1
    assert "memory" not in ended.stdout  # the model's, told when it is loaded
    assert (tmp_path / "run" / "STOP").exists() and len(rows(tmp_path / "run")) == steps

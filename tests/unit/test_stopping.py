"""When a run stops, what it saves before, what it says; and that nothing it has started dies of the signal."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import time

import pytest
from omegaconf import OmegaConf

from megatron_dump import config as schema
from megatron_dump.stopping import SAVE, STOP, Outcome, Stopping, run_end
from tests.unit.guessing import Store, read, trainer

REPO = pathlib.Path(__file__).resolve().parents[2]


def python(program: str, before: str = "") -> str:
    """What a process prints, started by a shell that ran `before`."""
    command = ["bash", "-c", f'{before}\nexec "$@"', "-", sys.executable, "-c", program]
    environment = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


HELD = """
import os, signal, subprocess, sys, threading, time
from megatron_dump.stopping import StopSignal
{before}
stop = StopSignal()
stop.hold()
assert not stop.received
"""
TWICE = """
os.kill(os.getpid(), signal.SIGUSR1)
os.kill(os.getpid(), signal.SIGUSR1)
time.sleep(0.1)
print(stop.received)
"""


@pytest.mark.parametrize(
    ("shell", "before"),
    [
        ("", ""),
        ("trap '' USR1", "assert signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN"),
        ("", "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})"),
        ("", "threading.Thread(target=time.sleep, args=(2,), daemon=True).start()"),  # it will take the signal
    ],
)
def test_the_signal_is_received_whatever_was_inherited(shell, before):
    assert python(HELD.format(before=before) + TWICE, shell) == "True\n"


def test_a_launcher_that_blocks_the_signal_loses_none():
    early = "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1}); os.kill(os.getpid(), signal.SIGUSR1)"
    program = HELD.format(before=early).replace("assert not stop.received", "print(stop.received)")
    assert python(program) == "True\n"


def test_a_call_in_progress_is_not_interrupted_and_other_signals_kill():
    program = HELD.format(before="") + (
        "threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGUSR1)).start()\n"
        "begun = time.monotonic(); time.sleep(0.3); print(stop.received, time.monotonic() - begun >= 0.3)\n"
        "child = subprocess.Popen(['sleep', '60']); child.send_signal(signal.SIGUSR1); time.sleep(0.1)\n"
        "print(child.poll()); child.terminate(); print(child.wait())\n"
    )
    assert python(program) == "True True\nNone\n-15\n"


SIGNALLED = """
import os, pathlib, signal, sys, time
import numpy as np, psutil
from megatron_dump.rewards.workers import Job, RewardPool
from megatron_dump.rollout.engine import EngineRequest
from megatron_dump.rollout.engine_process import EngineProcess
from megatron_dump.stopping import StopSignal

stop = StopSignal()
if {held}:
    stop.hold()
else:
    signal.signal(signal.SIGUSR1, lambda *_: None)
pool = RewardPool({{"*": "tests.unit.faulty_rewards:obey"}}, ["s"], workers=2, timeout_s=20)
engine = EngineProcess("tests.unit.scripted_engine:ScriptedEngine", {{}}, pathlib.Path({log!r}))
generate = lambda: engine.generate([EngineRequest(np.array([1, 3, 4]), (1, 2))]).result()
generate()
children = psutil.Process().children(recursive=True)
for process in [psutil.Process(), *children]:
    process.send_signal(signal.SIGUSR1)
time.sleep(0.5)
print(len(children), sum(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children))
if {held}:
    generate()
    pool.score_all([Job("s", "1", "truth")] * 4)
    print(len(psutil.Process().children(recursive=True)), set(children) == set(psutil.Process().children(True)))
engine.close()
"""


def test_what_a_rank_has_started_survives(tmp_path):
    """Two reward processes and an engine, each sent the signal as Slurm does; without the mask they die."""
    assert python(SIGNALLED.format(held=True, log=str(tmp_path / "log"))) == "3 3\n3 True\n"
    assert python(SIGNALLED.format(held=False, log=str(tmp_path / "log"))) == "3 0\n"


def plain(folder, steps=6, **settings):
    store = settings.pop("store", None) or Store()
    run = trainer(folder, steps, store=store, settings=settings)
    return run, store


def during(run, step: int, action) -> None:
    """Do it in the middle of that step (from 1)."""
    train = run.train

    def disturbed(*args):
        if run.step + 1 == step:
            action()
        return train(*args)

    run.train = disturbed


def test_save_saves_once_and_goes_on(tmp_path):
    run, store = plain(tmp_path)
    run.course.stopping.folder = tmp_path
    during(run, 2, (tmp_path / SAVE).touch)
    outcome = run.fit()
    assert list(store.saved) == [2] and not (tmp_path / SAVE).exists()
    assert outcome == Outcome("finished", 6, 6)


def test_save_of_a_step_that_is_saved_anyway_is_done(tmp_path, monkeypatch):
    run, store = plain(tmp_path, save_interval=3)
    run.course.stopping.folder = tmp_path
    calls, save = [], store.save
    monkeypatch.setattr(store, "save", lambda step, state: (calls.append(step), save(step, state)))
    during(run, 3, (tmp_path / SAVE).touch)
    run.fit()
    assert calls == [3, 6] and not (tmp_path / SAVE).exists()


def test_save_before_the_first_step_waits_for_it(tmp_path):
    run, store = plain(tmp_path)
    run.course.stopping.folder = tmp_path
    (tmp_path / SAVE).touch()
    run.fit()
    assert list(store.saved) == [1] and not (tmp_path / SAVE).exists()


def test_stop_saves_and_ends_and_stays(tmp_path):
    run, store = plain(tmp_path)
    run.course.stopping.folder = tmp_path
    during(run, 4, (tmp_path / STOP).touch)
    outcome = run.fit()
    assert (outcome.state, outcome.step, outcome.max_steps) == ("ended", 4, 6) and "STOP" in outcome.reason
    assert list(store.saved) == [4] and (tmp_path / STOP).exists()
    [event] = [e for e in read(tmp_path, "events.jsonl") if "STOP" in e["message"]]
    assert event["step"] == 4 and "stops after step 4 of 6, to go on from step 4" in event["message"]


def test_only_the_rank_with_the_folder_looks(tmp_path):
    run, store = plain(tmp_path)
    (tmp_path / STOP).touch()
    assert run.fit() == Outcome("finished", 6, 6) and not store.saved


def test_a_run_that_is_finished_trains_nothing(tmp_path):
    store = Store()
    plain(tmp_path, 3, save_interval=3, store=store)[0].fit()
    again, _ = plain(tmp_path, 3, save_interval=3, store=store)
    during(again, 4, lambda: pytest.fail("it trains"))
    assert again.fit() == Outcome("finished", 3, 3)
    assert [row["step"] for row in read(tmp_path) if "train/accuracy" in row] == [1, 2, 3]


@pytest.mark.parametrize(
    ("left", "step_s", "save_s", "reserve_s", "time_is_up", "is_late"),
    [
        (100.5, 40, 10, 60, False, False),
        (99.5, 40, 10, 60, True, False),  # 40 + 60
        (120.5, 40, 40, 60, False, False),
        (119.5, 40, 40, 60, True, False),  # 40 + 2 x 40
        (39.5, 0, 40, 0, True, True),
        (40.5, 0, 40, 0, True, False),
        (-1, 0, 0, 0, True, True),
        (10, 0, 0, 0, False, False),  # nothing is known yet
    ],
)
def test_time(left, step_s, save_s, reserve_s, time_is_up, is_late):
    stopping = Stopping(None, None, time.time() + left, reserve_s, longest_step_s=step_s)
    asked = stopping.look(save_s)
    assert (asked.time, asked.late) == (time_is_up, is_late)
    assert not Stopping(longest_step_s=step_s).look(save_s).ends  # no end, no hurry


def test_a_save_that_cannot_end_in_time_is_not_begun(tmp_path):
    run, store = plain(tmp_path, save_interval=2)
    store.longest_save_s = 1000.0
    during(run, 4, lambda: setattr(run.course.stopping, "end", time.time() + 500))
    outcome = run.fit()
    assert list(store.saved) == [2] and (outcome.state, outcome.step) == ("stopped", 4)
    said = [e["message"] for e in read(tmp_path, "events.jsonl") if e["step"] == 4]
    assert any("no time is left for a checkpoint of step 4; the last one is of step 2" in line for line in said)
    assert any("stops after step 4 of 6, to go on from step 2" in line for line in said)


def test_a_last_step_without_its_checkpoint_is_not_finished(tmp_path):
    run, store = plain(tmp_path, save_interval=2)
    store.longest_save_s = 1000.0
    during(run, 6, lambda: setattr(run.course.stopping, "end", time.time() + 500))
    outcome = run.fit()
    assert list(store.saved) == [2, 4] and (outcome.state, outcome.step) == ("stopped", 6)


def test_the_longest_step_counts_its_validation(tmp_path, monkeypatch):
    run, _ = plain(tmp_path, 2, val_check_interval=1)
    validate = run.validate
    monkeypatch.setattr(run, "validate", lambda: (time.sleep(0.3), validate()))
    run.fit()
    assert 0.3 < run.course.stopping.longest_step_s < 30


def test_the_end_is_the_jobs_or_the_keys():
    assert run_end(100.0, None, {}) is None
    assert run_end(100.0, 50.0, {}) == 150.0
    assert run_end(100.0, None, {"SLURM_JOB_END_TIME": "120"}) == 120.0
    assert run_end(100.0, 50.0, {"SLURM_JOB_END_TIME": "120"}) == 120.0
    assert run_end(100.0, 10.0, {"SLURM_JOB_END_TIME": "120"}) == 110.0
    for wrong in ("soon", "0", "-5", "1.5"):
        with pytest.raises(ValueError, match=f"SLURM_JOB_END_TIME={wrong}: expected seconds since the epoch"):
            run_end(100.0, None, {"SLURM_JOB_END_TIME": wrong})


def config(**manager):
    base = {
        "pretrained_checkpoint": {"restore_from_path": "m"},
        "model": {"data": {"train_files": ["x"]}},
        "exp_manager": {"explicit_log_dir": "d", **manager},
    }
    return schema.load(OmegaConf.create(base))


def test_durations_are_nemos():
    assert schema.seconds_of("k", config(max_time_per_run="01:02:03:04").exp_manager.max_time_per_run) == 93784.0
    for wrong in ("00:00:00:00", "1:30:00", "00:24:00:00", "00:00:60:00", "soon", 3600, "-1:00:00:00"):
        with pytest.raises(schema.ConfigError, match=f'max_time_per_run={wrong}: must be "DD:HH:MM:SS" above 0'):
            config(max_time_per_run=wrong)
    with pytest.raises(schema.ConfigError, match=r"exp_manager\.time_reserve_s=-1.*must not be negative"):
        config(time_reserve_s=-1)


def test_a_resumed_run_may_have_other_times_and_another_outcome_file():
    a = schema.lasting(config())
    assert a == schema.lasting(config(max_time_per_run="00:01:00:00", time_reserve_s=5, outcome_file="o"))


def test_the_outcome_is_one_line_and_replaces_atomically(tmp_path):
    path = tmp_path / "new" / "outcome.json"
    Outcome("stopped", 3, 9, "a\nb").write(path)
    Outcome("finished", 9, 9).write(path)
    assert path.read_text().count("\n") == 1 and os.listdir(path.parent) == ["outcome.json"]
    assert json.loads(path.read_text()) == {"state": "finished", "step": 9, "max_steps": 9, "reason": ""}


def script(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, "examples/train_gpt_grpo.py", *arguments],
        cwd=REPO,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("trainer.grpo.max_stepz=3", "unknown key trainer.grpo.max_stepz"),
        ("--stepz=3", "unrecognized arguments: --stepz=3"),
        ("exp_manager.max_time_per_run=3h", "max_time_per_run=3h: must be"),
        ("model.data.train_files=[nowhere.parquet]", "no such file: nowhere.parquet"),
    ],
)
def test_what_is_refused_is_said_in_the_outcome(tmp_path, argument, says):
    outcome = tmp_path / "outcome.json"
    outcome.write_text("of an earlier run")
    run = script(
        "--config-name=kk_cpu",
        argument,
        "trainer.devices=1",
        f"exp_manager.outcome_file={outcome}",
        "model.tensor_model_parallel_size=1",
        "model.pipeline_model_parallel_size=1",
        f"exp_manager.explicit_log_dir={tmp_path / 'run'}",
    )
    assert run.returncode == 1 and says in run.stderr and "Traceback" not in run.stderr
    told = json.loads(outcome.read_text())
    assert told["state"] == "refused" and says in told["reason"] and f"error: {told['reason']}\n" in run.stderr

"""launch_slurm.sh on a real cluster of three nodes: what it does to a run of TP=2 × DP=2 on two of them."""

from __future__ import annotations

import json
import os
import re
import signal
import time

import pytest

from tests.slurm import pyxis_stub

pytestmark = pytest.mark.slurm

STEPS = 6


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def assert_same(run, plain) -> None:
    """The same metrics at every step, and the same draws, bit for bit."""
    (metrics, drawn), (expected_metrics, expected_draws) = run.results(), plain.results()
    assert [m["step"] for m in metrics] == list(range(1, STEPS + 1))
    assert drawn == expected_draws
    assert metrics == expected_metrics


def test_plain_run(plain):
    assert plain.cluster.state(plain.job) == "COMPLETED", plain.text[-5000:]
    assert plain.outcome()["state"] == "finished"
    assert plain.steps() == STEPS
    [attempt] = plain.attempts()
    logs = {path.name for path in attempt.glob("node*.log")}
    assert {f"{node}{suffix}" for node in plain.nodes() for suffix in (".log", ".preflight.log")} == logs
    assert "report:" in plain.text  # rank 0's output is in the job's
    assert (plain.log_dir / "report.html").exists()


def test_signal_saves_requeues_and_finishes(jobs, plain):
    run = jobs.submit()
    run.wait_step(3)  # where no checkpoint is due
    jobs.cluster.run("scancel", "--batch", "--signal=USR1", run.job)
    run.wait("COMPLETED")
    first, last = run.outcome(0), run.outcome(1)
    assert (first["state"], last["state"]) == ("stopped", "finished")
    assert 3 <= first["step"] < STEPS
    assert f"resumes from step {first['step']}" in run.text  # it was saved there and then
    assert jobs.cluster.job(run.job)["Restarts"] == "1"
    assert_same(run, plain)


def test_time_limit_and_stop_file(jobs):
    """The limit is the job's own, two minutes, and no signal tells of it. The run goes on until somebody says STOP."""
    endless = {"trainer.grpo.max_steps": 1000, "trainer.grpo.save_interval": 0}
    run = jobs.submit("--time=2", "--signal=B:CONT@1", **endless)
    run.wait_attempt(2)
    assert run.outcome(0)["state"] == "stopped"
    assert "time" in run.outcome(0)["reason"]
    (run.log_dir / "STOP").touch()
    run.wait("COMPLETED")
    assert run.outcome()["state"] == "ended"
    assert run.outcome()["step"] >= run.outcome(0)["step"]


def test_nodes_die(jobs, plain):
    """First one that is not the batch script's, then the one that is: the run goes on with what remains."""
    run = jobs.submit()
    run.wait_step(3)
    batch, other = run.nodes()
    jobs.cluster.kill_node(other)
    run.wait_attempt(2)
    assert other not in run.nodes()
    run.wait_step(5)
    [batch, third] = run.nodes()
    jobs.cluster.kill_node(batch)
    jobs.cluster.wait(lambda: jobs.cluster.state(run.job) == "PENDING", 60, lambda: run.text[-3000:])
    jobs.cluster.run("scontrol", "update", f"jobid={run.job}", "NumTasks=1", "NumNodes=1")  # or --nodes=1-2
    run.wait("COMPLETED")
    assert run.nodes() == [third]
    assert run.outcome() == {"state": "finished", "step": STEPS, "max_steps": STEPS, "reason": ""}
    assert "resumes from step 2" in run.text and "resumes from step 4" in run.text
    (metrics, drawn), (expected_metrics, expected_draws) = run.results(), plain.results()
    assert metrics[:4] == expected_metrics[:4]  # then one rank trains what two shared: sums round otherwise
    assert drawn[:5] == expected_draws[:5]
    assert [m["step"] for m in metrics] == list(range(1, STEPS + 1))


def test_rank_crash_is_retried_in_place(jobs, plain):
    run = jobs.submit()
    run.wait_step(3)
    kill(run.ranks(run.nodes()[1])[1])
    run.wait("COMPLETED")
    assert len(run.attempts()) == 2
    assert jobs.cluster.job(run.job)["Restarts"] == "0"
    assert "resumes from step 2" in run.text
    assert re.search(r"first failure: host \S+, rank 3\b.*\nkilled by SIGKILL", run.text)
    assert_same(run, plain)


def test_a_crash_that_stays_is_given_up_with_its_traceback(jobs):
    """Of the rank that was the first to fail, not of those that lost it."""
    crash = {"model.data.rewards": "{kk_logic_*: 'tests.slurm.crash:reward'}"}
    run = jobs.submit(env={"MAX_FAILURES": "2"}, **crash)
    run.wait("FAILED")
    assert len(run.attempts()) == 2
    assert "2 failures in a row" in run.text
    assert re.search(r"rank 2\b", run.text)
    assert "in _fail" in run.text and "deliberate crash" in run.text  # the traceback
    assert jobs.cluster.job(run.job)["Restarts"] == "0"


def test_a_node_that_fails_twice_is_excluded(jobs, plain):
    run = jobs.submit(env={"MAX_FAILURES": "5"})
    bad = None
    for attempt in (1, 2):
        run.wait_attempt(attempt)
        bad = bad or run.nodes()[1]
        kill(jobs.cluster.wait(lambda: run.ranks(bad), 120, lambda: run.text[-3000:])[0])  # noqa: B023
    run.wait("COMPLETED")
    assert bad not in run.nodes()
    assert jobs.cluster.job(run.job)["ExcNodeList"] == bad
    assert_same(run, plain)


def test_scancel_stops_at_once(jobs):
    run = jobs.submit()
    run.wait_step(1)
    nodes, begin = run.nodes(), time.monotonic()
    jobs.cluster.run("scancel", run.job)
    run.wait("CANCELLED", timeout_s=20)
    jobs.cluster.wait(lambda: not any(run.ranks(node) for node in nodes), 20, lambda: "ranks run on")
    assert time.monotonic() - begin < 15
    assert run.outcome() is None


def test_wrong_layout_is_refused_before_the_start(jobs):
    begin = time.monotonic()
    run = jobs.submit(**{"model.tensor_model_parallel_size": 3})
    run.wait("FAILED", timeout_s=60)
    assert time.monotonic() - begin < 30
    assert "model.tensor_model_parallel_size=3" in run.text
    assert len(run.attempts()) == 1
    assert not run.log_dir.exists()


def test_an_array_in_containers(jobs, tmp_path):
    """Jobs of an array follow each other; a later one finds the run finished. pyxis's options reach srun."""
    log = tmp_path / "pyxis.log"
    env = {"CONTAINER_IMAGE": "registry#team/image:1", "CONTAINER_MOUNTS": "/data:/data", pyxis_stub.LOG: str(log)}
    run = jobs.submit("--array=1-2%1", env=env, **{"trainer.grpo.max_steps": 1})
    tasks = jobs.cluster.wait(lambda: _ended_tasks(run, 2), 180, lambda: run.text[-3000:])
    outcomes = [(folder / "outcome.json").read_text() for folder in tmp_path.glob("slurm-*/attempt_0")]
    assert len(outcomes) == 2 and len(set(outcomes)) == 1
    assert json.loads(outcomes[0])["state"] == "finished"
    assert run.text.count("step 1/1") == 1
    [repository] = set(re.findall(r"container-workdir=(\S+)", log.read_text()))
    assert set(log.read_text().splitlines()) == {
        "container-image=registry#team/image:1",
        f"container-workdir={repository}",
        *(
            f"container-mounts={repository}:{repository},{folder}:{folder},/data:/data"
            for folder in (tmp_path / f"slurm-megatron-dump-{task}" for task in tasks)
        ),
    }


def _ended_tasks(run, n: int) -> list[str]:
    """Job ids of the array's jobs once so many are complete."""
    shown = run.cluster.run("scontrol", "show", "job", run.job).stdout
    assert "FAILED" not in shown, run.text[-3000:]
    return re.findall(r"JobId=(\d+)", shown) if shown.count("JobState=COMPLETED") == n else []


@pytest.mark.parametrize("form", ["one allocation", "two components"])
def test_generator_nodes(jobs, form):
    """One node trains, another generates with vLLM under Ray: as nodes of one job, or as a heterogeneous job."""
    python = os.environ.get("RAY_PYTHON")
    if not python:
        pytest.skip("RAY_PYTHON names no interpreter with vLLM and Ray; make test-slurm does")
    backend = "trainer.grpo.inference_backend"
    settings = {
        f"{backend}.type": "vllm",
        f"{backend}.engines": 1,
        f"{backend}.vllm.max_model_len": 256,
        f"{backend}.ray.start_timeout_s": 240,
        "trainer.grpo.max_steps": 2,
        "trainer.collective_timeout_s": 480,
    }
    env = {"PYTHON": python}
    if form == "one allocation":
        run = jobs.submit(env={**env, "GENERATOR_NODES": "1"}, **settings)
    else:
        run = jobs.submit(second="--nodes=1", nodes="1", env=env, **settings)
    run.wait("COMPLETED", timeout_s=400)
    assert run.outcome()["state"] == "finished"
    assert "Ray: node1, node2" in (run.attempts()[0] / "node1.ray.log").read_text()
    assert run.steps() == 2

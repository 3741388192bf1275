"""launch_slurm.sh with fake Slurm commands: what it asks of srun, and what it never prints. tests/slurm has a real Slurm."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "launch_slurm.sh"

FAKES = {
    # srun writes its own options, then runs the step's command as the second node would
    "srun": """#!/usr/bin/env bash
while [[ $1 == --* ]]; do echo "SRUN $1"; shift; done
[[ -z ${FAKE_SRUN:-} ]] || { echo "srun: error: $FAKE_SRUN" >&2; exit 1; }
SLURM_PROCID=1 exec "$@"
""",
    "scontrol": """#!/usr/bin/env bash
case "$1 $2" in
  "show hostnames") printf '%s\\n' ${FAKE_NODES:-node7 node8} ;;
  "show job") printf 'JobId=%s JobName=x\\n   EndTime=%s\\n   Command=%s\\n   WorkDir=/elsewhere\\n' "$3" "${FAKE_END:-Unknown}" "$FAKE_COMMAND" ;;
  "requeue "*) echo "REQUEUED $2" ;;
  "update "*) echo "UPDATED $*" ;;
esac
""",
    "sinfo": """#!/usr/bin/env bash
[[ $* == *%t* ]] || printf '%s\\n' $FAKE_PARTITION
""",
    "getent": """#!/usr/bin/env bash
[[ "$* ${FAKE_DNS:-up}" == "ahostsv4 node7 up" ]] && printf '10.0.0.7 STREAM node7\\n10.0.0.7 DGRAM\\n'
""",
    # the pre-flight finds nothing; a run that is to fail does so by a rank of FAKE_CULPRIT; else it finishes
    "fakepython": f"""#!{sys.executable}
import json, os, signal, sys, time
tool, *argv = sys.argv[1:]
if tool == "tools/slurm/first_failure.py":
    open(argv[0] + "/failed_node", "w").write(os.environ["FAKE_CULPRIT"] + "\\n")
if tool == "tools/slurm/run_node.py":
    attempt = os.path.dirname(argv[3])
    os.makedirs(argv[3])
    if "FAKE_SECONDS" in os.environ:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        print("BEGUN", flush=True)
        time.sleep(float(os.environ["FAKE_SECONDS"]))
    if int(attempt.rpartition("_")[2]) < int(os.environ.get("FAKE_FAILURES", "0")):
        sys.exit(1)
    key = os.environ.get("WANDB_API_KEY") == "s3cr3t"
    print("PYTHON", json.dumps({{"argv": argv, "cwd": os.getcwd(), "key": key}}), flush=True)
    outcome = argv[-1].partition("exp_manager.outcome_file=")[2]
    open(outcome, "w").write(json.dumps({{"state": "finished", "step": 1}}))
""",
}
JOB = {
    "SLURM_JOB_ID": "123456",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_JOB_NODELIST": "node[7-8]",
    "SLURM_GPUS_ON_NODE": "4",
    "SLURM_JOB_NAME": "x",
    "SLURM_JOB_PARTITION": "main",
}


@pytest.fixture
def launch(tmp_path):
    """Run the script as Slurm does: a copy in a spool folder, from another folder, with fakes first in PATH."""
    binaries, repo, spool = tmp_path / "bin", tmp_path / "my repo", tmp_path / "spool"
    for folder in (binaries, repo / "examples", spool):
        folder.mkdir(parents=True)
    for name, text in FAKES.items():
        (binaries / name).write_text(text)
        (binaries / name).chmod(0o755)
    (repo / "examples" / "train_gpt_grpo.py").touch()
    shutil.copy(SCRIPT, repo)
    shutil.copy(SCRIPT, spool / "slurm_script")

    def start(*args: str, trace: bool = False, **env: str) -> subprocess.Popen[str]:
        base = {"PATH": f"{binaries}:{os.environ['PATH']}", "PYTHON": "fakepython", **JOB}
        base["SLURM_SUBMIT_DIR"] = str(tmp_path)
        base["FAKE_COMMAND"] = " ".join([str(repo / "launch_slurm.sh"), *args])
        command = ["bash", *(["-x"] if trace else []), str(spool / "slurm_script"), *args]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=tmp_path, env=base | env, **pipes)

    def run(*args: str, trace: bool = False, **env: str) -> subprocess.CompletedProcess[str]:
        process = start(*args, trace=trace, **env)
        out, err = process.communicate(timeout=20)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    run.repo, run.start = repo, start
    return run


def srun_options(result: subprocess.CompletedProcess[str]) -> list[str]:
    return [line.removeprefix("SRUN ") for line in result.stdout.splitlines() if line.startswith("SRUN ")]


def python_call(result: subprocess.CompletedProcess[str]) -> dict:
    assert result.returncode == 0, result.stderr
    return json.loads(next(line for line in result.stdout.splitlines() if line.startswith("PYTHON "))[7:])


def test_syntax():
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    assert os.access(SCRIPT, os.X_OK)


def test_one_task_a_node_twice(launch, tmp_path):
    """First the pre-flight, then torchrun."""
    result = launch("--config-name=kk", "model.optim.lr=1e-6", "exp_manager.name='a b'")
    attempt = tmp_path / "slurm-x-123456" / "attempt_0"
    common = [
        "--overlap",
        "--nodes=2",
        "--nodelist=node7,node8",
        "--ntasks=2",
        "--ntasks-per-node=1",
        "--cpu-bind=none",
        "--kill-on-bad-exit=1",
        "--wait=60",
        "--export=ALL",
    ]
    options = srun_options(result)
    middle = options.index("--overlap", 1)
    assert options[:middle] == [
        *common,
        f"--output={attempt}/%N.preflight.log",
        "--open-mode=append",
        "--kill-on-bad-exit=0",
    ]
    assert options[middle:] == [*common, f"--output={attempt}/%N.log", "--open-mode=append"]
    call = python_call(result)
    assert call["cwd"] == str(launch.repo)
    assert call["argv"] == [
        "--head",
        "10.0.0.7:23824",
        "--ranks",
        f"{attempt}/ranks",
        "--nnodes=2",
        "--nproc-per-node=4",
        "--max-restarts=0",
        "--rdzv-id=123456",
        "examples/train_gpt_grpo.py",
        "--config-name=kk",
        "model.optim.lr=1e-6",
        "exp_manager.name='a b'",
        "trainer.num_nodes=2",
        "trainer.devices=4",
        f"exp_manager.outcome_file={attempt}/outcome.json",
    ]


def test_processes_a_node_without_gpus(launch):
    assert "--nproc-per-node=3" in python_call(launch(SLURM_GPUS_ON_NODE="", NPROC_PER_NODE="3"))["argv"]
    result = launch(SLURM_GPUS_ON_NODE="")
    assert result.returncode != 0
    assert "NPROC_PER_NODE" in result.stderr


def test_container_and_site_file(launch, tmp_path):
    image = "registry#team/megatron:1"
    (launch.repo / "launch_slurm.env").write_text(f'CONTAINER_IMAGE="{image}"\n: "${{NPROC_PER_NODE:=8}}"\n')
    result = launch(CONTAINER_MOUNTS="/data:/data", NPROC_PER_NODE="2")
    folder = tmp_path / "slurm-x-123456"
    assert [option for option in srun_options(result) if option.startswith("--container-")] == 2 * [
        f"--container-image={image}",
        f"--container-mounts={launch.repo}:{launch.repo},{folder}:{folder},/data:/data",
        f"--container-workdir={launch.repo}",
    ]
    assert "trainer.devices=2" in python_call(result)["argv"]  # the environment wins over a := line


@pytest.mark.parametrize("trace", [False, True])
def test_secrets_reach_the_processes_and_no_output(launch, tmp_path, trace):
    (tmp_path / "secrets").write_text("WANDB_API_KEY=s3cr3t\necho s3cr3t\n")
    result = launch(SECRETS_FILE="secrets", trace=trace)
    assert python_call(result)["key"]
    assert "s3cr3t" not in result.stdout + result.stderr


@pytest.mark.parametrize("text", ["WANDB_API_KEY= s3cr3t\nA=b\n", "A=x$s3cr3t\n", "A='s3cr3t\n"])
def test_a_malformed_secrets_file_is_an_error_that_does_not_quote_it(launch, tmp_path, text):
    (tmp_path / "secrets").write_text(text)
    result = launch(SECRETS_FILE="secrets")
    assert result.returncode != 0
    assert "SECRETS_FILE" in result.stderr
    assert "s3cr3t" not in result.stdout + result.stderr


THREE = {"FAKE_NODES": "node7 node8 node9", "FAKE_PARTITION": "node7 node8 node9 node10", "RETRY_WAIT": "0"}


def node_lists(result: subprocess.CompletedProcess[str]) -> list[str]:
    """Of each training attempt."""
    found = [option for option in srun_options(result) if option.startswith(("--nodelist=", "--output="))]
    pairs = zip(found[::2], found[1::2], strict=True)
    return [nodes.partition("=")[2] for nodes, output in pairs if output.endswith("%N.log")]


def test_a_spare_node_takes_the_place_of_one_that_failed_twice(launch):
    result = launch(SPARE_NODES="1", FAKE_CULPRIT="node8", FAKE_FAILURES="2", **THREE)
    assert result.returncode == 0, result.stderr
    assert node_lists(result) == ["node7,node8", "node7,node8", "node7,node9"]
    assert "REQUEUED" not in result.stdout


def test_without_a_spare_node_the_job_is_requeued_elsewhere(launch):
    result = launch(FAKE_CULPRIT="node8", FAKE_FAILURES="9", **THREE)
    assert result.returncode == 0, result.stderr
    assert node_lists(result) == ["node7,node8,node9"] * 2
    assert "REQUEUED 123456" in result.stdout
    assert "UPDATED update jobid=123456 ExcNodeList=node8" in result.stdout


def test_where_there_are_no_other_nodes_a_bad_one_is_used_again_and_failures_are_counted(launch):
    few = {**THREE, "FAKE_PARTITION": "node7 node8 node9"}
    result = launch(FAKE_CULPRIT="node7", FAKE_FAILURES="9", MAX_FAILURES="4", **few)
    assert result.returncode == 1
    assert node_lists(result) == ["node7,node8,node9"] * 4
    assert "used again" in result.stdout
    assert "4 failures in a row" in result.stderr


def test_an_allocation_in_which_slurm_starts_nothing_is_given_back(launch):
    result = launch(FAKE_SRUN="Unable to create step for job 123456: Requested node configuration is not available")
    assert result.returncode == 0, result.stderr
    assert "REQUEUED 123456" in result.stdout
    assert "attempt 1" not in result.stdout


def test_a_run_that_does_not_stop_in_time_is_requeued_before_its_limit(launch):
    """At the limit Slurm would end the job for good."""
    end = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + 20))
    process = launch.start(FAKE_SECONDS="8", FAKE_END=end)
    lines = iter(process.stdout.readline, "")
    assert any(line == "BEGUN\n" for line in lines)
    process.send_signal(signal.SIGUSR1)
    begin = time.monotonic()
    assert any(line == "REQUEUED 123456\n" for line in lines)
    assert time.monotonic() - begin < 5
    process.wait(20)


def test_generator_nodes_do_not_train(launch):
    result = launch(GENERATOR_NODES="1", **THREE)
    assert node_lists(result) == ["node7,node8"]
    assert "trainer.num_nodes=2" in python_call(result)["argv"]
    assert "trainer.grpo.inference_backend.ray.address=10.0.0.7:23826" in python_call(result)["argv"]


def test_errors_name_the_remedy(launch):
    assert "sbatch" in launch(SLURM_JOB_ID="").stderr
    assert "REPO_DIR" in launch(REPO_DIR="/nowhere").stderr
    assert "node7 has no IPv4" in launch(FAKE_DNS="down").stderr

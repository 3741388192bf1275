"""tools/slurm/first_failure.py: the cause among what real torchruns leave of ranks that raise, exit or are killed."""

from __future__ import annotations

import datetime
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
TOOL = REPO / "tools" / "slurm" / "first_failure.py"
sys.path.append(str(TOOL.parent))

from rank_failures import causes  # noqa: E402
from rank_failures.records import Failure, read  # noqa: E402

LIGHT = """
import os, signal, sys, time
if os.environ["RANK"] == "1":
    if sys.argv[1] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    print("[rank 1] error: model.optim.lr=-1: must be above 0", file=sys.stderr, flush=True)
    sys.exit(1)
time.sleep(60)
"""
RANKS = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

from megatron_dump.distributed import fail_together

@record
def main():
    dist.init_process_group("gloo")
    rank, what = dist.get_rank(), sys.argv[1]
    print(f"rank {rank} has begun", flush=True)
    if what == "behalf":
        with fail_together("checkpoint of step 2"):
            if rank == 1:
                raise OSError(28, "No space left on device")
    if rank == 1 and what == "raise":
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
    dist.all_reduce(torch.ones(4))  # loses its peer

main()
"""
CASES = {  # nodes, processes on each, script
    "raise": (2, 1, RANKS),
    "kill": (1, 2, LIGHT),
    "behalf": (1, 2, RANKS),
    "exit": (1, 2, LIGHT),
}


def _torchrun(attempt: Path, script: Path, nodes: int, nproc: int, node: int, port: int) -> subprocess.Popen[bytes]:
    """As launch_slurm.sh starts it on a node."""
    env = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nnodes={nodes}",
        f"--nproc-per-node={nproc}",
        f"--node-rank={node}",
        "--max-restarts=0",
        "--rdzv-backend=static",
        f"--rdzv-endpoint=127.0.0.1:{port}",
        f"--log-dir={attempt}/ranks/host{node}",
        str(script),
        attempt.name,
    ]
    with (attempt / f"host{node}.log").open("w") as log:
        return subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def attempts(tmp_path_factory) -> Path:
    """A folder with an attempt of each case, all run at once."""
    folder = tmp_path_factory.mktemp("attempts")
    agents = []
    for name, (nodes, nproc, text) in CASES.items():
        attempt, port = folder / name, _free_port()
        attempt.mkdir()
        script = folder / f"{name}.py"
        script.write_text(text)
        for node in range(nodes):
            (attempt / "ranks" / f"host{node}").mkdir(parents=True)
            agents.append(_torchrun(attempt, script, nodes, nproc, node, port))
    try:
        assert all(agent.wait(150) for agent in agents)
    finally:
        for agent in agents:
            agent.kill()
    return folder


def tell(attempt: Path) -> tuple[str, str | None]:
    """(what the tool prints, the node it leaves)"""
    done = subprocess.run([sys.executable, str(TOOL), str(attempt)], capture_output=True, text=True, check=True)
    node = attempt / "failed_node"
    return done.stdout, node.read_text().strip() if node.exists() else None


def test_exception_before_the_peer_that_it_loses(attempts):
    shown, node = tell(attempts / "raise")
    assert node == "host1"
    assert re.match(r"first failure: host host1, rank 1, local rank 0, at 20\d\d-\d\d-\d\d \d\d:\d\d:\d\d\n", shown)
    assert "\nRuntimeError: CUDA out of memory. Tried to allocate 2.00 GiB\n(GPU out of memory)\nTraceback" in shown
    assert "  rank 1 has begun" in shown
    failures, logs = read(attempts / "raise")
    assert {f.host: causes.order(f, logs[f.host]) for f in failures} == {
        "host0": causes.LOST_PEER,
        "host1": causes.EXCEPTION,
    }


def test_kill_without_a_record(attempts):
    shown, node = tell(attempts / "kill")
    assert node == "host0"
    assert re.match(
        r"first failure: host host0, rank 1, local rank 1, at .*\nkilled by SIGKILL\n\(SIGKILL: often", shown
    )


def test_exit_with_an_error_line(attempts):
    shown, node = tell(attempts / "exit")
    assert node == "host0"
    assert re.match(
        r"first failure: host host0, rank 1, local rank 1, at .*\nexit code 1: model.optim.lr=-1: must be above 0\n",
        shown,
    )


def test_failure_that_all_ranks_report_is_laid_to_the_one(attempts):
    shown, node = tell(attempts / "behalf")
    assert node == "host0"
    assert "rank 1, local rank 1" in shown.splitlines()[0]
    assert "checkpoint of step 2: rank 1 failed: OSError: [Errno 28] No space left on device\n(disk full)\n" in shown
    assert "The above exception was the direct cause" in shown  # the blamed rank's own traceback


def test_torch_is_not_imported(attempts):
    command = [sys.executable, "-X", "importtime", str(TOOL), str(attempts / "kill")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "rank_failures.records" in done.stderr
    assert not re.search(r"\| +(torch|numpy)\b", done.stderr)


def test_nothing_recorded(tmp_path):
    (tmp_path / "host0.log").write_text("".join(f"line {i}\n" for i in range(30)))
    (tmp_path / "failed_node").write_text("host9\n")  # of an earlier call
    shown, node = tell(tmp_path)
    assert node is None
    assert shown.startswith("no rank's failure is recorded")
    assert "line 9\n" not in shown
    assert shown.endswith("  line 10\n" + "".join(f"  line {i}\n" for i in range(11, 30)))


def summary(*entries: tuple[int, int, int]) -> str:
    """torchrun's, of (rank, local rank, exit code); the last is the first observed. pid: 100 + rank."""
    now = datetime.datetime(2030, 1, 2, 3, 4, 5).isoformat(sep="_")
    texts = [
        f"[{i}]:\n  time      : {now}\n  host      : x\n  rank      : {rank} (local_rank: {local})\n"
        f"  exitcode  : {code} (pid: {100 + rank}) \n  error_file: <N/A>\n"
        for i, (rank, local, code) in enumerate(entries)
    ]
    return "Failures:\n" + "".join(texts[:-1]) + "Root Cause (first observed failure):\n" + texts[-1]


WATCHDOG = (
    "[rank{0}]:[E102 ProcessGroupNCCL.cpp:629] [Rank {0}] Watchdog caught collective operation timeout: SeqNum=7\n"
)


@pytest.mark.parametrize(
    ("logs", "node", "said"),
    [
        # the watchdog aborts ranks whose peer is gone: the segmentation fault is the cause, though seen later
        ({"a": WATCHDOG.format(0) + summary((0, 0, -6)), "b": summary((1, 0, -11))}, "b", "SIGSEGV"),
        # torchrun kills what does not end at SIGTERM
        (
            {
                "a": "Unable to shutdown process 100 via SIGTERM, forcefully exiting via SIGKILL\n"
                + summary((0, 0, -9)),
                "b": summary((1, 0, 3)),
            },
            "b",
            "exit code 3",
        ),
        (
            {"a": summary((0, 0, -9)) + "slurmstepd: error: Detected 1 oom_kill event in StepId=5.0.\n"},
            "a",
            "out of host memory: the kernel ended it",
        ),
        # all timed out: no node in particular
        (
            {"a": WATCHDOG.format(0) + summary((0, 0, -6)), "b": WATCHDOG.format(1) + summary((1, 0, -6))},
            None,
            "cannot be told",
        ),
        # one lost its peer, the other went down without a word
        ({"a": WATCHDOG.format(0) + summary((0, 0, -6)), "b": "step 7/20\n"}, "b", "it may have gone down"),
        ({"a": WATCHDOG.format(0) + summary((0, 0, -6)), "b": "*** STEP 5.0 ON b CANCELLED ***\n"}, None, "cannot"),
    ],
)
def test_causes_and_consequences(tmp_path, logs, node, said):
    for host, text in logs.items():
        (tmp_path / "ranks" / host).mkdir(parents=True)
        (tmp_path / f"{host}.log").write_text(text)
    shown, found = tell(tmp_path)
    assert (found, said in shown) == (node, True), shown


def test_record_cut_short(tmp_path):
    record = tmp_path / "ranks" / "a" / "none_x" / "attempt_0" / "1" / "error.json"
    record.parent.mkdir(parents=True)
    record.write_text('{"message": {"mess')
    (tmp_path / "a.log").write_text(summary((1, 1, 1)))
    shown, node = tell(tmp_path)
    assert node == "a"
    assert f"{record} cannot be read" in shown


def test_order_of_kinds():
    failures = [
        Failure("a", 0, 0, 1.0, -15),
        Failure("b", 0, 1, 1.0, message="RuntimeError: Connection closed by peer", was_recorded=True),
        Failure("c", 0, 2, 2.0, 1),
        Failure("d", 0, 3, 3.0, message="ValueError: x", was_recorded=True),
        Failure("e", 0, 4, 4.0, -9),
    ]
    for n in range(len(failures), 0, -1):
        cause = causes.first(failures[:n], {})
        assert cause is not None
        assert cause.host == "abcde"[n - 1]

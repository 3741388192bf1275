"""tools/slurm/preflight.py: several "nodes" of this machine, a process each, by Slurm's names."""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.process
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

REPO = Path(__file__).resolve().parents[2]
TOOL = REPO / "tools" / "slurm" / "preflight.py"
MODEL = REPO / "examples/models/kk-tiny"
sys.path.append(str(TOOL.parent))

import preflight  # noqa: E402
from node_checks import look  # noqa: E402, F401 - torch once, for all forked nodes

import megatron_dump.actor.layout  # noqa: E402, F401 - likewise
from kk import dataset, generate  # noqa: E402

CONTEXT = multiprocessing.get_context("fork")
ENDS = 150.0  # seconds within which a node of a test must have ended


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("kk")
    generate.main(
        [
            "--people",
            "2",
            "--per-size",
            "20",
            "--test-per-size",
            "4",
            "--names",
            "8",
            "--frames",
            "1",
            "--out",
            str(out),
        ]
    )
    assert dataset.main(["--in", str(out), "--out", str(out)]) == 0
    return out / "train.parquet"


class Job:
    """Starts nodes, and ends those that are left."""

    def __init__(self, folder: Path, data: Path, nodes: int, **overrides: object) -> None:
        self.folder, self.nodes = folder, nodes
        self.results = folder / "preflight"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._head = f"127.0.0.1:{probe.getsockname()[1]}"
        self._keys = {
            "trainer.num_nodes": nodes,
            "trainer.devices": 2,
            "pretrained_checkpoint.restore_from_path": MODEL,
            "model.data.train_files": f"[{data}]",
            "model.data.validation_files": "[]",
            "model.pipeline_model_parallel_size": 1,
            "model.global_batch_size": 192,
            "trainer.grpo.num_prompts_per_grpo_step": 12,
            "exp_manager.explicit_log_dir": folder / "log",
            **overrides,
        }
        self.processes: dict[int, multiprocessing.process.BaseProcess] = {}

    def argv(self, node: int, folder: str | Path | None = None, timeout_s: float = 60) -> list[str]:
        return [
            f"--folder={folder or self.results}",
            f"--nodes={self.nodes}",
            "--nproc=2",
            f"--node-rank={node}",
            f"--head={self._head}",
            f"--timeout-s={timeout_s}",
            "--",
            "--config-name=kk_cpu",
            *(f"{key}={value}" for key, value in self._keys.items()),
        ]

    def start(self, node: int, cwd: Path = REPO, **options) -> None:
        process = CONTEXT.Process(target=self._run, args=(node, cwd, self.argv(node, **options)))
        process.start()
        self.processes[node] = process

    def _run(self, node: int, cwd: Path, argv: list[str]) -> None:
        os.environ["SLURMD_NODENAME"] = f"alpha{node}"
        os.chdir(cwd)
        sys.stdout = sys.stderr = self.output(node).open("w")
        code = preflight.main(argv)
        sys.stdout.flush()
        os._exit(code)

    def output(self, node: int) -> Path:
        return self.folder / f"node{node}.out"

    def said(self, node: int = 0) -> str:
        return self.output(node).read_text()

    def codes(self) -> dict[int, int | None]:
        for process in self.processes.values():
            process.join(ENDS)
        return {node: process.exitcode for node, process in self.processes.items()}

    def result(self, name: str) -> str | None:
        path = self.results / name
        return path.read_text() if path.exists() else None


@pytest.fixture
def make_job(tmp_path, data):
    jobs: list[Job] = []

    def make(nodes: int, **overrides: object) -> Job:
        jobs.append(Job(tmp_path, data, nodes, **overrides))
        return jobs[-1]

    yield make
    for job in jobs:
        for process in job.processes.values():
            process.kill()


def test_all_is_well(make_job):
    job = make_job(3)
    for name in ("step_3", "step_12", "step_20.partial"):
        (job.folder / "log" / "checkpoints" / name).mkdir(parents=True)
    for node in range(3):
        job.start(node)
    assert job.codes() == {0: 0, 1: 0, 2: 0}, job.said()
    assert "resumes from step 12" in job.said()
    assert [job.result(name) for name in ("resume_step", "bad_nodes", "refused")] == ["12\n", "", None]
    report = json.loads((job.results / "report.json").read_text())
    assert report["ok"]
    assert [n["host"] for n in report["nodes"]] == ["alpha0", "alpha1", "alpha2"]
    for node in report["nodes"]:
        assert node["found"]["gb_per_s"] > 0
        assert node["found"]["latency_us"] > 0
        assert node["memory"] > node["memory_needed"] > 2 * 2**30  # two ranks
        assert f"{node['host']}  as below" in job.said()
    assert sorted(p.name for p in job.results.iterdir()) == ["bad_nodes", "report.json", "resume_step"]
    assert [p.name for p in (job.folder / "log").iterdir()] == ["checkpoints"]  # nothing is left behind
    parameters = AutoModelForCausalLM.from_pretrained(MODEL).num_parameters()
    assert report["nodes"][0]["checkpoint"] == parameters * 16  # float32 weights and 12 bytes of optimizer state


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("model.tensor_model_parallel_size", 4, "divide the model's 2 key/value heads: lower it"),
        ("trainer.num_nodes", 3, "= 6 ranks, but 4 were started: make them agree"),
        ("model.data.train_files", "[/nowhere.parquet]", "model.data.train_files: no such file: /nowhere.parquet"),
        ("model.optim.lrr", 1, "unknown key model.optim.lrr; did you mean"),
        ("exp_manager.explicit_log_dir", "/dev/null/x", "cannot write to /dev/null/x (Not a directory)"),
    ],
)
def test_arguments_that_cannot_run(make_job, key, value, said):
    job = make_job(2, **{key: value})
    start = time.monotonic()
    job.start(1)
    job.start(0)
    assert job.codes() == {0: 1, 1: 1}
    assert time.monotonic() - start < 40  # not --timeout-s: nobody is waited for
    assert "pre-flight error: alpha0, alpha1: " in job.said()
    refused = job.result("refused")
    assert refused is not None
    assert said in refused
    assert said in job.said()
    assert not job.result("bad_nodes")


def test_a_node_that_never_starts_is_named(make_job, monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NODELIST", "alpha[0-2]")
    job = make_job(3)
    start = time.monotonic()
    job.start(0, timeout_s=6)
    job.start(1, timeout_s=6)
    assert job.codes() == {0: 1, 1: 1}
    assert time.monotonic() - start < 20
    assert "pre-flight error: alpha2: nothing heard of it in 6 s" in job.said()
    assert job.result("bad_nodes") == "alpha2\n"
    assert job.result("refused") is None
    assert job.result("resume_step") == "-1\n"


def test_others_end_when_the_head_node_dies(make_job):
    job = make_job(3)
    job.start(0)
    job.start(1)
    end = time.monotonic() + ENDS
    while not (job.results / ".preflight_1").exists() and time.monotonic() < end:
        time.sleep(0.05)
    start = time.monotonic()
    head = job.processes[0].pid
    assert head is not None
    os.kill(head, signal.SIGKILL)
    assert job.codes() == {0: -signal.SIGKILL, 1: 1}
    assert time.monotonic() - start < 10
    assert "pre-flight error: alpha1: lost the head node" in job.said(1)


def test_a_node_without_the_shared_folders_is_at_fault(make_job, tmp_path):
    """Relative folders in another working directory: the same names, other storage."""
    job = make_job(3, **{"exp_manager.explicit_log_dir": "log"})
    for node, place in enumerate(("here", "here", "elsewhere")):
        (tmp_path / place).mkdir(exist_ok=True)
        job.start(node, cwd=tmp_path / place, folder="results", timeout_s=8)
    assert job.codes() == {0: 1, 1: 1, 2: 1}
    job.results = tmp_path / "here" / "results"
    assert job.result("bad_nodes") == "alpha2\n", job.said()
    for folder in ("log", "results"):
        assert f"alpha2: {folder} does not show what alpha0, alpha1 wrote there" in job.said()
    assert job.result("refused") is None


def test_results_that_cannot_be_left_are_an_error(make_job, tmp_path):
    (tmp_path / "file").touch()
    job = make_job(2)
    job.start(0, folder=tmp_path / "file")
    job.start(1, folder=tmp_path / "file")
    assert job.codes() == {0: 1, 1: 1}
    assert f"alpha0, alpha1: cannot write to {tmp_path / 'file'} (File exists)" in job.said()
    assert "cannot leave the results" in job.said()


def test_other_code_on_one_node(make_job, tmp_path):
    """The one node runs as a command, with a changed copy of the package before the others' on its path."""
    package = shutil.copytree(REPO / "megatron_dump", tmp_path / "copy" / "megatron_dump")
    with (package / "types.py").open("a") as file:
        file.write("# changed\n")
    job = make_job(3)
    env = {**os.environ, "PYTHONPATH": str(package.parent), "SLURMD_NODENAME": "alpha2"}
    command = [sys.executable, str(TOOL), *job.argv(2, timeout_s=100)]
    with subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPO
    ) as other:
        job.start(0, timeout_s=100)
        job.start(1, timeout_s=100)
        assert job.codes() == {0: 1, 1: 1}
        said = other.communicate(timeout=ENDS)
    assert other.returncode == 1
    assert "pre-flight of alpha2: failed" in said[1]
    assert "megatron_dump's code: " in job.said()
    assert "on alpha0, alpha1; " in job.said()
    assert "on alpha2; wanted one on all nodes: make alpha2 like the others" in job.said()
    assert job.result("bad_nodes") == "alpha2\n"
    assert [n["found"]["gb_per_s"] > 0 for n in json.loads(job.result("report.json") or "")["nodes"]] == [True] * 3

"""The kk_cpu job on two nodes of two ranks each, submitted as a user would, and what it leaves behind."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from tests.distributed.runs import MODEL, REPO, draws, rows
from tests.slurm.cluster import Cluster

SETTINGS = {
    "pretrained_checkpoint.restore_from_path": MODEL,
    "model.tensor_model_parallel_size": 2,
    "model.pipeline_model_parallel_size": 1,
    "model.micro_batch_size": 16,
    "model.global_batch_size": 64,
    "model.grpo.length_params.max_length": 64,
    "trainer.collective_timeout_s": 60,
    "trainer.grpo.num_prompts_per_grpo_step": 8,
    "trainer.grpo.samples_per_prompt": 8,
    "trainer.grpo.max_steps": 6,
    "trainer.grpo.save_interval": 2,
    "trainer.grpo.run_validation_step_0": "false",
    "trainer.grpo.val_check_interval": 0,
    "exp_manager.time_reserve_s": 10,
}


@dataclasses.dataclass(frozen=True)
class Run:
    """A job, and its folders."""

    cluster: Cluster
    job: str
    log_dir: Path
    folder: Path  # the job's logs
    output: Path  # the batch script's

    @property
    def text(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    def attempts(self) -> list[Path]:
        return sorted(self.folder.glob("attempt_*"), key=lambda path: int(path.name.rpartition("_")[2]))

    def outcome(self, attempt: int = -1) -> dict[str, Any] | None:
        path = self.attempts()[attempt] / "outcome.json"
        return json.loads(path.read_text()) if path.exists() else None

    def steps(self) -> int:
        return len(rows(self.log_dir)) if (self.log_dir / "metrics.jsonl").exists() else 0

    def wait_step(self, step: int, timeout_s: float = 120) -> None:
        """Until metrics.jsonl holds so many steps."""
        self.cluster.wait(
            lambda: self.steps() >= step or self._ended(),
            timeout_s,
            lambda: f"job {self.job} is at step {self.steps()}, not {step}:\n{self.text[-3000:]}",
        )
        assert self.steps() >= step, f"job {self.job} ended at step {self.steps()}:\n{self.text[-3000:]}"

    def wait_attempt(self, n: int, timeout_s: float = 180) -> None:
        """Until the n-th attempt has begun."""
        self.cluster.wait(
            lambda: len(self.attempts()) >= n,
            timeout_s,
            lambda: f"no attempt {n} of job {self.job}:\n{self.text[-3000:]}",
        )

    def wait(self, *states: str, timeout_s: float = 240) -> str:
        """Until it has ended, in one of the states."""
        state = self.cluster.wait_job(self.job, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", timeout_s=timeout_s)
        assert state in states, f"job {self.job} is {state}, not {states}:\n{self.text[-5000:]}"
        return state

    def results(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """(metrics of each step but times, draws)."""
        machine = ("timing_s/", "perf/", "time")
        kept = [{k: v for k, v in row.items() if not k.startswith(machine)} for row in rows(self.log_dir)]
        return kept, draws(self.log_dir)

    def ranks(self, node: str) -> list[int]:
        """PIDs of the ranks on a node, in their order."""
        found = self.cluster.processes(node, "LOCAL_RANK=")
        mine = {pid: env for pid, env in found.items() if env.get("SLURM_JOB_ID") == self.job and "RANK" in env}
        lead: dict[str, int] = {}
        for pid in sorted(mine):  # a rank's own children come later
            lead.setdefault(mine[pid]["LOCAL_RANK"], pid)
        return [lead[rank] for rank in sorted(lead)]

    def nodes(self) -> list[str]:
        listed = self.cluster.run("scontrol", "show", "hostnames", self.cluster.job(self.job)["NodeList"]).stdout
        return listed.split()

    def _ended(self) -> bool:
        return self.cluster.state(self.job) in ("COMPLETED", "CANCELLED", "TIMEOUT")


class Jobs:
    def __init__(self, cluster: Cluster, data: Path, folder: Path) -> None:
        self.cluster, self.data, self.folder = cluster, data, folder
        folder.mkdir(exist_ok=True)
        self._runs: list[Run] = []

    def submit(
        self, *options: str, nodes: str = "2", second: str = "", env: dict[str, str] | None = None, **overrides: Any
    ) -> Run:
        """options: sbatch's. The script is named by its path, from another folder, as README has it.

        second: options of a second component of the job.
        """
        name = f"run{len(self._runs)}"
        log_dir, output = self.folder / name, self.folder / f"{name}.out"
        settings = {
            **SETTINGS,
            "model.data.train_files": f"[{self.data / 'train.parquet'}]",
            "model.data.validation_files": "[]",
            "exp_manager.explicit_log_dir": log_dir,
            **overrides,
        }
        environment = {
            "PYTHON": sys.executable,
            "NPROC_PER_NODE": "2",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "RETRY_WAIT": "1",
            **(env or {}),
        }
        job = self.cluster.sbatch(
            f"--nodes={nodes}",
            f"--output={output}",
            "--signal=B:USR1@20",
            *options,
            *([":", second] if second else []),
            str(REPO / "launch_slurm.sh"),
            "--config-name=kk_cpu",
            *(f"{key}={value}" for key, value in settings.items()),
            env=environment,
            cwd=self.folder,
        )
        run = Run(self.cluster, job, log_dir, self.folder / f"slurm-megatron-dump-{job}", output)
        self._runs.append(run)
        return run

    def clear(self) -> None:
        for run in self._runs:
            self.cluster.run("scancel", run.job, check=False)
        for node in self.cluster.nodes:
            self.cluster.revive(node)
        self.cluster.wait_idle(self.cluster.nodes)

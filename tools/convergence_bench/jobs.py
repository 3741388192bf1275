"""Runs of the benchmark: one process each, several at a time, going on where an earlier call was interrupted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convergence_bench.arms import Arm
from kk.progress import bar

ROOT = Path(__file__).resolve().parents[2]
EVALUATION = "evaluation.json"
SAMPLES = 4  # of each validation prompt, from the final weights; a validation under way takes one


class JobError(RuntimeError):
    """A run failed, or is another one than was asked for: one clear line, and the end of its log."""


@dataclass(frozen=True)
class Job:
    """One arm with one seed."""

    arm: Arm
    seed: int
    folder: Path  # of the run
    settings: tuple[str, ...]  # that all arms share

    @property
    def overrides(self) -> list[str]:
        return [*self.settings, *self.arm.overrides(), f"model.seed={self.seed}"]

    @property
    def is_finished(self) -> bool:
        return (self.folder / EVALUATION).exists()

    def check(self) -> None:
        """JobError if the folder holds a run with other settings."""
        path = self.folder / "job.json"
        if path.exists() and json.loads(path.read_text()) != self.overrides:
            raise JobError(f"{self.folder} holds a run with other settings: choose another --out, or move it away")

    def run(self, crew: Crew) -> None:
        """Train until the tokens are spent (a run that was interrupted goes on), then evaluate what came of it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "job.json").write_text(json.dumps(self.overrides))
        settings = ["--config-name=kk_convergence", *self.overrides, f"exp_manager.explicit_log_dir={self.folder}"]
        if not self._trained():
            crew.call([str(ROOT / "examples/train_gpt_grpo.py"), *settings], self.folder / "log.txt")
        outcome = self._outcome()
        if not self._trained():
            raise JobError(f"{self.folder}: {outcome['state']} at step {outcome['step']}: {outcome['reason']}")
        checkpoint = self.folder / f"checkpoints/step_{outcome['step']}"
        command = [str(ROOT / "examples/evaluate.py"), *settings, f"evaluate.checkpoint={checkpoint}"]
        part = self.folder / f"{EVALUATION}.part"
        command += [f"evaluate.samples_per_prompt={SAMPLES}", f"evaluate.out={part}"]
        crew.call(command, self.folder / "log.txt")
        part.replace(self.folder / EVALUATION)

    def _outcome(self) -> dict[str, Any]:
        return json.loads((self.folder / "outcome.json").read_text())

    def _trained(self) -> bool:
        return (self.folder / "outcome.json").exists() and self._outcome()["state"] == "finished"


class Crew:
    """Processes that end with the benchmark: an interrupted run goes on from its latest checkpoint next time."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen] = set()
        self._lock, self._stopped = threading.Lock(), False

    def call(self, command: Sequence[str], log: Path) -> None:
        """A script of this repository on one thread. JobError, with the end of its log, if it fails."""
        environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        with log.open("ab") as file:
            with self._lock:
                if self._stopped:
                    raise JobError("interrupted")
                child = subprocess.Popen(
                    [sys.executable, *command], stdout=file, stderr=file, env=environ, cwd=ROOT, start_new_session=True
                )
                self._running.add(child)
            status = child.wait()
            with self._lock:
                self._running.discard(child)
        if status:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
            raise JobError(f"exit status {status} ({log}):\n{tail}")

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
            for child in self._running:
                child.terminate()


def run_all(jobs: Sequence[Job], workers: int) -> None:
    """All that are not finished, in their order. The first JobError ends it, and the processes."""
    for job in jobs:
        job.check()
    crew, left = Crew(), [job for job in jobs if not job.is_finished]
    with bar() as progress, ThreadPoolExecutor(workers) as pool:
        task = progress.add_task("runs", total=len(jobs), completed=len(jobs) - len(left))
        futures = {pool.submit(job.run, crew): job for job in left}
        try:
            for future in as_completed(futures):
                future.result()
                progress.update(task, advance=1, description=f"{futures[future].arm.name}, {futures[future].seed}")
        except BaseException:
            crew.stop()
            pool.shutdown(cancel_futures=True)
            raise

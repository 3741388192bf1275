"""A few steps of the real trainer in the ranks that were started, as a JSON file; what is read of such files."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import pathlib
import statistics
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch.distributed as dist

from megatron_dump.actor import memory
from megatron_dump.assemble import build_trainer
from megatron_dump.config import Config
from megatron_dump.distributed import all_gather_array, fail_together
from megatron_dump.trainer import GRPOTrainer
from multinode_bench.files import machine, read_json, write_json
from multinode_bench.workload import Lengths

PHASES = ("gen", "reward", "old_log_prob", "ref", "update_actor")  # of timing_s/…; what is left is `other`
_SCRIPT = pathlib.Path(__file__).resolve().parents[2] / "examples/train_gpt_grpo.py"
# Nothing but steps; a policy that stays as it is does the same work in every step and every layout.
OVERRIDES = (
    "trainer.grpo.val_check_interval=0",
    "trainer.grpo.save_interval=0",
    "model.data.validation_files=[]",
    "model.optim.lr=0",
    "trainer.grpo.curriculum.sources={name: uniform}",
)


@dataclasses.dataclass(frozen=True)
class Measured:
    """A layout's steps. S steps, the first of the run not among them."""

    name: str
    mode: str  # weak, strong, or calibration: settings of one rank that constants are fitted to
    arguments: list[str]  # of train_gpt_grpo.py
    ranks: int
    lengths: list[Lengths]  # [S]
    seconds: list[dict[str, float]]  # [S], by PHASES, other and step
    prompts: int
    held: list[list[int]]  # [ranks], bytes of memory.PARTS
    places: list[list[int]]  # [ranks], pipeline stage; rank and size among those that share the optimizer
    resident_gb: float

    def median(self, phase: str) -> float:
        return statistics.median(step[phase] for step in self.seconds)


def script() -> ModuleType:
    """examples/train_gpt_grpo.py as a module."""
    spec = importlib.util.spec_from_file_location("train_gpt_grpo", _SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read_arguments(arguments: Sequence[str]) -> Config:
    """The configuration of train_gpt_grpo.py's arguments, the number of devices from WORLD_SIZE if one is set."""
    nodes, world = os.environ.get("GROUP_WORLD_SIZE", "1"), os.environ.get("WORLD_SIZE")
    sizes = [f"trainer.num_nodes={nodes}", f"trainer.devices={int(world) // int(nodes)}"] if world else []
    return script().read_config([*arguments, *sizes])[1]


def measure(name: str, mode: str, arguments: list[str], steps: int, out: pathlib.Path) -> None:
    """Train `steps` steps and one before them; rank 0 writes OUT/steps/NAME.json. A collective."""
    log_dir = out / "runs" / name
    extra = [*OVERRIDES, f"trainer.grpo.max_steps={steps + 1}", f"exp_manager.explicit_log_dir={log_dir}"]
    config = read_arguments([*arguments, *extra])
    trainer = build_trainer(config)
    trainer.resume(False)
    trainer.fit()
    found = _ranks(trainer)
    trainer.close()
    with fail_together(f"--out={out}", device=trainer.replica.device):
        if dist.get_rank() == 0:
            about = {"name": name, "mode": mode, "arguments": arguments, "ranks": dist.get_world_size()}
            about["prompts"] = config.trainer.grpo.num_prompts_per_grpo_step
            write_json(out / "steps" / f"{name}.json", {**about, **found, **_timings(log_dir), "machine": machine()})


def _ranks(trainer: GRPOTrainer) -> dict[str, Any]:
    """What each rank holds, and where it is. A collective."""
    actor: Any = trainer.actor
    place = actor.parallel
    own = memory.held(actor.models, actor.optimizer, actor.reference.weights if actor.reference else None)
    sharing = [place.data_rank * place.context_size + place.context_rank, place.data_size * place.context_size]
    return {
        "held": all_gather_array(np.array(own), None, place.device).tolist(),
        "places": all_gather_array(np.array([place.pipeline_rank, *sharing]), None, place.device).tolist(),
    }


def _timings(log_dir: pathlib.Path) -> dict[str, Any]:
    lines = (log_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if "timing_s/step" in row][1:]  # the first step warms up
    return {
        "resident_gb": rows[-1]["perf/memory_rss_gb"],
        "lengths": [_lengths(row) for row in rows],
        "seconds": [_seconds(row) for row in rows],
    }


def _lengths(row: dict[str, float]) -> dict[str, float]:
    tokens = row["perf/throughput"] * row["timing_s/step"]  # of prompts and responses
    return {
        "prompt": tokens / row["train/n_rollouts"] - row["response_length/mean"],
        "response": row["response_length/mean"],
        "longest": row["response_length/max"],
    }


def _seconds(row: dict[str, float]) -> dict[str, float]:
    found = {phase: row[f"timing_s/{phase}"] for phase in PHASES}
    return {**found, "other": row["timing_s/step"] - sum(found.values()), "step": row["timing_s/step"]}


def read_steps(out: pathlib.Path) -> list[Measured]:
    """All of OUT/steps, by name."""
    found = []
    for path in sorted((out / "steps").glob("*.json")):
        raw = read_json(path, "--out")
        raw["lengths"] = [Lengths(**lengths) for lengths in raw["lengths"]]
        found.append(Measured(**{field.name: raw[field.name] for field in dataclasses.fields(Measured)}))
    return found

"""Whole runs of examples/train_gpt_grpo.py on forked ranks, for tests."""

from __future__ import annotations

import importlib.util
import json
import pathlib
import subprocess
import sys

from megatron_dump.assemble import build_trainer  # imports Megatron once, before the ranks are forked
from tests.distributed.launch import run_ranks

REPO = pathlib.Path(__file__).resolve().parents[2]
MODEL = REPO / "examples/models/kk-tiny"


def load_script(name: str):
    """A script of examples/ as a module; its neighbours can be imported by it."""
    if (folder := str(REPO / "examples")) not in sys.path:
        sys.path.append(folder)
    spec = importlib.util.spec_from_file_location(f"examples_{name}", REPO / f"examples/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SCRIPT = load_script("train_gpt_grpo")


def make_data(folder: pathlib.Path) -> pathlib.Path:
    """Puzzles with 2-4 people as train.parquet and test.parquet."""
    for module, options in (
        ("kk.generate", "--people 2-4 --per-size 40 --test-per-size 8 --names 8 --frames 1 --seed 5"),
        ("kk.dataset", f"--in {folder}"),
    ):
        command = [sys.executable, "-m", module, *options.split(), "--out", str(folder)]
        subprocess.run(command, check=True, cwd=REPO, capture_output=True)
    return folder


def arguments(world, data, log_dir, tensor=1, pipeline=1, **overrides) -> list[str]:
    settings = {
        "trainer.devices": world,
        "pretrained_checkpoint.restore_from_path": MODEL,
        "model.data.train_files": f"[{data / 'train.parquet'}]",
        "model.data.validation_files": "[]",
        "model.tensor_model_parallel_size": tensor,
        "model.pipeline_model_parallel_size": pipeline,
        "model.micro_batch_size": 4,
        "model.global_batch_size": 32,
        "model.optim.lr": 2e-4,
        "model.grpo.length_params.max_length": 48,
        "trainer.grpo.num_prompts_per_grpo_step": 8,
        "trainer.grpo.samples_per_prompt": 4,
        "trainer.grpo.max_steps": 3,
        "trainer.grpo.val_check_interval": 0,
        "trainer.grpo.initial_policy_kl_penalty": 0.05,
        "exp_manager.explicit_log_dir": log_dir,
        **overrides,
    }
    return ["--config-name=kk_cpu", *(f"{key}={value}" for key, value in settings.items())]


def one_rank(arguments: list[str]) -> str:
    """Train; the bytes of the weights the last draw was made with, "" when a resumed run had none left to make."""
    trainer = build_trainer(SCRIPT.read_config(arguments)[1])
    trainer.resume()
    trainer.fit()
    trainer.close()
    last = trainer.collector.sampler.last_draw
    return last.weights.tobytes().hex() if last else ""


def train(world, *args, **overrides) -> list[str]:
    return run_ranks(one_rank, world, arguments(world, *args, **overrides), timeout_s=300)


def rows(log_dir, name="metrics.jsonl") -> list[dict]:
    path = log_dir / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def draws(log_dir) -> list[dict]:
    """The training rounds of curriculum.jsonl."""
    events = [row for row in rows(log_dir, "curriculum.jsonl") if row["event"] == "draw"]
    return [{**e["draw"], "step": e["step"]} for e in events if e["draw"]["train"] and e["rejected"] is None]

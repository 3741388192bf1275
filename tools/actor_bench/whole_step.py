"""Whole GRPO steps, generation and training: the recipe kk_cpu on one rank beside TRL's GRPOTrainer."""

from __future__ import annotations

import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

import numpy as np
import pyarrow.parquet as pq
from omegaconf import OmegaConf

from kk.progress import each

REPO = pathlib.Path(__file__).resolve().parents[2]
MODEL = REPO / "examples/models/kk-tiny"


def beside_trl(trl_python: str, data: pathlib.Path, steps: int, rounds: int) -> None:
    """Prints rollouts per second of both, in turn; the first step of every run warms up and is not counted."""
    if not data.is_file():
        sys.exit(f"--data={data}: no such file; run `make data`, or name a parquet file of puzzles")
    recipe = OmegaConf.load(REPO / "examples/conf/kk_cpu.yaml")
    settings = {
        "steps": steps,
        "group": recipe.trainer.grpo.samples_per_prompt,
        "rows": recipe.model.global_batch_size,
        "micro": recipe.model.micro_batch_size,
        "max_length": recipe.model.grpo.length_params.max_length,
        "lr": recipe.model.optim.lr,
        "kl_penalty": recipe.trainer.grpo.initial_policy_kl_penalty,
    }
    seconds: dict[str, list[float]] = {"ours": [], "TRL": []}
    lengths: dict[str, list[float]] = {"ours": [], "TRL": []}
    version = ""
    for _ in each(range(rounds), "rounds"):
        with tempfile.TemporaryDirectory() as name:
            folder = pathlib.Path(name)
            prompts = _some_rows(data, folder, steps * settings["rows"] // settings["group"])
            rows = _ours(folder, steps)
            seconds["ours"] += [row["timing_s/step"] for row in rows[1:]]
            lengths["ours"] += [row["response_length/mean"] for row in rows[1:]]
            result = _trl(trl_python, folder, prompts, settings)
            seconds["TRL"] += result["seconds"][1:]
            lengths["TRL"] += result["lengths"][1:]
            version = result["version"]
    print(f"\nkk_cpu on one rank beside TRL {version}: {settings}, {rounds} rounds")
    speed = {side: settings["rows"] / statistics.median(values) for side, values in seconds.items()}
    for side, value in speed.items():
        print(
            f"  {value:7.2f} rollouts/s  {side}: {statistics.median(seconds[side]):.1f} s a step, "
            f"{statistics.fmean(lengths[side]):.0f} tokens a completion"
        )
    print(f"  ratio {speed['ours'] / speed['TRL']:.2f}")


def _some_rows(data: pathlib.Path, folder: pathlib.Path, n: int) -> list[str]:
    """FOLDER/train.parquet with n random rows of the data, and their prompts as kk-tiny's chat template puts them."""
    table = pq.read_table(data)
    table = table.take(np.random.default_rng(0).choice(len(table), n, replace=False))
    pq.write_table(table, folder / "train.parquet")
    return ["".join(message["content"] for message in row) for row in table["prompt"].to_pylist()]


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def _run(command: list[str]) -> str:
    run = subprocess.run(command, cwd=REPO, env=_environment(), capture_output=True, text=True, check=False)
    if run.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{run.stderr[-3000:]}")
    return run.stdout


def _ours(folder: pathlib.Path, steps: int) -> list[dict]:
    _run(
        [
            sys.executable,
            "examples/train_gpt_grpo.py",
            "--config-name=kk_cpu",
            "trainer.devices=1",
            "model.tensor_model_parallel_size=1",
            "model.pipeline_model_parallel_size=1",
            f"trainer.grpo.max_steps={steps}",
            "trainer.grpo.inference_backend.reshard=false",
            "trainer.grpo.save_interval=0",
            "trainer.grpo.val_check_interval=0",
            "trainer.grpo.run_validation_step_0=false",
            "trainer.grpo.curriculum.sources.name=proportional",
            f"model.data.train_files=[{folder / 'train.parquet'}]",
            "model.data.validation_files=[]",
            f"exp_manager.explicit_log_dir={folder / 'run'}",
        ]
    )
    return [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]


def _trl(python: str, folder: pathlib.Path, prompts: list[str], settings: dict) -> dict:
    (folder / "prompts.json").write_text(json.dumps(prompts))
    (folder / "settings.json").write_text(json.dumps(settings))
    script = pathlib.Path(__file__).with_name("trl_steps.py")
    output = _run([python, str(script), str(MODEL), str(folder / "prompts.json"), str(folder / "settings.json")])
    return json.loads(output.splitlines()[-1])

"""The trainer's arguments, checked as the trainer will: configuration, layout, files, and where it would resume."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import math
import os
import pathlib
import warnings

from megatron_dump.config import Config, ConfigError

SCRIPT = pathlib.Path(__file__).resolve().parents[3] / "examples" / "train_gpt_grpo.py"
OPTIMIZER_BYTES = 12  # of a parameter: master weight and Adam's two moments, float32


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the arguments ask of a node; sizes in bytes."""

    log_dir: pathlib.Path
    resume_step: int  # -1: the run starts anew
    checkpoint: int  # size of one
    host_memory: int  # of one rank without a GPU, at least
    host_memory_beside_gpu: int  # of one rank with a GPU, at least


def check(arguments: list[str], world_size: int) -> Plan:
    """ConfigError, ValueError or OSError in one line for what the trainer would refuse."""
    config = _read(arguments)
    for key, paths in (
        ("model.data.train_files", config.model.data.train_files),
        ("model.data.validation_files", config.model.data.validation_files),
    ):
        for path in paths:
            _check_parquet(key, path)
    log_dir = pathlib.Path(config.exp_manager.explicit_log_dir)
    step = resume_step(config, log_dir / "checkpoints")
    return Plan(log_dir, step, *_sizes(config, world_size))


def _read(arguments: list[str]) -> Config:
    spec = importlib.util.spec_from_file_location("train_gpt_grpo", SCRIPT)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    try:
        return script.read_config(arguments)[1]
    except SystemExit:  # argparse has told what is wrong with an option
        raise ConfigError(f"{' '.join(arguments)}: not arguments of examples/train_gpt_grpo.py") from None


def _sizes(config: Config, world_size: int) -> tuple[int, int, int]:
    """Bytes of a checkpoint and of a rank's host memory, without and with a GPU, after the layout's checks."""
    warnings.filterwarnings("ignore", module=r"megatron\.")  # missing fused kernels: the trainer's own affair
    logging.getLogger("megatron").setLevel(logging.ERROR)
    from megatron_dump.actor.hf_files import HFTensors
    from megatron_dump.actor.layout import check_all

    layout, replicas, _ = check_all(config, world_size)
    path = config.pretrained_checkpoint.restore_from_path
    _check_readable("pretrained_checkpoint.restore_from_path", pathlib.Path(path) / "tokenizer.json")
    parameters = sum(math.prod(entry.shape) for entry in HFTensors(path).entries.values())  # finds cut files, too
    weight = 2 if config.trainer.precision == "bf16" else 4
    share = parameters / (layout.tensor * layout.pipeline * layout.expert)
    optimizer = OPTIMIZER_BYTES / (replicas if config.model.use_distributed_optimizer else 1)
    gradient, process = 4, 2**30
    return (
        parameters * (weight + OPTIMIZER_BYTES),
        int(share * (weight + gradient + optimizer)) + process,
        int(share * weight) + process,
    )


def _check_readable(key: str, path: pathlib.Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{key}: no such file: {path}; put it where every node can read it")
    if not os.access(path, os.R_OK):
        raise PermissionError(f"{key}: {path} cannot be read; change its permissions")


def _check_parquet(key: str, path: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    _check_readable(key, pathlib.Path(path))
    try:
        pq.read_schema(path)
    except pa.ArrowException as error:
        raise ValueError(f"{key}: {path} cannot be read as parquet: {error}; copy it again") from error


def resume_step(config: Config, folder: pathlib.Path) -> int:
    """The step that the trainer would continue from, -1 if it would start anew. ValueError where it would refuse.

    By checkpoint_files, as actor.checkpoint.Checkpoints.latest does.
    """
    from megatron_dump.actor import checkpoint_files as files

    manager = config.exp_manager
    source = pathlib.Path(manager.resume_from_checkpoint).resolve() if manager.resume_from_checkpoint else None
    try:
        step, _ = files.find(folder, source)
    except ValueError as error:
        raise ConfigError(f"exp_manager.resume_from_checkpoint={source}: {error}") from None
    if step >= 0 and not manager.resume_if_exists:
        raise ConfigError(
            f"exp_manager.resume_if_exists=false, but exp_manager.explicit_log_dir holds a checkpoint of step {step}: "
            "choose another folder, or set it to true"
        )
    return step

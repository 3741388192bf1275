"""A policy's weights without what trains them: for generation and evaluation."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any, Protocol

import torch

from megatron_dump.actor import checkpoint_files as files
from megatron_dump.actor import convert, weights_checkpoint
from megatron_dump.actor.architecture import Architecture, read_architecture
from megatron_dump.actor.model import build_model, transformer_config
from megatron_dump.actor.parallel import Parallel
from megatron_dump.config import Config, ConfigError, ModelConfig
from megatron_dump.distributed import fail_together


class Policy(Protocol):
    """What generation asks of a policy: MegatronGPTGRPOActor, or FrozenPolicy."""

    parallel: Parallel
    arch: Architecture
    options: ModelConfig
    modules: list[Any]  # GPTModel: the chunks of this pipeline stage
    version: int

    @property
    def module(self) -> torch.nn.Module: ...


@dataclasses.dataclass
class FrozenPolicy:
    """Weights in a layout, on this rank; no gradients, no optimizer."""

    parallel: Parallel
    arch: Architecture
    options: ModelConfig
    modules: list[Any]
    version: int = 0

    @property
    def module(self) -> torch.nn.Module:
        """The only model chunk of this stage. ValueError when the interleaved pipeline gives it several."""
        (module,) = self.modules
        return module


def load_policy(config: Config, parallel: Parallel, checkpoint: str | None = None) -> FrozenPolicy:
    """`pretrained_checkpoint.restore_from_path`, or a checkpoint of a run that began there, whatever wrote it.

    checkpoint: a run's step_<n> folder, verified first, or what tools/convert_checkpoint.py wrote. A collective;
    ValueError on every rank for one that is damaged, RuntimeError for another model's.
    """
    model, path = config.model, config.pretrained_checkpoint.restore_from_path
    arch = read_architecture(path, model.make_vocab_size_divisible_by, parallel.tensor_size)
    settings = transformer_config(arch, parallel, config.trainer.precision, model)
    chunks = range(parallel.layout.virtual_pipeline or 1)
    modules = [build_model(arch, settings, parallel, chunk=i).eval().requires_grad_(False) for i in chunks]
    if checkpoint is None:
        convert.load_hf(modules, arch, parallel, path)
        return FrozenPolicy(parallel, arch, model, modules)
    try:
        with fail_together("evaluate.checkpoint", device=parallel.device):
            _verify(pathlib.Path(checkpoint), parallel)
    except RuntimeError as error:
        raise ValueError(str(error)) from None
    weights_checkpoint.load_weights(modules, arch, parallel, checkpoint)
    return FrozenPolicy(parallel, arch, model, modules)


def check_checkpoint(path: str, precision: str) -> None:
    """FileNotFoundError or ConfigError, one line, for a folder that is no checkpoint or of another `precision`."""
    stored = weights_checkpoint.stored_dtype(path)
    right = "bf16" if stored == torch.bfloat16 else "32"
    if precision != right:
        raise ConfigError(
            f"trainer.precision={precision}: {path} holds weights in {stored}; set trainer.precision={right}"
        )


def _verify(path: pathlib.Path, parallel: Parallel) -> None:
    is_of_run = (path / files.STATE).exists()  # others have no manifest
    if is_of_run and (damage := files.damage(path, parallel.rank, parallel.world_size)):
        raise ValueError(damage)

"""The run's connection to Ray, where anything of it runs there."""

from __future__ import annotations

import dataclasses

import torch

from megatron_dump.config import Config, ConfigError
from megatron_dump.distributed import fail_together
from megatron_dump.engine_options import RayOptions
from megatron_dump.ray_cluster import Cluster


def connect(config: Config, rank: int, device: torch.device) -> Cluster | None:
    """On rank 0, if engines or reward workers are to run on Ray; None elsewhere and otherwise.

    A collective of all ranks; ConfigError on all of them when there is no Ray or no cluster.
    """
    block = config.trainer.grpo.inference_backend.ray
    if not (block.enabled or config.model.data.reward_workers.ray_actors):
        return None
    cluster = None
    try:
        with fail_together("trainer.grpo.inference_backend.ray", device=device):
            if rank == 0:
                cluster = Cluster(_options(config, device))
    except RuntimeError as error:
        raise ConfigError(str(error)) from error
    return cluster


def _options(config: Config, device: torch.device) -> RayOptions:
    """`inference_backend.ray`; an engine of several devices reserves as many unless the block says otherwise."""
    backend = config.trainer.grpo.inference_backend
    if backend.ray.gpus_per_engine is not None:
        return backend.ray
    gpus = float(backend.vllm.get("tensor_parallel_size", 1)) if device.type == "cuda" else 0.0
    return dataclasses.replace(backend.ray, gpus_per_engine=gpus)

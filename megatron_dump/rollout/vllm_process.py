"""vLLM engines from the configuration's block: a process beside a replica, or actors of a Ray cluster."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_dump.ray_cluster import Cluster
from megatron_dump.rollout.engine_process import EngineProcess
from megatron_dump.rollout.ray_pool import RayEngine, ray_engines
from megatron_dump.rollout.sampling import SamplingOptions
from megatron_dump.rollout.vllm_options import engine_environment

_OURS = ("python", "start_timeout_s", "timeout_s", "sleep")  # of the block; the rest is vLLM's
FACTORY = "megatron_dump.rollout.vllm_engine:VllmEngine"


def start_vllm(
    model: str,
    sampling: SamplingOptions,
    block: Mapping[str, Any],
    defaults: Mapping[str, Any],
    log: Path,
    devices: str | None,
    timeout_s: float,
) -> EngineProcess:
    """Start it; it is not waited for.

    model: Hugging Face folder; block: `inference_backend.vllm`, vLLM's keyword arguments but for `python`,
    `start_timeout_s`, `timeout_s` and `sleep`; defaults: of those; devices: CUDA_VISIBLE_DEVICES of its process, None
    on a CPU; timeout_s: of the start and of a call, if the block says nothing else.
    """
    env = engine_environment(on_cpu=devices is None)
    if devices is not None:
        env["CUDA_VISIBLE_DEVICES"] = devices
    return EngineProcess(
        FACTORY,
        _engine_options(model, sampling, block, defaults),
        log,
        python=str(block.get("python") or sys.executable),
        env=env,
        start_timeout_s=float(block.get("start_timeout_s") or timeout_s),
        timeout_s=float(block.get("timeout_s") or timeout_s),
    )


def vllm_on_ray(
    cluster: Cluster,
    n: int,
    model: str,
    sampling: SamplingOptions,
    block: Mapping[str, Any],
    defaults: Mapping[str, Any],
) -> list[RayEngine]:
    """n of them, up; arguments as of `start_vllm`. `cluster.options` says what each reserves.

    RuntimeError when the cluster has not enough; EngineDied or EngineRefused when one does not come up.
    """
    env = engine_environment(on_cpu=not cluster.options.gpus_per_engine)
    return ray_engines(cluster, n, FACTORY, _engine_options(model, sampling, block, defaults), env)


def _engine_options(
    model: str, sampling: SamplingOptions, block: Mapping[str, Any], defaults: Mapping[str, Any]
) -> dict[str, Any]:
    llm = {**defaults, **{k: v for k, v in block.items() if k not in _OURS}}
    return {"model": os.path.abspath(model), "sampling": dataclasses.asdict(sampling), "llm": llm}

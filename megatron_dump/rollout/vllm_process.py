"""The process of a replica's vLLM engine, from the configuration's block."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_dump.rollout.engine_process import EngineProcess
from megatron_dump.rollout.sampling import SamplingOptions
from megatron_dump.rollout.vllm_options import engine_environment

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
    llm = {
        **defaults,
        **{k: v for k, v in block.items() if k not in ("python", "start_timeout_s", "timeout_s", "sleep")},
    }
    env = engine_environment(on_cpu=devices is None)
    if devices is not None:
        env["CUDA_VISIBLE_DEVICES"] = devices
    return EngineProcess(
        FACTORY,
        {"model": os.path.abspath(model), "sampling": dataclasses.asdict(sampling), "llm": llm},
        log,
        python=str(block.get("python") or sys.executable),
        env=env,
        start_timeout_s=float(block.get("start_timeout_s") or timeout_s),
        timeout_s=float(block.get("timeout_s") or timeout_s),
    )

"""What `trainer.grpo.inference_backend` must satisfy. What only vLLM knows, its process says when it starts."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from typing import Any

from megatron_dump.config.schema import Config, ConfigError

BACKENDS = ("megatron", "recorded", "vllm")
_KEY = "trainer.grpo.inference_backend"


def check_backend(config: Config) -> None:
    """ConfigError names key, value and remedy."""
    backend = config.trainer.grpo.inference_backend
    if backend.type not in BACKENDS:
        raise ConfigError(f"{_KEY}.type={backend.type}: known are {', '.join(BACKENDS)}")
    if backend.reshard not in (True, False, "auto", "pipeline"):
        raise ConfigError(f"{_KEY}.reshard={backend.reshard}: known are true, false, auto and pipeline")
    if backend.type == "recorded" and not backend.path:
        raise ConfigError(f"{_KEY}.path: no value; name the folder of recorded completions")
    if backend.engines < 1:
        raise ConfigError(f"{_KEY}.engines={backend.engines}: must be at least 1")
    if backend.type != "vllm" and (backend.engines > 1 or backend.ray.enabled):
        key = "ray.enabled=true" if backend.ray.enabled else f"engines={backend.engines}"
        raise ConfigError(f"{_KEY}.{key}: engines belong to {_KEY}.type=vllm, which is {backend.type}: set that")
    workers = config.model.data.reward_workers
    if workers.ray_actors < 0 or (workers.ray_actors and not workers.workers):
        raise ConfigError(
            f"model.data.reward_workers.ray_actors={workers.ray_actors}: must not be negative, and each actor needs "
            f"model.data.reward_workers.workers, which is {workers.workers}"
        )
    if backend.type == "vllm":
        _check_vllm(config, backend.vllm)
    elif backend.vllm:
        raise ConfigError(
            f"{_KEY}.vllm.{next(iter(backend.vllm))}: belongs to {_KEY}.type=vllm, which is {backend.type}: set that, "
            "or remove it"
        )


def _check_vllm(config: Config, vllm: Mapping[str, Any]) -> None:
    for name in ("start_timeout_s", "timeout_s"):
        value = vllm.get(name)
        if value is not None and (isinstance(value, (bool, str)) or value <= 0):
            raise ConfigError(f"{_KEY}.vllm.{name}={value}: must be a number of seconds above 0")
    if "sleep" in vllm and not isinstance(vllm["sleep"], bool):
        raise ConfigError(f"{_KEY}.vllm.sleep={vllm['sleep']}: must be true or false")
    python = vllm.get("python")
    if python is not None and shutil.which(str(python)) is None:
        raise ConfigError(f"{_KEY}.vllm.python={python}: no such program; name the Python of the environment with vLLM")
    limit, longest = config.model.grpo.length_params.max_length, vllm.get("max_model_len")
    if isinstance(longest, int) and longest <= limit:
        raise ConfigError(
            f"{_KEY}.vllm.max_model_len={longest}: model.grpo.length_params.max_length={limit} leaves no room for a "
            "prompt; raise it"
        )

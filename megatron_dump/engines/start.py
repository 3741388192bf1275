"""Starting a run's engines: processes beside each replica's lead, or Ray actors that all replicas share."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from megatron_dump.actor.actor import MegatronGPTGRPOActor
from megatron_dump.actor.weight_stream import WeightStream
from megatron_dump.config import Config, ConfigError
from megatron_dump.distributed import Replica, all_gather_array, fail_together
from megatron_dump.engines.engines import RunEngines
from megatron_dump.ray_cluster import Cluster
from megatron_dump.rollout import AsyncGenerator
from megatron_dump.rollout.engine import EngineHandle
from megatron_dump.rollout.engine_generator import EngineGenerator, with_text
from megatron_dump.rollout.pool import EnginePool
from megatron_dump.rollout.sampling import SamplingOptions
from megatron_dump.rollout.shared import SharedGenerator
from megatron_dump.rollout.vllm_process import start_vllm, vllm_on_ray
from megatron_dump.weight_sync.sync import WeightSync

_BLOCK = "trainer.grpo.inference_backend"


def start_engines(
    config: Config,
    actor: MegatronGPTGRPOActor,
    replica: Replica,
    options: SamplingOptions,
    decode: Callable[[list[int]], str],
    cluster: Cluster | None,
) -> tuple[AsyncGenerator, RunEngines]:
    """A collective of all ranks. ConfigError on every rank, when one cannot be started.

    cluster: rank 0's, where `inference_backend.ray.enabled`.
    """
    backend, device = config.trainer.grpo.inference_backend, actor.parallel.device
    shared, hosts = backend.ray.enabled, []
    handles: list[Any] = []
    devices = _devices(replica)
    with _start_failures_are_the_users(replica):
        defaults = _llm_defaults(config, options)
        if cluster is not None and shared:
            path = config.pretrained_checkpoint.restore_from_path
            handles = vllm_on_ray(cluster, backend.engines, path, options, backend.vllm, defaults)
            hosts = [engine.place["host"] for engine in handles]
        elif replica.is_lead and not shared:
            handles = _processes(config, options, defaults, replica, devices)
    handle: EngineHandle | None = handles[0] if handles else None
    synced = handles
    if len(handles) > 1 or (handles and shared):
        pool = EnginePool(handles, backend.pool, expected_tokens=options.max_length)
        handle, synced = pool, pool.engines
    sync = WeightSync(
        WeightStream(actor.modules, actor.arch, actor.parallel),
        synced,
        backend.weight_sync,
        hosts=hosts,
        replica=replica.rank,
        device=device,
    )
    seed, drives = config.model.seed, Replica(0, 1, None, device, dist.group.WORLD) if shared else replica
    generator = EngineGenerator(handle, drives, seed, None if shared else decode, lambda: engines.renew())
    sleeps = bool(backend.vllm.get("sleep", device.type == "cuda" and not shared))
    engines = RunEngines(handle, synced, sync, generator.drain, device, sleeps)
    if shared:
        return SharedGenerator(generator, replica, functools.partial(with_text, decode)), engines
    return generator, engines


def _processes(
    config: Config, options: SamplingOptions, defaults: dict[str, object], replica: Replica, devices: list[str] | None
) -> list[EngineHandle]:
    """`inference_backend.engines` of them beside this rank, up, which share out the replica's `devices`."""
    backend = config.trainer.grpo.inference_backend
    folder = Path(config.exp_manager.explicit_log_dir) / "engines"
    limit = 0.9 * config.trainer.collective_timeout_s  # the other ranks wait in a collective
    shares = _device_shares(devices, backend.engines)
    handles = [
        start_vllm(
            config.pretrained_checkpoint.restore_from_path,
            options,
            backend.vllm,
            defaults,
            folder / (f"replica_{replica.rank}.log" if len(shares) == 1 else f"replica_{replica.rank}_{i}.log"),
            share,
            limit,
        )
        for i, share in enumerate(shares)
    ]
    try:
        for handle in handles:
            handle.ping().result()
    except BaseException:
        for handle in handles:
            handle.close()
        raise
    return list(handles)


def _llm_defaults(config: Config, options: SamplingOptions) -> dict[str, object]:
    """What vLLM is told where `inference_backend.vllm` says nothing."""
    model = config.model
    defaults: dict[str, object] = {
        "dtype": "bfloat16" if config.trainer.precision == "bf16" else "float32",
        "max_num_seqs": model.grpo.generation_rollout_mbs,
    }
    if model.data.max_prompt_length is not None:
        defaults["max_model_len"] = model.data.max_prompt_length + options.max_length
    return defaults


@contextlib.contextmanager
def _start_failures_are_the_users(replica: Replica) -> Iterator[None]:
    """On every rank one line, without a traceback."""
    try:
        with fail_together(f"{_BLOCK}.type=vllm", device=replica.device):
            yield
    except RuntimeError as error:
        raise ConfigError(str(error)) from error


def _devices(replica: Replica) -> list[str] | None:
    """The CUDA devices of this rank's replica on this node, as CUDA_VISIBLE_DEVICES has them; None on a CPU.

    A collective of the replica's ranks.
    """
    if replica.device.type != "cuda":
        return None
    own = np.array([int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("GROUP_RANK", "0"))])
    ranks = own[None] if replica.ranks is None else all_gather_array(own, replica.ranks, replica.device)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else None
    here = sorted({int(local) for local, node in ranks if node == own[1]})
    return [names[i] if names else str(i) for i in here]


def _device_shares(devices: list[str] | None, n: int) -> list[str | None]:
    """CUDA_VISIBLE_DEVICES of each of n engines. ValueError when there are fewer devices on the lead's node."""
    if devices is None:
        return [None] * n
    if len(devices) < n:
        raise ValueError(f"{_BLOCK}.engines={n}: a replica has {len(devices)} devices beside its first rank; lower it")
    return [",".join(part) for part in np.array_split(np.array(devices), n)]

"""Generation engines of a run and the weights they get: what the trainer tells them between two steps."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from megatron_dump.actor.actor import MegatronGPTGRPOActor
from megatron_dump.actor.weight_stream import WeightStream
from megatron_dump.config import Config, ConfigError
from megatron_dump.distributed import Replica, all_gather_array, fail_together
from megatron_dump.rollout.engine import EngineDied, EngineHandle
from megatron_dump.rollout.engine_generator import EngineGenerator
from megatron_dump.rollout.sampling import SamplingOptions
from megatron_dump.rollout.vllm_process import start_vllm
from megatron_dump.weight_sync.options import WeightSyncOptions
from megatron_dump.weight_sync.sync import WeightSync


class Engines:
    """This rank's engine, if it drives one, and the way of the weights to all of them. Methods are collectives.

    sleeps: the engine shares its device with the training ranks and gives its memory back while they train.
    """

    def __init__(self, handle: EngineHandle | None, sync: WeightSync, replica: Replica, sleeps: bool) -> None:
        self._handle, self._sync, self._replica, self._sleeps = handle, sync, replica, sleeps
        self._asleep, self._version = False, 0

    def push(self, version: int) -> None:
        """All engines generate with the present weights, numbered `version`, from now on."""
        if self._asleep:
            with self._together("wake"):
                if self._handle is not None:
                    with contextlib.suppress(EngineDied):  # the push below brings it back
                        self._handle.wake().result()
                    self._sync.invalidate(self._handle)
            self._asleep = False
        self._sync.push(version)
        self._version = version

    def renew(self) -> None:
        """Restart the dead ones and give them the weights they had."""
        self._sync.push(self._version)

    def rest(self) -> None:
        """Nothing is to be generated until the next push."""
        if self._sleeps and not self._asleep:
            with self._together("sleep"):
                if self._handle is not None:
                    with contextlib.suppress(EngineDied):  # the next push brings it back
                        self._handle.sleep().result()
            self._asleep = True

    def close(self) -> None:
        """No collective: a failing rank calls it too."""
        if self._handle is not None:
            self._handle.close()
        self._sync.close()

    def _together(self, what: str) -> contextlib.AbstractContextManager[None]:
        return fail_together(f"an engine's {what}", device=self._replica.device)


def start_engines(
    config: Config,
    actor: MegatronGPTGRPOActor,
    replica: Replica,
    options: SamplingOptions,
    decode: Callable[[list[int]], str],
) -> tuple[EngineGenerator, Engines]:
    """One vLLM process a replica, beside its lead rank. A collective of all ranks.

    ConfigError on every rank, when one cannot be started.
    """
    backend, model, grid = config.trainer.grpo.inference_backend, config.model, actor.parallel
    devices = _devices(replica)
    defaults: dict[str, object] = {
        "dtype": "bfloat16" if config.trainer.precision == "bf16" else "float32",
        "max_num_seqs": model.grpo.generation_rollout_mbs,
    }
    if model.data.max_prompt_length is not None:
        defaults["max_model_len"] = model.data.max_prompt_length + options.max_length
    handle = None
    with _start_failures_are_the_users(replica):
        if replica.is_lead:
            log = Path(config.exp_manager.explicit_log_dir) / "engines" / f"replica_{replica.rank}.log"
            handle = start_vllm(
                config.pretrained_checkpoint.restore_from_path, options, backend.vllm, defaults, log, devices,
                0.9 * config.trainer.collective_timeout_s,  # the other ranks wait in a collective
            )  # fmt: skip
            try:
                handle.ping().result()
            except BaseException:
                handle.close()
                raise
    sync = WeightSync(
        WeightStream(actor.modules, actor.arch, grid), [handle] if handle else [],
        WeightSyncOptions(**vars(backend.weight_sync)), replica=replica.rank, device=grid.device,
    )  # fmt: skip
    engines = Engines(handle, sync, replica, sleeps=bool(backend.vllm.get("sleep", devices is not None)))
    return EngineGenerator(handle, replica, model.seed, decode, engines.renew), engines


@contextlib.contextmanager
def _start_failures_are_the_users(replica: Replica) -> Iterator[None]:
    """On every rank one line, without a traceback."""
    try:
        with fail_together("trainer.grpo.inference_backend.type=vllm", device=replica.device):
            yield
    except RuntimeError as error:
        raise ConfigError(str(error)) from error


def _devices(replica: Replica) -> str | None:
    """The CUDA devices of this replica's ranks on this node, as CUDA_VISIBLE_DEVICES has them; None on a CPU."""
    if replica.device.type != "cuda":
        return None
    own = np.array([int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("GROUP_RANK", "0"))])
    ranks = own[None] if replica.ranks is None else all_gather_array(own, replica.ranks, replica.device)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else None
    here = sorted({int(local) for local, node in ranks if node == own[1]})
    return ",".join(names[i] if names else str(i) for i in here)

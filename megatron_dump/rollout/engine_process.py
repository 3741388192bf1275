"""An EngineHandle whose engine is a child process on this machine: engine_main.py at the other end of a socket."""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from megatron_dump.rollout import frames
from megatron_dump.rollout.engine import EngineOutput, EngineRequest
from megatron_dump.rollout.engine_child import EngineChild


class EngineProcess:
    """Starts at once; calls made before it is up wait for it.

    factory: "module:Class" of an Engine; options: its keyword arguments, JSON-able. Its words go to the end of the
    file `log`. python: an interpreter whose environment has what the engine imports, this package included. env: on
    top of this process's environment. A call that takes longer than `timeout_s`, or a start longer than
    `start_timeout_s`, is taken for a death.
    """

    def __init__(
        self,
        factory: str,
        options: Mapping[str, Any],
        log: str | Path,
        *,
        python: str = sys.executable,
        env: Mapping[str, str] | None = None,
        start_timeout_s: float = 300.0,
        timeout_s: float = 600.0,
    ) -> None:
        self.log, self.timeout_s = Path(log), timeout_s
        self.log.parent.mkdir(parents=True, exist_ok=True)
        command = [python, "-m", "megatron_dump.rollout.engine_main"]
        setup = {"factory": factory, "options": dict(options)}
        self._new = lambda: EngineChild(command, setup, self.log, _environment(python, env or {}), start_timeout_s)
        self._child = self._new()
        self._lives = [self._child]  # what the finalizer ends; it must not hold this handle
        self._finalize = weakref.finalize(self, _end_all, self._lives, os.getpid())  # at the interpreter's exit too

    @property
    def pid(self) -> int | None:
        """Of the child, which leads a session of its own; None before it is started."""
        return self._child.pid

    def generate(self, requests: Sequence[EngineRequest]) -> Future[list[list[EngineOutput]]]:
        arrays = frames.pack_requests(requests)
        return self._child.call({"call": "generate"}, arrays, frames.unpack_outputs, self.timeout_s)

    def load_weights(self, version: int, link: dict[str, Any]) -> Future[None]:
        return self._call("load_weights", version=version, link=link)

    def sleep(self) -> Future[None]:
        return self._call("sleep")

    def wake(self) -> Future[None]:
        return self._call("wake")

    def ping(self) -> Future[None]:
        """Done when everything asked for before is; EngineRefused when the engine cannot be had at all."""
        return self._call("ping")

    def alive(self) -> bool:
        return self._child.alive

    def restart(self) -> None:
        """Waits until the fresh engine is up. EngineDied or EngineRefused when it does not come up."""
        self._child.end("it is restarted")
        self._child = self._lives[0] = self._new()
        self.ping().result()

    def close(self) -> None:
        """End it: gently when it has nothing to do. Calls under way get EngineDied."""
        self._child.close()

    def _call(self, name: str, **arguments: Any) -> Future[None]:
        return self._child.call({"call": name, **arguments}, (), lambda _: None, self.timeout_s)


def _environment(python: str, extra: Mapping[str, str]) -> dict[str, str]:
    """This process's, without what says that it is a rank of a launcher's job."""
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
    env = {k: v for k, v in os.environ.items() if k not in launcher and not k.startswith("TORCHELASTIC_")}
    if python == sys.executable:  # the same packages, however this process came by them
        env["PYTHONPATH"] = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    return {**env, **extra}


def _end_all(lives: list[EngineChild], owner: int) -> None:
    if os.getpid() == owner:  # in a fork, they are the parent's
        for child in lives:
            child.end("its owner is gone")

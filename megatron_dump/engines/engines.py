"""What the trainer tells its generation engines between two steps."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from megatron_dump.distributed import fail_together
from megatron_dump.rollout.engine import EngineDied, EngineHandle
from megatron_dump.weight_sync.sync import WeightSync


class RunEngines:
    """This rank's engine or pool, if it drives one, and the way of the weights to all of them: protocols.Engines.

    handle: what this rank drives; synced: the same, or a pool's engines, as `sync` has them; drain: returns when
    everything asked for is answered; sleeps: the engines share devices with the training ranks and give their memory
    back while these train.
    """

    def __init__(
        self,
        handle: EngineHandle | None,
        synced: Sequence[Any],
        sync: WeightSync,
        drain: Callable[[], None],
        device: torch.device,
        sleeps: bool,
    ) -> None:
        self._handle, self._synced, self._sync, self._drain = handle, list(synced), sync, drain
        self._device, self._sleeps = device, sleeps
        self._asleep, self._version = False, 0

    def push(self, version: int) -> None:
        """All engines generate with the present weights, numbered `version`, from now on.

        What they were asked for before is answered first: weights wait for no longer than their own time limit.
        """
        if self._asleep:
            with self._together("wake"):
                if self._handle is not None:
                    with contextlib.suppress(EngineDied):  # the push below brings it back
                        self._handle.wake().result()
                    for engine in self._synced:
                        self._sync.invalidate(engine)
            self._asleep = False
        with self._together("generation"):
            self._drain()
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
        return fail_together(f"an engine's {what}", device=self._device)

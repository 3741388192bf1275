"""An Engine whose completions follow from seed and weights by arithmetic, and that fails as its prompts tell it to."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from megatron_dump.rollout.engine import EngineOutput, EngineRefused, EngineRequest

if TYPE_CHECKING:
    from torch import Tensor

DIE, HANG, RAISE, REFUSE, SLOW = -1, -2, -3, -4, -5  # first tokens of a prompt


class ScriptedEngine:
    """start: what its constructor does: "well", "refuse", "die" or "hang"; child: it starts a process of its own."""

    def __init__(self, start: str = "well", child: bool = False, marks: str | None = None) -> None:
        if start == "refuse":
            raise EngineRefused("start=refuse: not one of well; choose that")
        if start == "die":
            print("these are my last words", file=sys.stderr, flush=True)
            os._exit(3)
        if start == "hang":
            time.sleep(1000)
        self.child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"]) if child else None
        self.version, self.total, self.marks = 0, 0.0, marks

    def generate(self, requests: Sequence[EngineRequest]) -> list[list[EngineOutput]]:
        for request in requests:
            self._obey(int(request.prompt[0]))
        return [[self._output(request, seed) for seed in request.seeds] for request in requests]

    def load_weights(self, version: int, weights: Iterator[tuple[str, Tensor]]) -> None:
        self.total = sum(float(tensor.double().sum()) for _, tensor in weights)
        self.version = version

    def sleep(self) -> None:
        if self.child:
            raise RuntimeError(f"my child is {self.child.pid}")

    def wake(self) -> None:
        pass

    def close(self) -> None:
        if self.child:
            self.child.kill()

    def _obey(self, order: int) -> None:
        if order == DIE and (self.marks is None or not os.path.exists(self.marks)):
            if self.marks:  # die once
                open(self.marks, "w").close()
            print("these are my last words", file=sys.stderr, flush=True)
            os._exit(3)
        if order == HANG:
            time.sleep(1000)
        if order == RAISE:
            raise RuntimeError("told to raise")
        if order == REFUSE:
            raise EngineRefused("told to refuse")
        if order == SLOW:
            time.sleep(0.5)

    def _output(self, request: EngineRequest, seed: int) -> EngineOutput:
        rng = np.random.default_rng([seed, int(np.abs(request.prompt).sum()), int(1000 * abs(self.total))])
        n = int(rng.integers(1, 9))
        return EngineOutput(rng.integers(1, 60, n), rng.random(n, np.float32), bool(rng.random() < 0.5), self.version)

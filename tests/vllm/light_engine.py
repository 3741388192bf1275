"""Engines that need no model, for what is not about models."""

from __future__ import annotations

import time

from megatron_dump.rollout.engine import EngineOutput, EngineRefused
from tests.unit.toy_engine import complete


class LightEngine:
    """Completions are a function of prompt and seed."""

    def __init__(self, delay_s: float = 0.0) -> None:
        self.delay_s = delay_s

    def generate(self, requests):
        time.sleep(self.delay_s)
        return [[EngineOutput(*complete(r.prompt, seed, 0), 0) for seed in r.seeds] for r in requests]

    def close(self): ...


class Refusing:
    """An engine whose options do not do."""

    def __init__(self) -> None:
        raise EngineRefused("max_model_len=1: no")

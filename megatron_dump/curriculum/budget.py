"""How many rollouts each prompt of a step gets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from megatron_dump.curriculum.registry import resolve


class Budget(Protocol):
    def allot(self, prompt_ids: np.ndarray) -> np.ndarray:
        """int64 [P] rows of the data set -> int64 [P] group sizes."""
        ...


class Fixed:
    """The same group size for every prompt, as in GRPO (arXiv 2402.03300)."""

    def __init__(self, samples_per_prompt: int):
        self._samples_per_prompt = samples_per_prompt

    def allot(self, prompt_ids: np.ndarray) -> np.ndarray:
        return np.full(len(prompt_ids), self._samples_per_prompt, np.int64)


BUDGETS: dict[str, type] = {"fixed": Fixed}


def make_budget(config: Mapping[str, Any], samples_per_prompt: int) -> Budget:
    """The budget that `trainer.grpo.curriculum.budget` describes; ValueError for an unknown name or option."""
    budget, options = resolve("budget", BUDGETS, config)
    return budget(samples_per_prompt, **options)

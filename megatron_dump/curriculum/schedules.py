"""Source policies that follow the step alone."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np

from megatron_dump.curriculum.registry import ROOT, check_number
from megatron_dump.curriculum.source_policy import IndependentSlots, SourceSetting, check_choice, softmax


class EasyToHard(IndependentSlots):
    """E2H (arXiv 2506.06632): from the easiest source to the hardest over `total_steps`, whatever the model learns.

    Levels k = 0..K-1 in `order`, t steps of T = total_steps; after T it stays at the end. The paper's schedules are

    cosine (E2H-C)     S(t, k) = a (K - k - 1) + (1 - a) k, with a = (1 + cos(pi t / T)) / 2
    gaussian (E2H-G)   S(t, k) = exp(-(x - k)^2 / (2 sigma^2)), with x = (t / T)^exponent (K - 1)

    each normalised to q over k; the paper calls the exponent beta, and has no floor. The authors' public code adds
    one, which is the default here: p = p_min + (1 - K p_min) q, p_min = 2 / (K (K + 1)). That form is theirs for the
    Gaussian; for the cosine they write a (K - k) + (1 - a) (k + 1), normalised, which is the same number.
    `p_min: 0` is the paper. The paper tunes (exponent, sigma) per task: (0.5, 0.5) and (0.25, 0.75) are two of its
    choices.
    """

    def __init__(
        self,
        setting: SourceSetting,
        *,
        kind: str = "gaussian",
        order: Sequence[str] | None = None,  # names, easiest first; None: sorted, numbers by value (2 before 10)
        total_steps: int | None = None,  # None: trainer.grpo.max_steps
        exponent: float = 0.5,  # of the Gaussian; below 1: fast at first
        sigma: float = 0.5,  # of the Gaussian, in levels
        p_min: float | None = None,  # smallest weight of a source; None: 2 / (K (K + 1))
    ):
        super().__init__(setting)
        check_choice("sources.kind", kind, ("gaussian", "cosine"))
        check_number("sources.exponent", exponent, 0)
        check_number("sources.sigma", sigma, 1e-6)
        if p_min is not None:
            check_number("sources.p_min", p_min, 0, 1 / self.n_sources)
        if total_steps is None and setting.max_steps is None:
            raise ValueError(
                f"{ROOT}.sources.total_steps: None, and trainer.grpo.max_steps is not known; set either of them"
            )
        total_steps = setting.max_steps if total_steps is None else total_steps
        check_number("sources.total_steps", total_steps, 1, whole=True)
        assert total_steps is not None  # one of the two is there
        self._kind, self._total_steps, self._exponent, self._sigma = kind, total_steps, exponent, sigma
        self._p_min = 2 / (self.n_sources * (self.n_sources + 1)) if p_min is None else p_min
        self._level = _levels(setting.names, order).astype(np.float64)  # [K]: 0 for the easiest

    def weights(self, step: int) -> np.ndarray:
        progress = min(step, self._total_steps) / self._total_steps
        share = self._cosine(progress) if self._kind == "cosine" else self._gaussian(progress)
        return self._p_min + (1.0 - self.n_sources * self._p_min) * share

    def _cosine(self, progress: float) -> np.ndarray:
        last = self.n_sources - 1
        if last == 0:
            return np.ones(1)
        early = 0.5 * (1.0 + math.cos(math.pi * progress))
        shares = early * (last - self._level) + (1.0 - early) * self._level
        return shares / shares.sum()

    def _gaussian(self, progress: float) -> np.ndarray:
        position = progress**self._exponent * (self.n_sources - 1)
        return softmax(-((self._level - position) ** 2) / (2.0 * self._sigma**2), 1.0)

    def metrics(self) -> dict[str, np.ndarray]:
        return {"level": self._level.copy()}


def _levels(names: Sequence[str], order: Sequence[str] | None) -> np.ndarray:
    """int64 [K]: the position of every name in `order`."""
    if order is None:
        order = sorted(names, key=_by_number)
    elif isinstance(order, str) or sorted(map(str, order)) != sorted(names):
        raise ValueError(f"{ROOT}.sources.order: {order!r} must hold each of {list(names)} once, the easiest first")
    position = {str(name): level for level, name in enumerate(order)}
    return np.array([position[name] for name in names], np.int64)


def _by_number(name: str) -> list[str | int]:
    """A sort key: text, number, text, ..., so that `people 2` is before `people 10`."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name))]

"""Which distribution the next prompts come from: the policies by name, and those that need no learning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from megatron_dump.curriculum import streams
from megatron_dump.curriculum.bandits import SEC, DumpUCB
from megatron_dump.curriculum.own import is_own
from megatron_dump.curriculum.registry import ROOT, Named, check_number
from megatron_dump.curriculum.robust import DumpUCBRobust
from megatron_dump.curriculum.schedules import EasyToHard
from megatron_dump.curriculum.source_policy import IndependentSlots, SourcePolicy, SourceSetting, softmax

__all__ = ["SOURCES", "SourcePolicy", "SourceSetting", "make_source_policy"]


class Uniform(IndependentSlots):
    """Every source equally likely, whatever its size; slots are independent draws."""

    def weights(self, step: int) -> np.ndarray:
        return np.full(self.n_sources, 1.0 / self.n_sources)


class Proportional(IndependentSlots):
    """Weights in proportion to size^(1/temperature): 1 follows the sizes, larger is flatter, infinitely large uniform.

    At temperature 1 it is the pooled shuffle: one permutation of all rows per epoch, seen as the sequence of its rows'
    sources. Which row of the source fills a slot is the prompt policy's choice; with `epoch` the two together are
    exactly a uniform permutation of the pooled rows (an order of sources times an order inside each source). At other
    temperatures slots are independent draws.
    """

    def __init__(self, setting: SourceSetting, *, temperature: float = 1.0):
        check_number("sources.temperature", temperature, 1e-6)
        super().__init__(setting)
        sizes = np.array(setting.sizes, np.int64)
        self._pooled, self._rows = temperature == 1.0, int(sizes.sum())
        self._weights = sizes / sizes.sum() if self._pooled else softmax(np.log(sizes), temperature)
        sources = np.arange(sizes.size, dtype=np.int32)
        self._pool = np.repeat(sources, sizes if self._pooled else 0)  # int32 [rows]: their sources
        self._orders: dict[tuple[int, int], np.ndarray] = {}  # (seed, epoch) -> int32 [rows], the last two

    def weights(self, step: int) -> np.ndarray:
        return self._weights.copy()

    def slots(self, step: int, consumed: int, n: int, seed: int) -> np.ndarray:
        if not self._pooled:
            return super().slots(step, consumed, n, seed)
        first, last = consumed // self._rows, (consumed + n - 1) // self._rows
        parts = []
        for epoch in range(first, last + 1):
            start = max(consumed - epoch * self._rows, 0)
            stop = min(consumed + n - epoch * self._rows, self._rows)
            parts.append(self._order(seed, epoch)[start:stop])
        return np.concatenate(parts).astype(np.int64)

    def _order(self, seed: int, epoch: int) -> np.ndarray:
        """The epoch's sources, row by row; kept, because sorting a million rows every step would be slow."""
        if (seed, epoch) not in self._orders:
            if len(self._orders) > 1:
                del self._orders[next(iter(self._orders))]
            self._orders[seed, epoch] = self._pool[streams.permutation(self._rows, seed, "pool", epoch)]
        return self._orders[seed, epoch]


class Static(IndependentSlots):
    """Fixed weights, one for every source by name, in any unit: {easy: 3, hard: 1} draws `easy` three times in four."""

    def __init__(self, setting: SourceSetting, *, weights: Mapping[str, float] | None = None):
        super().__init__(setting)
        if not isinstance(weights, Mapping):
            raise ValueError(f"{ROOT}.sources.weights: {weights!r} must give every source a weight, as in {{name: 1}}")
        weights = {str(name): weight for name, weight in weights.items()}  # YAML reads a name like 3 as a number
        if missing := [name for name in setting.names if name not in weights]:
            raise ValueError(f"{ROOT}.sources.weights: {weights!r} has no weight for {missing}; add 0 or more")
        if unknown := sorted(set(weights) - set(setting.names)):
            raise ValueError(f"{ROOT}.sources.weights: {weights!r} names {unknown}, not in {list(setting.names)}")
        for name in setting.names:
            check_number(f"sources.weights.{name}", weights[name], 0)
        values = np.array([weights[name] for name in setting.names], np.float64)
        if values.max() == 0:
            raise ValueError(f"{ROOT}.sources.weights: {weights!r} are all 0; make one of them larger")
        values = np.ldexp(values, -np.frexp(values.max())[1])  # by a power of two, or the sum could overflow
        self._weights = values / values.sum()

    def weights(self, step: int) -> np.ndarray:
        return self._weights.copy()


SOURCES = Named(
    "sources",
    {
        "uniform": Uniform,
        "proportional": Proportional,
        "static": Static,
        "easy_to_hard": EasyToHard,
        "sec": SEC,
        "dump_ucb": DumpUCB,
        "dump_ucb_robust": DumpUCBRobust,
    },
    SourcePolicy,
)


def make_source_policy(config: Mapping[str, Any], setting: SourceSetting) -> SourcePolicy:
    """The policy that `trainer.grpo.curriculum.sources` describes.

    Raises ValueError for an unknown name or option, and for a value out of range.
    """
    policy: SourcePolicy = SOURCES.make(config, setting)
    for name, array in policy.state_dict().items() if is_own(str(config["name"])) else ():
        if np.shape(array)[:1] != (len(setting.names),):
            shape = f"state_dict has {name!r} of shape {list(np.shape(array))}"
            raise ValueError(f"{ROOT}.sources.name: {config['name']!r}: {shape}; make it a row for each source")
    return policy

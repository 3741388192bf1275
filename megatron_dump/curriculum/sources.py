"""Which distribution the next prompts come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from megatron_dump.curriculum import streams
from megatron_dump.curriculum.estimators import LearnabilityEstimator
from megatron_dump.curriculum.registry import check_number, resolve
from megatron_dump.types import Outcomes


class SourcePolicy(Protocol):
    """K sources in sorted order, P slots a step. State changes in `observe` and `load_state_dict` only."""

    def weights(self, step: int) -> np.ndarray:
        """float64 [K], finite, sums to 1: each source's share of the slots drawn at `step`, in expectation."""
        ...

    def slots(self, step: int, consumed: int, n: int, seed: int) -> np.ndarray:
        """int64 [n]: the source of every slot of `step`; `consumed` prompts were drawn in all steps before."""
        ...

    def observe(self, outcomes: Outcomes) -> None:
        """Learn from one step's training rollouts."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def metrics(self) -> dict[str, np.ndarray]:
        """Name -> [K]: what the weights of the next draw are made of."""
        ...


class Uniform:
    """Every source equally likely, whatever its size; slots are independent draws."""

    def __init__(self, sizes: Sequence[int]):
        self._n_sources = len(sizes)

    def weights(self, step: int) -> np.ndarray:
        return np.full(self._n_sources, 1.0 / self._n_sources)

    def slots(self, step: int, consumed: int, n: int, seed: int) -> np.ndarray:
        return streams.categorical(self.weights(step), n, seed, "slots", step)

    def observe(self, outcomes: Outcomes) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass

    def metrics(self) -> dict[str, np.ndarray]:
        return {}


class Proportional(Uniform):
    """The pooled shuffle: one permutation of all rows per epoch, seen as the sequence of its rows' sources.

    Which row of the source fills a slot is the prompt policy's choice; with `epoch` the two together are exactly a
    uniform permutation of the pooled rows (an order of sources times an order inside each source).
    """

    def __init__(self, sizes: Sequence[int]):
        super().__init__(sizes)
        self._pool = np.repeat(np.arange(len(sizes), dtype=np.int64), sizes)  # [rows]: the source of every row

    def weights(self, step: int) -> np.ndarray:
        return np.bincount(self._pool, minlength=self._n_sources) / self._pool.size

    def slots(self, step: int, consumed: int, n: int, seed: int) -> np.ndarray:
        rows = self._pool.size
        first, last = consumed // rows, (consumed + n - 1) // rows
        epochs = [self._pool[streams.permutation(rows, seed, "pool", epoch)] for epoch in range(first, last + 1)]
        start = consumed - first * rows
        return np.concatenate(epochs)[start : start + n]


class DumpUCB(Uniform):
    """DUMP (arXiv 2504.09710, Algorithm 1): softmax over upper confidence bounds of the sources' learnability.

    UCB_d = L_d + exploration * sqrt(2 ln(n_total + 1) / (n_d + 1)); the paper has exploration = 1, window = 300
    rollouts and temperature = 0.1. `floor` (0 in the paper) mixes in that much of the uniform distribution.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        window: int = 300,
        exploration: float = 1.0,
        temperature: float = 0.1,
        floor: float = 0.0,
    ):
        check_number("sources.window", window, 1, whole=True)
        check_number("sources.exploration", exploration, 0)
        check_number("sources.temperature", temperature, 1e-6)
        check_number("sources.floor", floor, 0, 1)
        super().__init__(sizes)
        self._exploration, self._temperature, self._floor = exploration, temperature, floor
        self._estimator = LearnabilityEstimator(len(sizes), window)

    def _bonus(self) -> np.ndarray:
        n = self._estimator.n_rollouts
        return self._exploration * np.sqrt(2.0 * np.log(n.sum() + 1.0) / (n + 1.0))

    def weights(self, step: int) -> np.ndarray:
        ucb = self._estimator.mean() + self._bonus()
        with np.errstate(over="ignore"):  # an absurd |A| gives -inf here, and so weight 0 to the other sources
            scaled = np.exp((ucb - ucb.max()) / self._temperature)  # subtract first: no exponent is above 0
        return (1.0 - self._floor) * scaled / scaled.sum() + self._floor / self._n_sources

    def observe(self, outcomes: Outcomes) -> None:
        self._estimator.observe(outcomes.source_ids, outcomes.advantages)

    def state_dict(self) -> dict[str, Any]:
        return self._estimator.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._estimator.load_state_dict(state)

    def metrics(self) -> dict[str, np.ndarray]:
        mean, bonus = self._estimator.mean(), self._bonus()
        return {"ucb": mean + bonus, "mean_abs_adv": mean, "bonus": bonus, "n_dropped": self._estimator.n_dropped}


SOURCE_POLICIES: dict[str, type] = {"uniform": Uniform, "proportional": Proportional, "dump_ucb": DumpUCB}


def make_source_policy(config: Mapping[str, Any], sizes: Sequence[int]) -> SourcePolicy:
    """The policy that `trainer.grpo.curriculum.sources` describes, for sources of `sizes` rows (sorted by name).

    Raises ValueError for an unknown name or option, and for a value out of range.
    """
    policy, options = resolve("sources", SOURCE_POLICIES, config)
    return policy(sizes, **options)

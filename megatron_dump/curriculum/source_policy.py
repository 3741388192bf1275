"""What a source policy is, and what most of them share."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, Protocol

import numpy as np

from megatron_dump.curriculum import streams
from megatron_dump.curriculum.registry import ROOT
from megatron_dump.types import Outcomes


@dataclasses.dataclass(frozen=True)
class SourceSetting:
    """What every source policy is told about the run. K sources in sorted order."""

    names: tuple[str, ...]  # [K], sorted
    sizes: tuple[int, ...]  # [K], rows of each
    max_steps: int | None = None  # trainer.grpo.max_steps; None: not known


class SourcePolicy(Protocol):
    """K sources in sorted order. Made as Policy(setting, **options).

    State changes in `drawn`, `observe` and `load_state_dict` only. A step goes weights, slots, drawn, (generation),
    observe. Each of drawn and observe may come several times a step, and outcomes may come after those of later steps.
    """

    def weights(self, step: int) -> np.ndarray:
        """float64 [K], finite, sums to 1: each source's share of the slots drawn at `step`, in expectation."""
        ...

    def slots(self, step: int, consumed: int, n: int, seed: int) -> np.ndarray:
        """int64 [n]: the source of every slot of `step`; `consumed` prompts were drawn in all steps before."""
        ...

    def drawn(self, source_ids: np.ndarray, rollouts: np.ndarray) -> None:
        """Count prompts that were drawn (int64 [P]: their sources, their numbers of rollouts) before they are answered.

        Also for refills and pre-rollouts. A source whose long answers are still on their way is thus not taken for an
        unexplored one.
        """
        ...

    def observe(self, outcomes: Outcomes) -> None:
        """Learn from whole groups of one step, any subset of them; those that a filter rejected too."""
        ...

    def state_dict(self) -> dict[str, np.ndarray]:
        """Arrays [K, ...]: row k is source k's, so that a changed list of sources can be mapped by name."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict` (or the lists it becomes in JSON), alike to the last bit."""
        ...

    def metrics(self) -> dict[str, np.ndarray]:
        """Name -> float64 [K]: what the weights of the next draw are made of."""
        ...


class IndependentSlots(abc.ABC):
    """Base of the policies: slots are independent draws from the weights; nothing is counted, learned or saved."""

    def __init__(self, setting: SourceSetting):
        self.n_sources = len(setting.names)

    @abc.abstractmethod
    def weights(self, step: int) -> np.ndarray: ...

    def slots(self, step: int, consumed: int, n: int, seed: int) -> np.ndarray:
        return streams.categorical(self.weights(step), n, seed, "slots", step)

    def drawn(self, source_ids: np.ndarray, rollouts: np.ndarray) -> None:  # noqa: B027 - what counts overrides it
        pass

    def observe(self, outcomes: Outcomes) -> None:  # noqa: B027 - what learns overrides it
        pass

    def state_dict(self) -> dict[str, np.ndarray]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027 - what learns overrides it
        pass

    def metrics(self) -> dict[str, np.ndarray]:
        return {}


def softmax(scores: np.ndarray, temperature: float) -> np.ndarray:
    """float64 [K]: exp(scores / temperature), normalised; finite for all finite scores."""
    with np.errstate(over="ignore"):  # a distance of -inf is right: that weight is 0
        scaled = np.exp((scores - scores.max()) / temperature)  # subtract first: no exponent is above 0
    return scaled / scaled.sum()


def check_choice(key: str, value: Any, known: Collection[str]) -> None:
    """Raise ValueError naming `key` unless `value` is one of `known`."""
    if value not in known:
        raise ValueError(f"{ROOT}.{key}: {value!r} is unknown; known: {', '.join(sorted(known))}")

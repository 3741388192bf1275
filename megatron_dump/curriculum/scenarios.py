"""The worlds that simulated learners live in; `simulator` says what the numbers mean."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Scenario:
    """A world to learn in. Sources are in name order; neighbours in that order share skill."""

    name: str
    about: str  # one line for reports
    names: tuple[str, ...]  # [K], sorted
    sizes: tuple[int, ...]  # [K] rows
    difficulties: tuple[float, ...]  # [K] logits: the median prompt's pass rate starts at sigmoid(-difficulty)
    spread: float = 1.0  # standard deviation of prompt difficulty inside a source, logits
    transfer: float = 0.0  # share of a source's learning that each neighbour gets as well
    noise: float = 0.0  # probability that the verifier's verdict on a rollout is wrong
    broken: tuple[str, ...] = ()  # sources whose verifier scores every answer 0 and unreadable
    unsolvable: tuple[str, ...] = ()  # sources that no answer solves, ever
    learning_rate: float = 2.0  # logits for a batch that is all one source and teaches 1 a rollout
    steps: int = 150  # the budget is that of `steps` full batches
    prompts_per_step: int = 32
    samples_per_prompt: int = 16
    target: float = 0.6  # mean true pass rate over `counted` to be reached; above 1: none to reach

    def __post_init__(self) -> None:
        if list(self.names) != sorted(set(self.names)):
            raise ValueError(f"scenario {self.name}: names must be sorted and differ, not {self.names}")
        for field in ("sizes", "difficulties"):
            if len(getattr(self, field)) != len(self.names):
                raise ValueError(f"scenario {self.name}: {field} must have one entry for each of the names")
        if unknown := sorted({*self.broken, *self.unsolvable} - set(self.names)):
            raise ValueError(f"scenario {self.name}: {unknown[0]!r} in broken or unsolvable is none of its sources")

    @property
    def counted(self) -> np.ndarray:
        """bool [K]: sources that can be learned from their own rewards; success is measured on these."""
        return np.array([n not in self.broken and n not in self.unsolvable for n in self.names], bool)

    @property
    def batch(self) -> int:
        """Rollouts of a step without refills and pre-rollouts."""
        return self.prompts_per_step * self.samples_per_prompt


def _levels(n: int, first: int = 1) -> tuple[str, ...]:
    """Names whose order is that of their numbers."""
    return tuple(f"level_{i:0{len(str(first + n - 1))}d}" for i in range(first, first + n))


def _rising(low: float, high: float, n: int) -> tuple[float, ...]:
    return tuple(np.linspace(low, high, n).tolist())


def _world(name: str, about: str, difficulties: tuple[float, ...], **changes: Any) -> Scenario:
    """300 rows a source, neighbours that help each other, unless `changes` says otherwise."""
    n = len(difficulties)
    return Scenario(
        name,
        about,
        **{
            "names": _levels(n),
            "sizes": (300,) * n,
            "difficulties": difficulties,
            "transfer": 0.3,
            **changes,
        },
    )


SCENARIOS: dict[str, Scenario] = {
    scenario.name: scenario
    for scenario in (
        _world(
            "ladder",
            "12 sources of rising difficulty, like puzzles with 3 to 14 people",
            _rising(-1.0, 5.0, 12),
            names=_levels(12, 3),
            learning_rate=1.2,
            target=0.7,
        ),
        _world(
            "two",
            "an easy and a hard source, no transfer",
            (-0.5, 2.5),
            transfer=0.0,
            learning_rate=0.25,
            target=0.8,
        ),
        _world(
            "twins",
            "12 alike sources, mean pass rate 1/2, that never change: any uneven weight is noise",
            (0.0,) * 12,
            sizes=(3000,) * 12,
            spread=2.0,
            transfer=0.0,
            learning_rate=0.0,
            steps=60,
            target=2.0,
        ),
        _world(
            "broken_verifier",
            "8 rising sources; an easy and a medium one always score 0",
            _rising(-1.0, 4.0, 8),
            broken=("level_2", "level_5"),
            learning_rate=0.8,
            target=0.75,
        ),
        _world(
            "unsolvable",
            "8 rising sources; two that no answer solves",
            _rising(-1.0, 4.0, 8),
            unsolvable=("level_4", "level_8"),
            learning_rate=0.6,
            target=0.75,
        ),
        _world(
            "solved_soon",
            "4 sources solved at 93 % from the start, 4 to learn",
            (-3.5, -3.3, -3.2, -3.0, 0.5, 1.5, 2.5, 3.5),
            transfer=0.1,
            learning_rate=0.7,
            target=0.85,
        ),
        _world(
            "late_bloomer",
            "5 easier sources and one that only transfer makes learnable",
            (-1.0, 0.0, 1.0, 2.0, 3.0, 6.0),
            transfer=0.5,
            learning_rate=1.0,
            target=0.9,
        ),
        _world(
            "noisy",
            "8 rising sources; the verifier errs on one rollout in ten",
            _rising(-1.0, 4.0, 8),
            noise=0.1,
            learning_rate=0.8,
            target=0.7,
        ),
        _world(
            "unequal",
            "6 rising sources of 1,600 to 50 rows, the hardest the smallest",
            _rising(-1.5, 3.5, 6),
            sizes=(1600, 800, 400, 200, 100, 50),
            learning_rate=0.4,
            target=0.75,
        ),
        _world(
            "thousand",
            "1,000 rising sources of 60 rows, 1,024 prompts a step",
            _rising(-2.0, 5.0, 1000),
            sizes=(60,) * 1000,
            learning_rate=200.0,
            steps=40,
            prompts_per_step=1024,
            target=0.7,
        ),
    )
}

"""Where completions come from: Megatron's own weights, or a recording."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

from megatron_dump.types import Completion, Prompt


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt and which completions of its group it gets here: samples first .. first + n - 1."""

    group_id: int  # as in the step's Draws
    prompt: Prompt
    n: int
    first: int = 0

    @property
    def samples(self) -> range:
        return range(self.first, self.first + self.n)


class Generator(Protocol):
    """Samples completions; all ranks of one model replica call it with the same requests."""

    def generate(self, step: int, requests: Sequence[Request]) -> list[Completion]:
        """Completions in the order of `requests`, the `samples` of each.

        What is sampled depends on (seed, step, group_id, sample) and the weights, not on how requests are split over
        ranks or batches.
        """
        ...


class Pending(Protocol):
    """Completions that are on their way."""

    def result(self) -> list[Completion]:
        """Waits for them. A collective of the replica's ranks: all ask for results in the same order."""
        ...


class AsyncGenerator(Generator, Protocol):
    """Generates while its caller does something else."""

    def submit(self, step: int, requests: Sequence[Request]) -> Pending:
        """Begin `generate`; its completions carry the version of the weights they began with."""
        ...

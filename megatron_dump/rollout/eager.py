"""Generators that work in the training processes, seen as asynchronous ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from megatron_dump.rollout import Generator, Request
from megatron_dump.types import Completion


@dataclasses.dataclass(frozen=True)
class Ready:
    """Completions that are there."""

    completions: list[Completion]

    def result(self) -> list[Completion]:
        return self.completions


@dataclasses.dataclass(frozen=True)
class Eager:
    """An AsyncGenerator that generates at once, while its caller waits."""

    generator: Generator

    def submit(self, step: int, requests: Sequence[Request]) -> Ready:
        return Ready(self.generate(step, requests))

    def generate(self, step: int, requests: Sequence[Request]) -> list[Completion]:
        return self.generator.generate(step, requests)


class NoEngines:
    """Where generators share the training weights: there is nothing to do."""

    def push(self, version: int) -> None: ...

    def rest(self) -> None: ...

    def close(self) -> None: ...

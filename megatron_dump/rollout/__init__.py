"""Where completions come from: Megatron's own weights, or a recording."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

from megatron_dump.types import Completion, Prompt


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt and how many completions it gets."""

    group_id: int  # position in the step's Draw
    prompt: Prompt
    n: int


class Generator(Protocol):
    """Samples completions; all ranks of one model replica call it with the same requests."""

    def generate(self, step: int, requests: Sequence[Request]) -> list[Completion]:
        """Completions in the order of `requests`, samples 0..n-1 of each.

        What is sampled depends on (seed, step, group_id, sample) and the weights, not on how requests are split over
        ranks or batches.
        """
        ...

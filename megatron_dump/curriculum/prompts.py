"""Which prompts inside the chosen source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from megatron_dump.curriculum import streams
from megatron_dump.curriculum.registry import resolve


class PromptPolicy(Protocol):
    """Turns the sources of a step's slots into rows."""

    def draw(self, source_ids: np.ndarray) -> np.ndarray:
        """int64 [P] sources of the slots -> int64 [P] rows of the data set. Advances the state."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Epoch:
    """Without replacement inside each source: one permutation per (seed, source name, epoch).

    No source's permutation depends on the others. Within a step no row comes twice unless the source has fewer rows
    than slots: where a step runs over the end of an epoch, the new epoch's permutation puts off the rows that the step
    has already used.
    """

    def __init__(self, names: Sequence[str], rows: Sequence[np.ndarray], seed: int):
        """names [K], rows [K] x int64 [rows of the source], in the data set's order."""
        self._rows = dict(zip(names, rows, strict=True))
        self._seed = seed
        self._consumed = dict.fromkeys(names, 0)  # rows ever drawn from the source
        # (ahead, used) of the current epoch, if it began in mid-step: that step had drawn the rows `used` (local
        # indices) before, so the epoch opens with `ahead` other rows.
        self._border: dict[str, tuple[int, list[int]]] = {}

    def draw(self, source_ids: np.ndarray) -> np.ndarray:
        prompt_ids = np.empty(len(source_ids), np.int64)
        for source, (name, rows) in enumerate(self._rows.items()):
            mine = np.flatnonzero(source_ids == source)
            if mine.size:
                prompt_ids[mine] = rows[self._take(name, mine.size)]
        return prompt_ids

    def _take(self, name: str, n: int) -> np.ndarray:
        """int64 [n]: the next local indices of one source."""
        size = len(self._rows[name])
        taken = np.empty(0, np.int64)
        while (missing := n - taken.size) > 0:
            epoch, position = divmod(self._consumed[name], size)
            if position == 0:
                used = taken[taken.size // size * size :]  # of the pass over the source this step is in
                self._border[name] = (min(missing, size - used.size), used.tolist())
            new = self._order(name, epoch)[position : position + missing]
            self._consumed[name] += new.size
            taken = np.concatenate([taken, new])
        return taken

    def _order(self, name: str, epoch: int) -> np.ndarray:
        """int64 [rows of the source]: the epoch's permutation, with the rows of its border step put off."""
        order = streams.permutation(len(self._rows[name]), self._seed, "prompts", name, epoch)
        ahead, used = self._border.get(name, (0, []))
        if not used:
            return order
        first = order[~np.isin(order, used)][:ahead]
        return np.concatenate([first, order[~np.isin(order, first)]])

    def state_dict(self) -> dict[str, Any]:
        border = {name: [ahead, used] for name, (ahead, used) in self._border.items() if used}
        return {"consumed": dict(self._consumed), "border": border}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._consumed = {name: int(state["consumed"][name]) for name in self._rows}
        self._border = {name: (ahead, used) for name, (ahead, used) in state["border"].items()}


PROMPT_POLICIES: dict[str, type] = {"epoch": Epoch}


def make_prompt_policy(
    config: Mapping[str, Any], names: Sequence[str], rows: Sequence[np.ndarray], seed: int
) -> PromptPolicy:
    """The policy that `trainer.grpo.curriculum.prompts` describes; ValueError for an unknown name or option."""
    policy, options = resolve("prompts", PROMPT_POLICIES, config)
    return policy(names, rows, seed, **options)

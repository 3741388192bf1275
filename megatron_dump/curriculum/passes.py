"""Passes over each source's rows, without replacement."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from megatron_dump.curriculum import streams
from megatron_dump.curriculum.rows import SourceRows


class Passes:
    """One permutation of a source's rows per (seed, source name, epoch), taken row by row; R rows, K sources.

    No source's permutation depends on the others. Within a step no row comes twice unless the source has fewer rows
    than slots: where a step runs over the end of an epoch, the new epoch's permutation puts off the rows that the step
    has already used. A later round of the step goes on as if the step had been larger.
    """

    def __init__(self, rows: SourceRows, seed: int):
        self._rows, self._seed = rows, seed
        self._consumed = np.zeros(len(rows.names), np.int64)  # rows ever taken from the source
        self.taken = np.zeros(len(rows.names), np.int64)  # of them, in the step of now
        # source -> (ahead, used) of its current epoch, if that began in mid-step: the step had taken the rows `used`
        # before, so the epoch opens with `ahead` other rows.
        self._border: dict[int, tuple[int, np.ndarray]] = {}
        self._order = np.empty(len(rows), np.int64)  # each source's rows in the current epoch's order
        self._epoch = np.empty(len(rows.names), np.int64)  # which epoch that is
        self._lay_out_all()

    def take(self, source_ids: np.ndarray, continued: bool) -> np.ndarray:
        """int64 [P] sources of the slots -> int64 [P] rows; `continued`: the step of the call before goes on."""
        if not continued:
            self.taken[:] = 0
        slots = np.argsort(source_ids, kind="stable")
        counts = np.bincount(source_ids, minlength=len(self._consumed))
        drawn = np.flatnonzero(counts)
        n, sizes = counts[drawn], self._rows.sizes[drawn]
        epoch, position = np.divmod(self._consumed[drawn], sizes)
        # a source whose epoch ends or began in this step is rare and taken by itself; the others all at once
        plain = (position + n <= sizes) & (self._epoch[drawn] == epoch) & (position >= self.taken[drawn])
        by_source = source_ids[slots]
        first = np.cumsum(n) - n
        places = np.repeat(self._rows.starts[drawn] + position - first, n) + np.arange(len(slots))
        rows = self._order[np.minimum(places, len(self._order) - 1)]
        self._consumed[drawn[plain]] += n[plain]
        self.taken[drawn[plain]] += n[plain]
        for i in np.flatnonzero(~plain):
            rows[first[i] : first[i] + n[i]] = self._take_one(int(by_source[first[i]]), int(n[i]))
        prompt_ids = np.empty(len(slots), np.int64)
        prompt_ids[slots] = rows
        return prompt_ids

    def _take_one(self, source: int, n: int) -> np.ndarray:
        start, size = int(self._rows.starts[source]), int(self._rows.sizes[source])
        parts = []
        while n > 0:
            epoch, position = divmod(int(self._consumed[source]), size)
            in_step = int(self.taken[source])
            if position == 0 and epoch > 0:
                used = self._order[start + size - in_step % size : start + size].copy()  # of this pass over the source
                self._border.pop(source, None)
                if used.size:
                    self._border[source] = (min(n, size - used.size), used)
                self._lay_out(source, epoch)
            elif position < in_step and source in self._border:  # the epoch began in an earlier round of this step
                used = self._border[source][1]
                self._border[source] = (min(position + n, size - used.size), used)
                self._lay_out(source, epoch)
            part = self._order[start + position : start + min(position + n, size)].copy()
            self._consumed[source] += part.size
            self.taken[source] += part.size
            parts.append(part)
            n -= part.size
        return np.concatenate(parts)

    def _lay_out(self, source: int, epoch: int) -> None:
        """The epoch's permutation, with the rows of its border step put off."""
        rows = self._rows.rows(source)
        order = streams.permutation(len(rows), self._seed, "prompts", self._rows.names[source], epoch)
        if source in self._border:
            ahead, used = self._border[source]
            fresh = np.ones(len(rows), bool)
            fresh[self._rows.local[used]] = False
            first = np.flatnonzero(fresh[order])[:ahead]
            order = np.concatenate([order[first], np.delete(order, first)])
        start = self._rows.starts[source]
        self._order[start : start + len(rows)], self._epoch[source] = rows[order], epoch

    def _lay_out_all(self) -> None:
        # the epoch of the row taken last: at an epoch's very end the next one's border is not known yet
        for source, epoch in enumerate((np.maximum(self._consumed - 1, 0) // self._rows.sizes).tolist()):
            self._lay_out(source, epoch)

    def state_dict(self) -> dict[str, np.ndarray]:
        """Per source [K] rows consumed and taken in this step, and its border: `ahead`, and how many rows of `used`."""
        none = (0, np.empty(0, np.int64))
        borders = [self._border.get(source, none) for source in range(len(self._consumed))]
        return {
            "consumed": self._consumed.copy(),
            "taken": self.taken.copy(),
            "ahead": np.array([ahead for ahead, _ in borders], np.int64),
            "n_used": np.array([used.size for _, used in borders], np.int64),
            "used": np.concatenate([used for _, used in borders]),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict` (or the lists it becomes in JSON)."""
        consumed, taken, ahead, n_used, used = (
            np.array(state[name], np.int64) for name in ("consumed", "taken", "ahead", "n_used", "used")
        )
        self._consumed, self.taken = consumed, taken
        parts = np.split(used, np.cumsum(n_used)[:-1])
        self._border = {k: (int(ahead[k]), part) for k, part in enumerate(parts) if part.size}
        self._lay_out_all()

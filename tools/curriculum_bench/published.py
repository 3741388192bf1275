"""The published curriculum sampler's way of working, written anew from its description, to be timed.

Everything is a Python list: the data set is visited twice at start-up, each slot of a batch recomputes all weights from
deques of the last 300 |A|, then picks a source and, with replacement, an item of it.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Sequence

import numpy as np

WINDOW, TEMPERATURE = 300, 0.1


class Items:
    """A data set of which an item is a dict; nothing is tokenised, which the published one does at each visit."""

    def __init__(self, source_names: Sequence[str]):
        self._names = source_names

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, i: int) -> dict[str, str]:
        return {"data_source": self._names[i], "prompt": ""}


class PublishedSampler:
    def __init__(self, items: Items, seed: int):
        self.sources = sorted({items[i]["data_source"] for i in range(len(items))})
        self._items: dict[str, list[int]] = {source: [] for source in self.sources}
        for i in range(len(items)):
            self._items[items[i]["data_source"]].append(i)
        self._windows: dict[str, deque[float]] = {source: deque(maxlen=WINDOW) for source in self.sources}
        self._counts = dict.fromkeys(self.sources, 0)
        self._random = random.Random(seed)

    def weights(self) -> list[float]:
        """[K]: softmax of mean |A| + sqrt(2 ln(n_total + 1) / (n_d + 1))."""
        total = sum(self._counts.values())
        bounds = []
        for source in self.sources:
            window = self._windows[source]
            mean = sum(window) / len(window) if window else 0.0
            bounds.append(mean + math.sqrt(2.0 * math.log(total + 1) / (self._counts[source] + 1)))
        most = max(bounds)
        scaled = [math.exp((bound - most) / TEMPERATURE) for bound in bounds]
        norm = sum(scaled)
        return [value / norm for value in scaled]

    def draw(self, n_prompts: int) -> list[tuple[str, int]]:
        """[P] (source, row)."""
        batch = []
        for _ in range(n_prompts):
            source = self._random.choices(self.sources, self.weights())[0]
            batch.append((source, self._random.choice(self._items[source])))
        return batch

    def observe(self, sources: Sequence[str], advantages: Sequence[float]) -> None:
        """One rollout after the other."""
        for source, advantage in zip(sources, advantages, strict=True):
            self._windows[source].append(abs(advantage))
            self._counts[source] += 1

    def fill_windows(self) -> None:
        """As after many steps, so that the time measured is that of a long run."""
        for source, window in self._windows.items():
            window.extend(np.full(WINDOW, 0.5).tolist())
            self._counts[source] = WINDOW

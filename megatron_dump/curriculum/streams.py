"""Randomness as a function of a key: nothing to save, and any process can recompute any draw.

Only the raw bits of the Philox counter generator are used. NumPy promises that they never change, which it does not
for `Generator.permutation` or `Generator.choice`; a run resumed under another NumPy draws the same prompts.
"""

from __future__ import annotations

import hashlib
import json

import numpy as np


def _raw(n: int, key: tuple[int | str, ...]) -> np.ndarray:
    """uint64 [n] random words of the stream `key`; SHA-256 of the key, because Python's hash() differs per process."""
    digest = hashlib.sha256(json.dumps(key).encode()).digest()
    return np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(n)


def permutation(n: int, *key: int | str) -> np.ndarray:
    """int64 [n]: a uniform permutation of 0..n-1."""
    return np.argsort(_raw(n, key), kind="stable").astype(np.int64)


def categorical(weights: np.ndarray, n: int, *key: int | str) -> np.ndarray:
    """int64 [n]: independent draws from `weights` (float64 [K], sum 1), by inversion of the cumulative sum."""
    uniform = (_raw(n, key) >> np.uint64(11)) * 2.0**-53  # the 53 bits of a double in [0, 1)
    cumulative = np.cumsum(weights)
    drawn = np.searchsorted(cumulative, uniform * cumulative[-1], side="right")
    return np.minimum(drawn, len(weights) - 1).astype(np.int64)  # the product may round up to the total

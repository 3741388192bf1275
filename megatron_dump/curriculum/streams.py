"""Randomness as a function of a key: nothing to save, and any process can recompute any draw.

Only the raw bits of the Philox counter generator are used. NumPy promises that they never change, which it does not
for `Generator.permutation` or `Generator.choice`; a run resumed under another NumPy draws the same prompts (normals
and betas pass through log, exp, cos and sin, whose last bit is a matter of the machine).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import numpy as np

_MULTIPLIERS = np.array([[0xD2E7470EE14C6C93], [0xCA5A826395121157]], np.uint64)  # Philox4x64 (Salmon et al. 2011)
_WEYL = np.array([[0x9E3779B97F4A7C15], [0xBB67AE8584CAA73B]], np.uint64)
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)
_TRIES = 2  # attempts that are made at once for a variate that was rejected


def philox_key(*key: int | str) -> np.ndarray:
    """uint64 [2]: the generator's key of a stream; SHA-256 of `key`, because Python's hash() differs per process."""
    return np.frombuffer(hashlib.sha256(json.dumps(key).encode()).digest()[:16], "<u8").astype(np.uint64)


def named_keys(names: Sequence[str], *key: int | str) -> np.ndarray:
    """uint64 [K, 2]: a stream for each of K names; none depends on which other names there are."""
    return np.stack([philox_key(*key, name) for name in names])


def _raw(n: int, key: tuple[int | str, ...]) -> np.ndarray:
    """uint64 [n] random words of the stream `key`."""
    return np.random.Philox(key=philox_key(*key)).random_raw(n)


def _to_unit(words: np.ndarray) -> np.ndarray:
    """Random words -> float64 in [0, 1), from the 53 bits of a double."""
    return (words >> np.uint64(11)).view(np.int64) * 2.0**-53  # as signed: twice as fast to convert


def permutation(n: int, *key: int | str) -> np.ndarray:
    """int64 [n]: a uniform permutation of 0..n-1."""
    words = _raw(n, key)
    order = np.argsort(words)  # twice as fast as a stable sort, and the same unless two words are equal
    if np.any(np.diff(words[order]) == 0):
        order = np.argsort(words, kind="stable")
    return order.astype(np.int64)


def categorical(weights: np.ndarray, n: int, *key: int | str) -> np.ndarray:
    """int64 [n]: independent draws from `weights` (float64 [K], sum 1), by inversion of the cumulative sum."""
    uniform = _to_unit(_raw(n, key))
    cumulative = np.cumsum(weights)
    drawn = np.searchsorted(cumulative, uniform * cumulative[-1], side="right")
    return np.minimum(drawn, len(weights) - 1).astype(np.int64)  # the product may round up to the total


def uniforms(n: int, *key: int | str) -> np.ndarray:
    """float64 [n] in [0, 1)."""
    return _to_unit(_raw(n, key))


def normals(n: int, *key: int | str) -> np.ndarray:
    """float64 [n], standard normal."""
    first, second = _raw(2 * -(-n // 2), key).reshape(2, -1)
    return _normal_pairs(first, second).reshape(-1)[:n]


def betas(alpha: np.ndarray, beta: np.ndarray, *key: int | str) -> np.ndarray:
    """float64 [n] in [0, 1]: one draw of each Beta(alpha, beta), float64 [n] > 0."""
    return betas_at(alpha, beta, np.broadcast_to(philox_key(*key), (len(alpha), 2)), np.arange(len(alpha)))


def blocks_at(keys: np.ndarray, index: np.ndarray, lane: int | np.ndarray = 0) -> tuple[np.ndarray, ...]:
    """Four times uint64 [n]: words 4 * index .. 4 * index + 3 of n streams at once, whose keys are uint64 [n, 2].

    This is Philox4x64-10 itself, vectorised over streams: a generator of NumPy's takes 20 us to make, too long for one
    per source and step. Lane 0 has the words of `uniforms`; other lanes (int, or int64 [n]) are further streams.
    """
    shape = (2, len(index))
    even, odd = np.zeros(shape, np.uint64), np.zeros(shape, np.uint64)  # words 0 and 2 of the counter, 1 and 3
    even[0], odd[0] = index, lane
    even[0] += np.uint64(1)  # NumPy's generator counts up before its first words
    key = np.array(keys.T, np.uint64, order="C")
    low_m, high_m = _MULTIPLIERS & _LOW, _MULTIPLIERS >> _HALF
    low, high, cross, part, product = (np.empty(shape, np.uint64) for _ in range(5))  # in place: a third faster
    for turn in range(10):
        if turn:
            key += _WEYL
        np.multiply(even, _MULTIPLIERS, out=product)  # lower 64 bits; the upper ones by halves
        np.bitwise_and(even, _LOW, out=low)
        np.right_shift(even, _HALF, out=high)
        np.multiply(low, low_m, out=cross)
        cross >>= _HALF
        cross += np.multiply(high, low_m, out=part)
        low *= high_m
        high *= high_m
        low += np.bitwise_and(cross, _LOW, out=part)
        low >>= _HALF
        cross >>= _HALF
        high += cross
        high += low
        odd ^= key
        odd ^= high[::-1]
        even, odd = odd, even
        odd[:] = product[::-1]
    return even[0], odd[0], even[1], odd[1]


def uniforms_at(keys: np.ndarray, index: np.ndarray) -> np.ndarray:
    """float64 [n] in [0, 1): the first number of the index-th (int64 [n]) block of n streams, keys uint64 [n, 2]."""
    return _to_unit(blocks_at(keys, index)[0])


def betas_at(alpha: np.ndarray, beta: np.ndarray, keys: np.ndarray, index: np.ndarray) -> np.ndarray:
    """float64 [n] in [0, 1]: the index-th draw of n streams, from Beta(alpha, beta); all arguments have n rows.

    X / (X + Y) of two Gamma variates, in logarithms: shapes near 0 would underflow to 0 / 0. Gamma(a) is
    Gamma(a + 1) * U^(1/a), and Gamma(a + 1) comes from the method of Marsaglia and Tsang (2000), which rejects one in
    twenty at worst. Each draw has words of its own, so none depends on which others are drawn beside it.
    """
    shapes = np.clip(np.stack([alpha, beta]).astype(np.float64), 1e-300, 1e300)  # no overflow of 1 / shape, 9 * shape
    words = blocks_at(keys, index)
    log_gamma, accepted = _log_gamma(shapes + 1.0, words)
    missing, lane = np.flatnonzero(~(accepted[0] & accepted[1])), 1
    while missing.size:
        lanes = np.repeat(np.arange(lane, lane + _TRIES), missing.size)  # several at once: calls cost more than numbers
        more = blocks_at(np.tile(keys[missing], (_TRIES, 1)), np.tile(index[missing], _TRIES), lanes)
        again, good = _log_gamma(np.tile(shapes[:, missing] + 1.0, _TRIES), more)
        for value, taken in zip(np.split(again, _TRIES, axis=1), np.split(good, _TRIES, axis=1), strict=True):
            new = taken & ~accepted[:, missing]
            log_gamma[:, missing] = np.where(new, value, log_gamma[:, missing])
            accepted[:, missing] |= new
        missing, lane = missing[~accepted[:, missing].all(axis=0)], lane + _TRIES
    log_gamma += np.log(_halves(words[3])) / shapes
    with np.errstate(over="ignore"):  # exp(inf): the draw is 0
        return 1.0 / (1.0 + np.exp(log_gamma[1] - log_gamma[0]))


def _log_gamma(shapes: np.ndarray, words: tuple[np.ndarray, ...]) -> tuple[np.ndarray, np.ndarray]:
    """One attempt at log Gamma(shape), shapes float64 [2, n] > 1, from words of uint64 [n]: (values, accepted)."""
    depth = shapes - 1.0 / 3.0
    x = _normal_pairs(words[0], words[1])
    v = np.sqrt(9.0 * depth)
    np.divide(x, v, out=v)  # in place from here: fresh memory costs more than arithmetic
    v += 1.0
    possible = v > 0
    v *= v * v
    np.copyto(v, 1.0, where=~possible)
    log_v = np.log(v)
    bound = np.subtract(1.0, v, out=v)
    bound += log_v
    bound *= depth
    x *= x
    x *= 0.5
    bound += x  # x^2 / 2 + depth * (1 - v + log v)
    accepted = possible & (np.log(_halves(words[2])) < bound)
    log_v += np.log(depth)
    return log_v, accepted


def _halves(words: np.ndarray) -> np.ndarray:
    """uint64 [n] -> float64 [2, n] in (0, 1), of 32 bits each: enough to compare with and to take a root of."""
    return (np.stack([words & _LOW, words >> _HALF]).view(np.int64) + 0.5) * 2.0**-32


def _normal_pairs(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """float64 [2, n]: two independent standard normals (Box and Muller) of two random words each."""
    angle = (2.0 * np.pi) * _to_unit(second)
    pairs = np.empty((2, len(first)))
    np.cos(angle, out=pairs[0])
    np.sin(angle, out=pairs[1])
    pairs *= np.sqrt(-2.0 * np.log(1.0 - _to_unit(first)))  # 1 - u is never 0
    return pairs

"""Random streams: NumPy's own Philox bits, and the exact moments of what is made of them."""

from __future__ import annotations

import hashlib
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dump.curriculum import streams

WORD = st.integers(0, 2**64 - 1)


def generator(*key) -> np.random.Philox:
    """Another way to a stream: NumPy's generator from 16 bytes of the key's SHA-256."""
    digest = hashlib.sha256(json.dumps(key).encode()).digest()
    return np.random.Philox(key=int.from_bytes(digest[:16], "little"))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(WORD, WORD, st.integers(0, 2**62), WORD), min_size=1, max_size=20))
def test_blocks_are_those_of_numpys_generator(streams_):
    keys = np.array([[low, high] for low, high, _, _ in streams_], np.uint64)
    index = np.array([place for _, _, place, _ in streams_])
    lanes = np.array([lane for _, _, _, lane in streams_], np.uint64)
    blocks = np.stack(streams.blocks_at(keys, index, lanes))
    for i, (_, _, place, lane) in enumerate(streams_):
        counter = np.array([place, lane, 0, 0], np.uint64)
        assert np.array_equal(blocks[:, i], np.random.Philox(key=keys[i], counter=counter).random_raw(4))


def test_streams_are_read_anywhere():
    raw = generator(3, "a").random_raw(400)
    assert streams.uniforms(400, 3, "a").tolist() == [int(word >> np.uint64(11)) / 2**53 for word in raw]
    keys = np.tile(streams.philox_key(3, "a"), (100, 1))
    assert np.array_equal(streams.uniforms_at(keys, np.arange(100)), streams.uniforms(400, 3, "a")[::4])


def test_permutations_and_categories_have_not_changed():
    """The draws of earlier runs: raw bits, sorted; and inversion of the cumulative sum."""
    raw = [int(word) for word in generator(1, "prompts", "x", 0).random_raw(50)]
    assert streams.permutation(50, 1, "prompts", "x", 0).tolist() == sorted(range(50), key=raw.__getitem__)
    assert streams.permutation(8, 1, "a").tolist() == [5, 3, 4, 0, 7, 2, 6, 1]
    weights = np.array([0.1, 0.0, 0.6, 0.3])
    assert streams.categorical(weights, 12, 1, "a").tolist() == [2, 3, 3, 2, 2, 0, 3, 2, 0, 2, 2, 3]
    assert streams.uniforms(2, 1, "a").tolist() == [0.5661806283175024, 0.9757542122213668]


def assert_distributed(values: np.ndarray, cumulative) -> None:
    """Kolmogorov's distance below its 99.9 % point."""
    ordered = np.sort(values)
    steps = np.arange(len(values) + 1) / len(values)
    expected = np.array([cumulative(x) for x in ordered])
    distance = max(np.abs(expected - steps[1:]).max(), np.abs(expected - steps[:-1]).max())
    assert distance < 1.95 / math.sqrt(len(values))


def test_normals_are_normal():
    for n in (0, 1, 2, 7):
        assert streams.normals(n, 5).shape == (n,)
    assert_distributed(streams.normals(40_001, 5, "n"), lambda x: 0.5 * (1 + math.erf(x / math.sqrt(2))))


@pytest.mark.parametrize(
    ("alpha", "beta", "cumulative"),
    [
        (1, 1, lambda x: x),
        (3, 1, lambda x: x**3),
        (0.2, 1, lambda x: x**0.2),
        (1, 0.5, lambda x: 1 - (1 - x) ** 0.5),
        (0.5, 0.5, lambda x: 2 / math.pi * math.asin(math.sqrt(x))),
        (2, 2, lambda x: 3 * x**2 - 2 * x**3),
    ],
)
def test_betas_have_their_distribution(alpha, beta, cumulative):
    n = 40_000
    assert_distributed(streams.betas(np.full(n, float(alpha)), np.full(n, float(beta)), 5, "b"), cumulative)


@pytest.mark.parametrize("shape", [(0.05, 0.2), (0.5, 3), (1, 1), (1.5, 0.7), (4, 9), (300, 500), (1e7, 1e7)])
def test_betas_have_their_moments(shape):
    alpha, beta = shape
    n, total = 200_000, alpha + beta
    draws = streams.betas(np.full(n, float(alpha)), np.full(n, float(beta)), 6, "b")
    raw = [1.0]  # E[x^r], exactly
    for r in range(8):
        raw.append(raw[-1] * (alpha + r) / (total + r))
    for r in range(1, 5):
        error = math.sqrt((raw[2 * r] - raw[r] ** 2) / n)
        assert abs(np.mean(draws**r) - raw[r]) < 4 * error + 1e-12


def test_a_beta_does_not_depend_on_what_is_drawn_beside_it():
    alpha, beta = np.linspace(0.1, 4, 500), np.linspace(5, 0.2, 500)
    keys = np.stack([streams.philox_key(1, i % 7) for i in range(500)])
    index = np.arange(500) * 3
    some = np.arange(500)[::-3]
    whole = streams.betas_at(alpha, beta, keys, index)
    assert np.array_equal(streams.betas_at(alpha[some], beta[some], keys[some], index[some]), whole[some])


@pytest.mark.filterwarnings("error")
def test_absurd_shapes_give_numbers_in_the_unit_interval():
    extreme = [1e-320, 1e-300, 1e-5, 1.0, 1e5, 1e300, 1e308]
    alpha, beta = (grid.reshape(-1) for grid in np.meshgrid(extreme, extreme))
    draws = streams.betas(alpha, beta, 1)
    assert np.all((draws >= 0) & (draws <= 1))
    assert draws[np.flatnonzero((alpha == 1e300) & (beta == 1.0))][0] == 1.0

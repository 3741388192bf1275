"""Draws and outcomes as JSON: nothing is lost."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from megatron_dump.curriculum.codec import (
    draw_from_json,
    draw_to_json,
    floats_from_json,
    floats_to_json,
    outcomes_from_json,
    outcomes_to_json,
)
from megatron_dump.types import Draw, Outcomes

INTS = st.integers(-(2**63), 2**63 - 1)
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # twelve columns, a busy machine


def column(kind: type, n: int, elements: st.SearchStrategy) -> st.SearchStrategy[np.ndarray]:
    """Arrays [n], often constant ones."""
    return hnp.arrays(kind, n, elements=elements) | elements.map(lambda value: np.full(n, value, kind))


@st.composite
def any_outcomes(draw: st.DrawFn) -> Outcomes:
    n = draw(st.integers(0, 12))
    kinds = {"int": (np.int64, INTS), "float": (np.float64, st.floats()), "bool": (np.bool_, st.booleans())}
    names = {
        "group_ids": "int",
        "samples": "int",
        "prompt_ids": "int",
        "source_ids": "int",
        "rewards": "float",
        "advantages": "float",
        "correct": "bool",
        "well_formed": "bool",
        "lengths": "int",
        "finished": "bool",
        "kept": "bool",
        "ages": "int",
    }
    columns = {name: draw(column(kinds[kind][0], n, kinds[kind][1])) for name, kind in names.items()}
    return Outcomes(step=draw(st.integers(0, 10**9)), **columns)


def assert_identical(a: Any, b: Any) -> None:
    """Same types, lengths and bits in every field; NaN of any payload is NaN."""
    for field in dataclasses.fields(a):
        one, other = getattr(a, field.name), getattr(b, field.name)
        if isinstance(one, np.ndarray):
            assert one.dtype == other.dtype and one.shape == other.shape, field.name
            if one.dtype == np.float64:
                one, other = (np.where(np.isnan(x), np.nan, x).view(np.int64) for x in (one, other))
            assert np.array_equal(one, other), field.name
        else:
            assert type(one) is type(other) and one == other, field.name


def through_json(value: Any) -> Any:
    """Strictly JSON: NaN and Infinity, which only Python reads, are errors."""
    return json.loads(json.dumps(value, allow_nan=False))


@patient
@given(any_outcomes())
def test_outcomes_survive_json(outcomes):
    row = through_json(outcomes_to_json(outcomes))
    assert_identical(outcomes_from_json(row), outcomes)
    assert ("ages" in row) == bool(outcomes.ages.any())


@patient
@given(st.data(), st.integers(0, 12), st.booleans())
def test_draws_survive_json(data, n, train):
    prompt_ids, source_ids, rollouts = (data.draw(column(np.int64, n, INTS)) for _ in range(3))
    weights = data.draw(hnp.arrays(np.float64, st.integers(1, 5), elements=st.floats()))
    draw = Draw(3, prompt_ids, source_ids, rollouts, weights, first_group=n, train=train)
    assert_identical(draw_from_json(through_json(draw_to_json(draw))), draw)


def test_what_json_has_no_form_for():
    values = [math.nan, math.inf, -math.inf, -0.0, 5e-324, 0.1 + 0.2]
    assert floats_to_json(values) == [None, "inf", "-inf", -0.0, 5e-324, 0.30000000000000004]
    read = floats_from_json(through_json(floats_to_json(values)))
    assert np.array_equal(read, values, equal_nan=True) and np.signbit(read[3])


def test_the_log_is_compact():
    n = 6
    zeros, yes = np.zeros(n, np.int64), np.ones(n, bool)
    correct = np.array([0, 1, 1, 0, 0, 0], bool)
    outcomes = Outcomes(
        0, zeros, np.arange(n), zeros + 7, zeros, zeros + 0.5, zeros + np.nan, correct, yes, zeros + 9, yes, yes, zeros
    )
    assert outcomes_to_json(outcomes) == {
        "step": 0,
        "group_ids": [0] * 6,
        "samples": [0, 1, 2, 3, 4, 5],
        "prompt_ids": 7,
        "source_ids": 0,
        "rewards": 0.5,
        "advantages": None,
        "correct": "011000",
        "well_formed": True,
        "lengths": 9,
        "finished": True,
        "kept": True,
    }


def test_columns_of_other_lengths_are_refused():
    draw = draw_to_json(Draw(0, np.arange(3), np.arange(3), np.arange(3), np.ones(3)))
    with pytest.raises(ValueError, match="source_ids has 2 values for 3 rows"):
        draw_from_json({**draw, "source_ids": [0, 1]})

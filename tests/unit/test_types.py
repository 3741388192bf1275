"""Outcomes and the table of its columns."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from megatron_dump.types import OUTCOME_COLUMNS, Outcomes, groups_of, pack_places

ROWS = {name: [3, 0, 1] for name in OUTCOME_COLUMNS}


def test_the_table_has_every_field_but_the_step_in_their_order():
    assert ["step", *OUTCOME_COLUMNS] == [field.name for field in dataclasses.fields(Outcomes)]


def test_columns_are_cast_joined_and_taken():
    outcomes = Outcomes.of(5, **ROWS)
    chosen = outcomes.take(np.array([True, False, True]))
    whole = Outcomes.joined([chosen, outcomes])
    assert outcomes.step == chosen.step == whole.step == 5
    for name, kind in OUTCOME_COLUMNS.items():
        assert getattr(whole, name).dtype == kind
        assert getattr(whole, name).tolist() == np.array([3, 1, 3, 0, 1], kind).tolist()


def test_places_order_rollouts_by_group_then_sample_and_give_the_group_back():
    groups, samples = (axis.ravel() for axis in np.meshgrid([0, 1, 77, 2**20 - 1], [0, 1, 4095], indexing="ij"))
    places = pack_places(groups, samples)
    assert np.all(np.diff(places) > 0) and places[0] == 0 and places[-1] == 2**32 - 1
    assert groups_of(places).tolist() == groups.tolist()
    assert pack_places(groups[:0], samples[:0]).tolist() == []


@pytest.mark.parametrize(
    ("group", "sample", "message"),
    [
        (0, 4096, r"samples from 0 to 4096: they must be in 0\.\.4095"),
        (0, -1, r"samples from -1 to 0: they must be in 0\.\.4095"),
        (2**20, 0, r"group ids from 0 to 1048576: they must be in 0\.\.1048575"),
    ],
)
def test_places_that_two_rollouts_would_share_are_refused(group, sample, message):
    with pytest.raises(ValueError, match=message):
        pack_places(np.array([0, group]), np.array([0, sample]))

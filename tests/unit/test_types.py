"""Outcomes and the table of its columns."""

from __future__ import annotations

import dataclasses

import numpy as np

from megatron_dump.types import OUTCOME_COLUMNS, Outcomes

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

"""What a mixture is made of, as tables and as JSON."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from dataset_mix.inputs import Input
from dataset_mix.mix import Scan
from dataset_mix.plan import DUPLICATE, OVER_LIMIT, SPLITS, TAKEN, TOO_LONG, Plan, Rows
from kk.files import place

CONFLICTS_SHOWN = 10


def natural(name: str) -> list[tuple[int, str]]:
    """A sort key that puts kk_logic_2 before kk_logic_10."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", name)]


def place_of(inputs: Sequence[Input], rows: Rows, i: int) -> str:
    """Where row i of the first pass stands."""
    return place(inputs[rows.file[i]].path, rows.number[i])


def duplicates(inputs: Sequence[Input], rows: Rows, plan: Plan) -> dict[str, Any]:
    """How many prompts repeat another row's, inside a source and across, and which of them have another answer."""
    again = np.flatnonzero(plan.first != np.arange(len(rows)))
    first = plan.first[again]
    source, truth = np.array(rows.source), np.array(rows.truths, np.uint64)
    split = np.array(rows.given_split)
    differ = again[truth[again] != truth[first]]
    return {
        "rows": len(again),
        "across_sources": int((source[again] != source[first]).sum()),
        "training_rows_of_test_prompts": int(((split[again] == 0) & (split[first] == 1)).sum()),
        "other_answer": len(differ),
        "other_answer_examples": [
            [place_of(inputs, rows, int(i)), place_of(inputs, rows, int(plan.first[i]))]
            for i in differ[:CONFLICTS_SHOWN]
        ],
    }


def by_source(rows: Rows, plan: Plan) -> dict[str, dict[str, Any]]:
    """Counts of each source, in natural order, and the lengths of the rows taken."""
    source, length = np.array(rows.source, np.int64), np.array(rows.length, np.int64)
    table: dict[str, dict[str, Any]] = {}
    for name, number in sorted(rows.sources.items(), key=lambda pair: natural(pair[0])):
        mine = source == number
        taken = length[mine & (plan.fate == TAKEN)]
        table[name] = {
            "rows": int(mine.sum()),
            "too_long": int((mine & (plan.fate == TOO_LONG)).sum()),
            "duplicates": int((mine & (plan.fate == DUPLICATE)).sum()),
            "over_limit": int((mine & (plan.fate == OVER_LIMIT)).sum()),
            **{s: int((mine & (plan.fate == TAKEN) & (plan.split == k)).sum()) for k, s in enumerate(SPLITS)},
            "mean_length": round(float(taken.mean()), 1) if len(taken) else None,
            "longest": int(taken.max()) if len(taken) else None,
        }
    return table


def source_table(statistics: dict[str, dict[str, Any]], unit: str) -> Table:
    """The statistics of `by_source` for a terminal, with a line of sums."""
    table = Table(title=f"Rows by source, lengths of prompts in {unit}", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    columns = ("rows", "too_long", "duplicates", "over_limit", *SPLITS)
    table.add_column("source", overflow="fold", min_width=min(24, max(map(len, statistics), default=0)))
    for heading in ("rows", "too\nlong", "dupli-\ncates", "over\nlimit", *SPLITS, "mean\nlength", "longest"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, of in statistics.items():
        lengths = ("" if of[key] is None else f"{of[key]:,.0f}" for key in ("mean_length", "longest"))
        table.add_row(name, *(f"{of[column]:,}" for column in columns), *lengths)
    if len(statistics) > 1:
        table.add_section()
        table.add_row("all", *(f"{sum(of[column] for of in statistics.values()):,}" for column in columns), "", "")
    return table


def file_table(found: Scan) -> Table:
    """Rows and bad rows of each file."""
    table = Table(title="Rows by file", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("file", overflow="fold")
    table.add_column("rows", justify="right")
    table.add_column("bad", justify="right")
    for path, count in found.read.items():
        table.add_row(path, f"{count:,}", f"{found.bad[path]:,}")
    return table


def taken_by_split(plan: Plan) -> Counter[str]:
    """Rows taken into each split."""
    return Counter({s: int(((plan.fate == TAKEN) & (plan.split == k)).sum()) for k, s in enumerate(SPLITS)})

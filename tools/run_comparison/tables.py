"""What the runs came to: by group, between groups, by source."""

from __future__ import annotations

import math

import numpy as np

from megatron_dump.report.run import natural_sort
from run_comparison.curves import TEST, at_tokens, common_tokens, first, last, of_seeds
from run_comparison.groups import Group, Seed
from run_comparison.intervals import difference, over_seeds

REWARD = "critic/score/mean"
Table = tuple[list[str], list[list[str]]]  # columns, rows


def result_of(groups: list[Group]) -> tuple[str, str]:
    """(metric, its name): test accuracy if every run has validations, else the training reward."""
    tested = all(seed.run.validations for group in groups for seed in group.seeds)
    return (TEST, TEST) if tested else (REWARD, "training reward")


def by_group(groups: list[Group]) -> Table:
    """Mean ± interval over seeds of each group."""
    key, name = result_of(groups)
    tokens = common_tokens(groups, key)
    columns = ["runs", "seeds", "steps", "tokens", f"{name}: first", "last", "change", f"at {_count(tokens)} tokens"]
    rows = []
    for group in groups:
        before, after = first(group, key), last(group, key)
        gained = {seed: after[seed] - before[seed] for seed in after}
        steps = sorted({seed.run.steps[-1] for seed in group.seeds})
        rows.append(
            [
                group.label,
                str(len(group.seeds)),
                "–".join(str(s) for s in dict.fromkeys((steps[0], steps[-1]))),
                _count(float(np.mean([seed.tokens[-1] for seed in group.seeds]))),
                of_seeds(before).text(),
                of_seeds(after).text(),
                of_seeds(gained).text("+.3f"),
                of_seeds(at_tokens(group, key, tokens)).text(),
            ]
        )
    return columns, rows


def between_groups(groups: list[Group]) -> Table:
    """Every group against the first one: of the last value, of its change, and at equal tokens."""
    key, name = result_of(groups)
    tokens = common_tokens(groups, key)
    columns = [f"minus {groups[0].label}", f"{name}: last", "change", f"at {_count(tokens)} tokens", "interval"]
    rows = []

    def change(group: Group) -> dict[object, float]:
        before, after = first(group, key), last(group, key)
        return {seed: after[seed] - before[seed] for seed in after}

    for group in groups[1:]:
        found = [
            difference(of(groups[0]), of(group))
            for of in (lambda g: last(g, key), change, lambda g: at_tokens(g, key, tokens))
        ]
        kind = "paired over seeds" if found[0][1] else "seeds differ: Welch"
        kind = kind if math.isfinite(found[0][0].half) else "none from one seed"
        rows.append([group.label, *(interval.text("+.3f") for interval, _ in found), kind])
    return columns, rows


def by_source(groups: list[Group]) -> Table:
    """Test accuracy of each source at the last validation."""
    sources = natural_sort(source for group in groups for source in group.sources)
    rows = []
    for source in sources:
        values = [over_seeds(np.array([_last_test(seed, source) for seed in group.seeds])) for group in groups]
        if any(value.n for value in values):
            rows.append([source, *(value.text() for value in values)])
    return ["source", *(group.label for group in groups)], rows


def as_text(table: Table) -> str:
    """In columns, for a terminal; numbers to the right."""
    columns, rows = table
    widths = [max(len(row[k]) for row in (columns, *rows)) for k in range(len(columns))]
    return "\n".join(
        "  ".join(f"{cell:{'<' if k == 0 else '>'}{widths[k]}}" for k, cell in enumerate(row)).rstrip()
        for row in (columns, *rows)
    )


def _last_test(seed: Seed, source: str) -> float:
    return seed.run.tested(source, -1)


def _count(tokens: float) -> str:
    return f"{tokens:,.0f}" if math.isfinite(tokens) else "unknown"

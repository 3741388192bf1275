"""The two passes of a mixture: read and judge every row, then read again and write those that were taken."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from dataset_mix.inputs import Input, Row, read
from dataset_mix.lengths import Measure
from dataset_mix.plan import SPLITS, TAKEN, Plan, Rows, digest, normalised
from kk.files import Unread, place
from kk.parquet import writing
from megatron_dump.rewards import RewardFn, reward_for_source

# The columns that megatron_dump.data documents, and where each row came from.
SCHEMA = pa.schema(
    {
        "data_source": pa.string(),
        "prompt": pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})),
        "ability": pa.string(),
        "reward_model": pa.struct({"style": pa.string(), "ground_truth": pa.string()}),
        "extra_info": pa.struct(
            {
                "split": pa.string(),
                "index": pa.int64(),  # in this file
                "origin": pa.string(),  # place in the input: file:line, or file row N
                "original": pa.string(),  # the input's own extra_info as JSON, or null
            }
        ),
    }
)
CHUNK = 256  # rows measured together: the tokenizer uses all cores on a list
BAD_SHOWN = 20


@dataclass
class Scan:
    """What the first pass found."""

    rows: Rows = field(default_factory=Rows)
    read: Counter[str] = field(default_factory=Counter)  # file -> rows, the bad ones included
    bad: Counter[str] = field(default_factory=Counter)  # file -> bad rows
    examples: list[dict[str, str]] = field(default_factory=list)  # {place, reason} of the first bad rows


def scan(inputs: Sequence[Input], measure: Measure, judge: Judge, advance: Callable[[int], None]) -> Scan:
    """Read and judge everything once."""
    found = Scan()
    for file, given in enumerate(inputs):
        to_test = 0.0 if isinstance(given.where_to, str) else given.where_to
        for chunk in _chunks(read(given), CHUNK):
            lengths = iter(measure([row for _, row in chunk if isinstance(row, Row)]))
            for number, row in chunk:
                length = next(lengths) if isinstance(row, Row) else row
                problem = length if isinstance(length, Unread) else judge.problem(row)
                if problem is None and isinstance(row, Row) and isinstance(length, int):
                    found.rows.add(file, number, row, to_test, length)
                else:
                    found.bad[str(given.path)] += 1
                    if len(found.examples) < BAD_SHOWN:
                        found.examples.append({"place": place(given.path, number), "reason": str(problem)})
            found.read[str(given.path)] += len(chunk)
            advance(len(chunk))
    return found


def _chunks(items: Iterator, size: int) -> Iterator[list]:
    while chunk := list(itertools.islice(items, size)):
        yield chunk


class Judge:
    """Whether each source's reward function can read the ground truths. Without rewards everything passes."""

    def __init__(self, rewards: Mapping[str, str]) -> None:
        """rewards: patterns of sources -> names, as in model.data.rewards."""
        self.rewards = rewards
        self.functions: dict[str, RewardFn] = {}

    def problem(self, row: Row) -> Unread | None:
        """Why the row's ground truth cannot be read, or None. ValueError when the source has no reward function."""
        if not self.rewards:
            return None
        if row.source not in self.functions:
            try:
                self.functions[row.source] = reward_for_source(row.source, self.rewards)
            except ValueError as error:
                raise ValueError(f"--reward: {error}") from None
        try:
            self.functions[row.source]("", row.ground_truth)
        except ValueError as error:
            return Unread(f"its reward function cannot read the ground truth: {error}"[:300])
        return None


def write(
    inputs: Sequence[Input], rows: Rows, plan: Plan, paths: Mapping[str, Path], advance: Callable[[int], None]
) -> dict[str, dict[str, Any]]:
    """Read again and write the taken rows; {split: {rows, sha256}} of what was written.

    ValueError when a file has changed since the first pass.
    """
    with writing(paths, SCHEMA) as writers:
        i = 0  # the row of the first pass that comes next
        for file, given in enumerate(inputs):
            for number, row in read(given):
                advance(1)
                if i == len(rows) or (file, number) != (rows.file[i], rows.number[i]):
                    continue  # a bad row
                where = place(given.path, number)
                if isinstance(row, Unread) or digest(normalised(row.messages)) != rows.prompts[16 * i : 16 * i + 16]:
                    raise ValueError(f"{where} changed while it was read; run again")
                label = SPLITS[plan.split[i]]
                if plan.fate[i] == TAKEN and label in writers:
                    writers[label].add(_as_written(row, label, writers[label].rows, where))
                i += 1
        if i != len(rows):
            raise ValueError(f"{place(inputs[rows.file[i]].path, rows.number[i])} is gone since it was read; run again")
        return {split: {"rows": writer.rows, "sha256": writer.finish()} for split, writer in writers.items()}


def _as_written(row: Row, split: str, index: int, origin: str) -> dict:
    return {
        "data_source": row.source,
        "prompt": row.messages,
        "ability": row.ability,
        "reward_model": {"style": row.style, "ground_truth": row.ground_truth},
        "extra_info": {"split": split, "index": index, "origin": origin, "original": row.extra},
    }

"""A puzzle as a row of training data: columns that verl's data sets use, too."""

from __future__ import annotations

import json
import random
from typing import Any

import pyarrow as pa

from kk.grammar import depth, is_leaf
from kk.importing import COT, parse_statements
from kk.text import KNIGHT_KNAVE
from kk.trace import worked_solution

SCHEMA = pa.schema(
    {
        "data_source": pa.string(),  # kk_logic_<n>
        "prompt": pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})),
        "ability": pa.string(),  # "logic"
        "reward_model": pa.struct({"style": pa.string(), "ground_truth": pa.string()}),  # "rule", JSON text
        "extra_info": pa.struct(
            {
                "split": pa.string(),
                "index": pa.int64(),  # of the puzzle among those of its size and split
                "quiz": pa.string(),
                "depth": pa.int64(),  # of the deepest statement: 1 a leaf, 2 an operator over leaves
                "names": pa.list_(pa.string()),
                "solution": pa.list_(pa.bool_()),  # True: a knight
            }
        ),
    }
)
# With --cot: the assistant's whole turn, "<think> … </think> <answer> … </answer>"; null when it would be too long.
COT_SCHEMA = SCHEMA.append(pa.field("response", pa.string()))


def width(statement: tuple) -> int:
    """Most operands of any part of a statement; 0 of a leaf."""
    return 0 if is_leaf(statement) else max(len(statement) - 1, *map(width, statement[1:]))


def to_row(
    puzzle: dict[str, Any], split: str, instruction: str = "", system: str = "", source: str = "kk_logic"
) -> dict[str, Any]:
    """A puzzle of `kk.generate` as a row of SCHEMA; its data source is <source>_<number of people>.

    `instruction` follows the quiz in the user's message; `system` is a message before it.
    """
    content = f"{puzzle['quiz']} {instruction}" if instruction else puzzle["quiz"]
    messages = [{"role": "system", "content": system}] if system else []
    truth = {key: puzzle[key] for key in ("solution_text_format", "statements")}
    return {
        "data_source": f"{source}_{len(puzzle['names'])}",
        "prompt": [*messages, {"role": "user", "content": content}],
        "ability": "logic",
        "reward_model": {"style": "rule", "ground_truth": json.dumps(truth)},
        "extra_info": {
            "split": split,
            "index": puzzle["index"],
            "quiz": puzzle["quiz"],
            "depth": max(map(depth, parse_statements(puzzle["statements"]))),
            "names": puzzle["names"],
            "solution": puzzle["solution"],
        },
    }


def trial_response(puzzle: dict[str, Any], haste: float, seed: int, max_trials: int) -> str | None:
    """A worked solution by trial (kk.trace), or None when it could take more than `max_trials` trials.

    haste: the probability of giving up after a failed trial. The random stream is the puzzle's own: (seed, quiz).
    ValueError for what kk.trace has no words for: other roles than knights and knaves, three operands.
    """
    trials = 1 + int("".join("01"[not knight] for knight in puzzle["solution"]), 2)  # all knights first, then …
    if trials > max_trials:
        return None
    statements = parse_statements(puzzle["statements"])
    if puzzle["knight_knave"] != KNIGHT_KNAVE or max(map(width, statements)) > 2:
        raise ValueError("--cot trials speaks of knights and knaves, and of two operands at most; use --cot steps")
    rng = random.Random(f"kk/cot/{seed}/{puzzle['quiz']}")
    return worked_solution(statements, puzzle["names"], rng, haste)


def step_response(puzzle: dict[str, Any]) -> str:
    """The puzzle's own solution in words, in tags. ValueError when it has none."""
    head, steps, foot = (puzzle.get(field) for field in COT)
    if not (isinstance(head, str) and isinstance(foot, str) and isinstance(steps, list)):
        raise ValueError(f"--cot steps needs the fields {', '.join(COT)}; use --cot trials")
    answer = puzzle["solution_text_format"].replace("\n", " ")
    return f"<think> {' '.join([head, *map(str, steps), foot])} </think> <answer> {answer} </answer>"

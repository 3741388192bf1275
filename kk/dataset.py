"""Turn puzzles into training data: `python -m kk.dataset --in DIR --out DIR` makes train.parquet and test.parquet.

Reads DIR/{train,test}/people<n>.jsonl as `kk.generate` writes them. A row's prompt is a list of clean chat messages:
templates and special tokens are the tokenizer's business, and must not be in the data.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

SPLITS = ("train", "test")
ROW_GROUP_SIZE = 1024

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


def depth(statement: tuple) -> int:
    """Levels of nesting: 1 for a leaf such as ('lying', 2)."""
    return 1 + max((depth(part) for part in statement[1:] if isinstance(part, tuple)), default=0)


def to_row(puzzle: dict, split: str, instruction: str = "", system: str = "") -> dict:
    """A puzzle of `kk.generate` as a row of SCHEMA. `instruction` follows the quiz; `system` is a message before it."""
    content = f"{puzzle['quiz']} {instruction}" if instruction else puzzle["quiz"]
    messages = [{"role": "system", "content": system}] if system else []
    truth = {key: puzzle[key] for key in ("solution_text_format", "statements")}
    return {
        "data_source": f"kk_logic_{len(puzzle['names'])}",
        "prompt": [*messages, {"role": "user", "content": content}],
        "ability": "logic",
        "reward_model": {"style": "rule", "ground_truth": json.dumps(truth)},
        "extra_info": {
            "split": split,
            "index": puzzle["index"],
            "quiz": puzzle["quiz"],
            "depth": max(depth(statement) for statement in ast.literal_eval(puzzle["statements"])),
            "names": puzzle["names"],
            "solution": puzzle["solution"],
        },
    }


def read_puzzles(folder: Path) -> Iterator[dict]:
    """All puzzles of folder/people<n>.jsonl, by number of people. FileNotFoundError when there is no such file."""
    sizes = {
        int(m[1]): path for path in folder.glob("*.jsonl") if (m := re.fullmatch(r"people(\d+)\.jsonl", path.name))
    }
    if not sizes:
        raise FileNotFoundError(f"no people<n>.jsonl in {folder}: make them with python -m kk.generate")
    for _, path in sorted(sizes.items()):
        with path.open(encoding="utf-8") as lines:
            yield from map(json.loads, lines)


def fingerprint(rows: Sequence[dict]) -> str:
    """sha256 of the rows in order, each as JSON with sorted keys: two data sets are the same when theirs agree."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def write_parquet(rows: Sequence[dict], path: Path) -> str:
    """Write rows of SCHEMA in groups of ROW_GROUP_SIZE; returns the fingerprint, which the schema's metadata holds too.

    The file appears under its name only when it is whole.
    """
    mark = fingerprint(rows)
    table = pa.Table.from_pylist(list(rows), schema=SCHEMA.with_metadata({"fingerprint": mark}))
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        pq.write_table(table, unfinished, row_group_size=ROW_GROUP_SIZE)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return mark


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m kk.dataset", description="Puzzles as parquet files for training.")
    parser.add_argument("--in", dest="source", type=Path, required=True, help="folder with train/ and test/")
    parser.add_argument("--out", type=Path, required=True, help="folder for train.parquet and test.parquet")
    parser.add_argument("--instruction", default="", help="text after each quiz, in the user's message")
    parser.add_argument("--system", default="", help="text of a system message before each quiz")
    args = parser.parse_args(argv)
    for split in SPLITS:
        try:
            puzzles = list(read_puzzles(args.source / split))
        except FileNotFoundError as error:
            parser.error(str(error))
        rows = [to_row(puzzle, split, args.instruction, args.system) for puzzle in puzzles]
        mark = write_parquet(rows, args.out / f"{split}.parquet")
        print(f"{args.out / split}.parquet: {len(rows)} rows, sha256 {mark[:16]}")


if __name__ == "__main__":
    main()

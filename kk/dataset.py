"""Turn puzzles into training data: `python -m kk.dataset --in DIR --out DIR` makes train.parquet and test.parquet.

    python -m kk.dataset --in data/kk --out data/kk             DIR/{train,test}/people<n>.jsonl of kk.generate
    python -m kk.dataset --in data/kk --out data/sft --cot      with a worked solution in the column `response`
    python -m kk.dataset --import FILE… --out DIR --split file  published .jsonl or .parquet files

A row's prompt is a list of clean chat messages: templates and special tokens are the tokenizer's business, and must
not be in the data. Rows are read, checked and written one at a time, so memory does not grow with their number.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kk.cli import exit_code
from kk.files import Unread, count_rows
from kk.importing import Imported, parse_statements, read_puzzles
from kk.parquet import writing
from kk.progress import bar
from kk.rows import COT_SCHEMA, SCHEMA, step_response, to_row, trial_response
from kk.split import SPLITS, split_of


def puzzle_files(folder: Path) -> list[tuple[Path, str]]:
    """(path, split) of folder/{train,test}/people<n>.jsonl by number of people; either side may be missing.

    FileNotFoundError when there is no such file.
    """
    found = []
    for split in SPLITS:
        matches = ((re.fullmatch(r"people(\d+)\.jsonl", path.name), path) for path in (folder / split).glob("*.jsonl"))
        sizes = {int(match[1]): path for match, path in matches if match}
        found += [(path, split) for _, path in sorted(sizes.items())]
    if not found:
        raise FileNotFoundError(
            f"--in: no train/people<n>.jsonl or test/people<n>.jsonl in {folder}; make them with python -m "
            "kk.generate, or read any other file with --import FILE"
        )
    return found


def rows_to_write(
    files: Sequence[tuple[Path, str]], args: argparse.Namespace
) -> Iterator[tuple[str | None, dict[str, Any]]]:
    """(split, row) of every puzzle in `files`, pairs of a path and a way to split; None: it is on neither side.

    ValueError at the first bad row.
    """
    for path, how in files:
        for place, read in read_puzzles(path):
            if isinstance(read, Unread):
                raise ValueError(f"{place}: {read}")
            split = _split(read, how, place)
            system = read.system if args.keep_system else args.system
            row = to_row(read.puzzle, split or "", args.instruction, system, args.source)
            if args.cot:
                row["response"] = _response(read.puzzle, args, place)
            yield split, row


def _response(puzzle: dict[str, Any], args: argparse.Namespace, place: str) -> str | None:
    try:
        if args.cot == "steps":
            return step_response(puzzle)
        return trial_response(puzzle, args.haste, args.seed, args.cot_max_trials)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None


def _split(read: Imported, how: str, place: str) -> str | None:
    if how == "class":
        return split_of(parse_statements(read.puzzle["statements"]))
    if how != "file":
        return how
    if read.split is None:
        raise ValueError(
            f"{place}: --split file, but extra_info.split is neither train nor test; use --split train, test or class"
        )
    return read.split


def convert(args: argparse.Namespace) -> None:
    """Read everything, write the files, and say what was written. ValueError or OSError when nothing was."""
    if args.source_dir:
        files = puzzle_files(args.source_dir)
        wanted = tuple(dict.fromkeys(split for _, split in files))
    else:
        files = [(path, args.split) for path in args.imports]
        wanted = SPLITS if args.split in ("file", "class") else (args.split,)
    total = sum(count_rows(path) for path, _ in files)
    counts: Counter[str] = Counter()
    paths = {split: args.out / f"{split}.parquet" for split in wanted}
    with contextlib.ExitStack() as stack:
        writers = stack.enter_context(writing(paths, COT_SCHEMA if args.cot else SCHEMA))
        progress = stack.enter_context(bar())
        task = progress.add_task("puzzles", total=total)
        for split, row in rows_to_write(files, args):
            progress.advance(task)
            if split is None:
                counts["on neither side"] += 1
                continue
            writers[split].add(row)
            counts["unsolved"] += bool(args.cot) and row["response"] is None
        if empty := [split for split in wanted if not writers[split].rows]:
            raise ValueError(f"no {' and no '.join(empty)} rows in {', '.join(str(path) for path, _ in files)}")
        report = [f"{paths[s]}: {w.rows} rows, sha256 {w.finish()[:16]}" for s, w in writers.items()]
    print(*report, sep="\n")
    if left_out := counts["on neither side"]:
        print(f"{left_out} puzzles left out: alike to training puzzles in one way and to test puzzles in another")
    if counts["unsolved"]:
        print(f"{counts['unsolved']} rows without a response: over --cot-max-trials {args.cot_max_trials}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command line. SystemExit for one that makes no sense."""
    parser = argparse.ArgumentParser(prog="python -m kk.dataset", description="Puzzles as parquet files for training.")
    inputs = parser.add_mutually_exclusive_group(required=True)
    inputs.add_argument("--in", dest="source_dir", type=Path, help="folder with train/ and test/ of kk.generate")
    inputs.add_argument("--import", dest="imports", type=Path, nargs="+", help=".jsonl or .parquet files of puzzles")
    parser.add_argument("--out", type=Path, required=True, help="folder for train.parquet and test.parquet")
    parser.add_argument(
        "--split",
        choices=("file", "class", *SPLITS),
        help="where imported rows go: as their extra_info.split says; by kk.generate's rule, which never puts a "
        "relabelled training puzzle on the test side; or all to one side",
    )
    parser.add_argument("--source", default="kk_logic", help="data_source is this and _<people> (default: %(default)s)")
    parser.add_argument("--instruction", default="", help="text after each quiz, in the user's message")
    parser.add_argument("--system", default="", help="text of a system message before each quiz")
    parser.add_argument("--keep-system", action="store_true", help="imported rows keep their own system message")
    parser.add_argument(
        "--cot",
        choices=("trials", "steps"),
        nargs="?",
        const="trials",
        help="add the column response, a worked solution: by trial of all assignments (the default; what the shipped "
        "model learned from), or the puzzle's own cot_… fields, which stay short with many people",
    )
    parser.add_argument(
        "--haste", type=float, default=0.0, help="of trials: the probability to give up after a failure"
    )
    parser.add_argument("--seed", type=int, default=0, help="of their random streams (default: %(default)s)")
    parser.add_argument("--cot-max-trials", type=int, default=256, help="no response beyond (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.imports and not args.split:
        parser.error("--import needs --split: file, class, train or test")
    if args.source_dir and (args.split or args.keep_system):
        parser.error("--split and --keep-system are for --import: a folder of kk.generate is split already")
    if not 0 <= args.haste <= 1:
        parser.error(f"--haste {args.haste}: a probability, from 0 to 1")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    return exit_code(lambda: convert(args))


if __name__ == "__main__":
    sys.exit(main())

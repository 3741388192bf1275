"""Check files of puzzles: `python -m kk.verify FILE…`.

In the published schema, JSON lines or parquet, whoever made them.

Of every row: the listed solution solves the statements and nothing else does, by a solver of its own
(kk.second_solver); names, roles and texts agree. Of all rows: no puzzle stands twice (the same statements with the same
names), and no puzzle of one side is a puzzle of another with other people: the same truth tables when the people are
relabelled, in the same words or not (kk.split.class_of). A row's side is its extra_info.split, or else
"train", "test", "val" … as a word of its file's name or as its folder's name, or else the file itself.

Faults go to standard error, a line each beginning with file:line; the JSON summary goes to standard output. The exit
code is 1 when there is any fault.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kk.files import Unread, count_rows, place, read_rows
from kk.progress import bar
from kk.split import class_of
from kk.verify_rows import Fault, Puzzle, check_puzzle, read_puzzle

_SIDES = re.compile(r"(?<![a-z])(train|test|val|valid|validation|dev|eval)(?![a-z])")
_COLUMNS = (
    "quiz",
    "names",
    "knight_knave",
    "solution",
    "solution_text",
    "solution_text_format",
    "statements",
    "reward_model",
    "extra_info",
)


def side_of(path: Path, split: str | None) -> str:
    """ "train", "test" …, or the file's name when neither the row nor the path says."""
    named = _SIDES.search(path.stem.lower()) or _SIDES.fullmatch(path.parent.name.lower())
    return split or (named[1] if named else str(path))


class Verifier:
    """Rows of any number of files; remembers 8-byte hashes of them, and where they were."""

    def __init__(self) -> None:
        self.rows: Counter[str] = Counter()  # by file
        self.people: Counter[int] = Counter()
        self.faults: Counter[str] = Counter()
        self.isomorphic_within = 0  # rows that are isomorphic to an earlier row of their side
        self._puzzles: dict[bytes, str] = {}  # hash of statements and names -> place
        self._classes: dict[bytes, dict[str, str]] = {}  # class -> side -> place

    def check(self, path: Path) -> Iterator[str | None]:
        """The fault of each row of a file, "file:line: kind: …", or None."""
        for number, row in read_rows(path, _COLUMNS):
            self.rows[str(path)] += 1
            where = place(path, number)
            try:
                if isinstance(row, Unread):
                    raise Fault("unreadable", str(row))
                puzzle = read_puzzle(row)
                self.people[len(puzzle.names)] += 1
                check_puzzle(puzzle)
                self._compare(puzzle, where, side_of(path, puzzle.split))
            except RecursionError:
                self.faults["schema"] += 1
                yield f"{where}: schema: nested too deeply"
            except Fault as fault:
                self.faults[fault.kind] += 1
                yield f"{where}: {fault.kind}: {fault}"
            else:
                yield None

    def _compare(self, puzzle: Puzzle, where: str, side: str) -> None:
        """Remember a puzzle. Fault when it was there already, or is isomorphic to one of another side."""
        written = hashlib.blake2b(repr((puzzle.statements, puzzle.names)).encode(), digest_size=8).digest()
        first = self._puzzles.setdefault(written, where)
        places = self._classes.setdefault(class_of(puzzle.statements), {})
        elsewhere = [at for other, at in places.items() if other != side]
        self.isomorphic_within += side in places and first == where
        places.setdefault(side, where)
        if elsewhere:
            raise Fault("leak", f"isomorphic to {elsewhere[0]}, which is on another side than {side}")
        if first != where:
            raise Fault("duplicate", f"the same statements and names as {first}")

    def summary(self) -> dict[str, Any]:
        return {
            "ok": not self.faults,
            "rows": sum(self.rows.values()),
            "files": dict(self.rows),
            "people": {str(n): count for n, count in sorted(self.people.items())},
            "faults": dict(sorted(self.faults.items())),
            "isomorphic_within_a_side": self.isomorphic_within,
        }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m kk.verify", description="Check files of Knights and Knaves puzzles."
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help=".jsonl or .parquet")
    parser.add_argument("--max-faults", type=int, default=100, help="print at most so many (default: %(default)s)")
    args = parser.parse_args(argv)
    verifier, printed = Verifier(), 0
    try:
        if folder := next(filter(Path.is_dir, args.files), None):
            raise ValueError(f"{folder} is a folder; name files, such as {folder}/*.jsonl")
        total = sum(count_rows(path) for path in args.files)
        with bar() as progress:
            task = progress.add_task("puzzles", total=total)
            for path in sorted(args.files, key=lambda path: side_of(path, None) != "train"):  # leaks are the others'
                for fault in verifier.check(path):
                    progress.advance(task)
                    if fault is not None and printed < args.max_faults:
                        print(fault, file=sys.stderr)
                        printed += 1
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if (more := sum(verifier.faults.values()) - printed) > 0:
        print(f"and {more} more faults; --max-faults shows them", file=sys.stderr)
    print(json.dumps(verifier.summary(), indent=1))
    return 0 if not verifier.faults else 1


if __name__ == "__main__":
    sys.exit(main())

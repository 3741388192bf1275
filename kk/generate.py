"""Knights and Knaves puzzles as JSON lines.

    python -m kk.generate --people 3-14 --per-size 1100 --seed 1234 --out DIR

Makes DIR/train/people<n>.jsonl with --per-size puzzles and DIR/test/people<n>.jsonl with --test-per-size, in the
published schema; each has one solution. Training and test puzzles are never the same up to relabelling, nor in other
words with the same truth tables, whatever the seeds and sizes of the two runs (kk.split). `--split none` makes
DIR/people<n>.jsonl of all puzzles instead.

Rows of a side may repeat a class with other names or in another order, but never the same statements with the same
names; `--distinct class` gives each class once. Few people make few puzzles (train / test / all, those on neither side
too):

    people   classes              statements                  puzzles, with 60 names
    2        24 / 8 / 41          201 / 62 / 399              711,540 / 219,480 / 1,412,460
    3        1,423 / 590 / 2,430  153,050 / 27,957 / 304,276  over 10^9
The files are a function of the options but --workers. 8 bytes a puzzle are remembered; all else streams.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.progress import Progress

from kk import text
from kk.chunks import Spec
from kk.cli import exit_code
from kk.files import writing_text
from kk.grammar import PUBLISHED, Grammar
from kk.progress import bar
from kk.split import SPLITS, split_of
from kk.stream import ANY, Stream, Workers, check_supply
from kk.supply import DISTINCT, count_available, count_solvable
from kk.text import FRAMES, KNIGHTS, NAMES, Roles

__all__ = ["SPLITS", "count_available", "count_solvable", "iter_puzzles", "main", "parse_people", "split_of"]

_UPDATE_EVERY = 100  # lines a step of the progress bar


def iter_puzzles(
    n: int,
    seed: int,
    names: int | None = None,
    frames: int = len(FRAMES),
    split: str | None = None,
    *,
    roles: tuple[Roles, ...] = (KNIGHTS,),
    grammar: Grammar = PUBLISHED,
    distinct: str = "puzzle",
    cot: bool = True,
) -> Iterator[dict[str, Any]]:
    """Puzzles of n people with a unique solution, in the published schema, no two alike in statements and names.

    The stream depends on these arguments only. `names`: draw from the first so many of `kk.names` (default: 60, or n);
    `frames`: word statements with the first so many of `kk.text.FRAMES`; `split`: only puzzles of that side; `roles`:
    each puzzle draws one; `distinct`: "class" for no two isomorphic; `cot`: with the cot_… fields. It ends when two
    or three people have no further puzzle, and remembers 8 bytes a puzzle.
    """
    if split not in (None, *SPLITS):
        raise ValueError(f"split={split!r}: must be one of {', '.join(SPLITS)}, or None for both")
    if distinct not in DISTINCT:
        raise ValueError(f"distinct={distinct!r}: must be one of {', '.join(DISTINCT)}")
    spec = Spec(n, seed, _names(names, n), frames, roles, grammar, cot)
    for _, line in Stream(spec, {split or ANY: math.inf}, distinct):
        yield json.loads(line)


def _names(asked: int | None, n: int) -> int:
    return max(len(NAMES), n) if asked is None else asked


def parse_people(spec: str) -> list[int]:
    """ "2-5" or "3,5,8" or "2-4,7" as sorted numbers of people."""
    sizes: set[int] = set()
    for part in spec.split(","):
        low, _, high = part.partition("-")
        if not (low.isdecimal() and (high or low).isdecimal()) or int(high or low) < int(low):
            raise ValueError(f"--people {spec}: write sizes like 2-5 or 3,5,8")
        sizes.update(range(int(low), int(high or low) + 1))
    return sorted(sizes)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m kk.generate", description="Knights and Knaves puzzles as JSON lines."
    )
    add = parser.add_argument
    add("--people", default="2-8", help="sizes, such as 2-5 or 3,5,8 (default: %(default)s)")
    add("--per-size", type=int, default=900, help="training puzzles a size, or all with --split none (default: 900)")
    add("--test-per-size", type=int, default=100, help="test puzzles a size (default: %(default)s)")
    add("--seed", type=int, default=1234, help="each size has its own stream of this seed (default: %(default)s)")
    add("--out", type=Path, required=True, help="folder for train/ and test/")
    add(
        "--split",
        nargs="?",
        const="both",
        default="both",
        choices=("both", *SPLITS, "none"),
        help="sides to write; none: a file a size of all puzzles, whatever their side (default: both)",
    )
    add(
        "--distinct",
        choices=DISTINCT,
        default="puzzle",
        help="no two rows of a file alike in statements and names, or in class (default: %(default)s)",
    )
    add("--workers", type=int, default=1, help="processes; the files do not depend on it (default: %(default)s)")
    add("--names", type=int, help="use the first so many names, also generated ones (default: 60, or the people)")
    add("--frames", type=int, default=len(FRAMES), help="and sentence frames (default: all %(default)s)")
    add(
        "--roles",
        default="knight/knave",
        help="words such as saint/sinner; of several with commas each puzzle draws "
        "one; all: the published pairs (default: %(default)s)",
    )
    add("--depth", type=int, default=2, help="levels of nesting of statements (default: %(default)s)")
    add("--width", type=int, default=2, help='most operands of "and" and "or" (default: %(default)s)')
    add("--no-constants", action="store_true", help="no self-contradictions and tautologies")
    add("--no-repeats", action="store_true", help="no statement names somebody twice")
    add("--no-cot", action="store_true", help="without the cot_... fields")
    return parser.parse_args(argv)


def streams(args: argparse.Namespace, workers: Workers | None = None) -> list[Stream]:
    """One stream a size. ValueError for what cannot be made."""
    per_side = {"train": args.per_size, "test": args.test_per_size}
    wanted = (
        {ANY: args.per_size}
        if args.split == "none"
        else {side: count for side, count in per_side.items() if args.split in ("both", side)}
    )
    for option, value in (("--per-size", args.per_size), ("--test-per-size", args.test_per_size)):
        if value < 0:
            raise ValueError(f"{option} {value}: must be at least 0")
    if args.workers < 1:
        raise ValueError(f"--workers {args.workers}: must be at least 1")
    grammar = Grammar(args.depth, args.width, not args.no_constants, not args.no_repeats)
    roles, made = text.parse_roles(args.roles), []
    for n in parse_people(args.people):
        spec = Spec(n, args.seed, _names(args.names, n), args.frames, roles, grammar, not args.no_cot)
        made.append(Stream(spec, wanted, args.distinct, workers))
        check_supply(spec, wanted, args.distinct)
    return made


def write(stream: Stream, out: Path, progress: Progress) -> None:
    """Write the files of one size; they appear under their names only when both are whole."""
    n = stream.spec.n
    task = progress.add_task(f"{n} people", total=sum(stream.wanted.values()))
    with contextlib.ExitStack() as stack:
        files = {
            side: stack.enter_context(writing_text((out if side == ANY else out / side) / f"people{n}.jsonl"))
            for side in stream.wanted
        }
        for number, (side, line) in enumerate(stream, 1):
            files[side].write(line + "\n")
            if number % _UPDATE_EVERY == 0:
                progress.update(task, completed=number)
    progress.update(task, completed=sum(stream.counts.given.values()))


def run(args: argparse.Namespace) -> None:
    """Write all files. ValueError or OSError, before any is begun where it can be told."""
    streams(args)
    with contextlib.ExitStack() as stack:
        workers = stack.enter_context(Workers(args.workers)) if args.workers > 1 else None
        progress = stack.enter_context(bar())
        for stream in streams(args, workers):
            write(stream, args.out, progress)
            print(f"people{stream.spec.n}: {stream.counts}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    return exit_code(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())

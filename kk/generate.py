"""Knights and Knaves puzzles as JSON lines: `python -m kk.generate --people 2-5 --per-size 400 --seed 1 --out DIR`.

Makes DIR/train/people<n>.jsonl and DIR/test/people<n>.jsonl. Training and test puzzles are never the same up to
relabelling, whatever the seeds and sizes of the two runs: a puzzle's split is a hash of its canonical form
(`kk.puzzle.canonical`), one class in five going to the test side. Rows of a split may repeat a class with other names
or in another order, but never the same statements with the same names. Few people make few classes:

    people   classes train / test   statements train / test   puzzles, with 60 names
    2        56 / 21                287 / 112                 1,015,980 / 396,480
    3        9,648 / 2,406          244,422 / 59,854          over 10^10 / over 10^10
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import itertools
import json
import math
import os
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rich.progress import MofNCompleteColumn, Progress

from kk import text
from kk.puzzle import Statements, all_statements, canonical, random_statements, unique_solution

SPLITS = ("train", "test")
TEST_SHARE = 5  # one class in TEST_SHARE is a test class

# People -> number of puzzles from which on it is worth counting how many exist at all. Three people have over 300,000
# in either split, and four over 10^9: more than anybody asks for.
_COUNT_FROM = {2: 0, 3: 50_000}


def split_of(statements: Statements) -> str:
    """ "train" or "test": a function of the puzzle's class alone."""
    digest = hashlib.blake2b(repr(canonical(statements)).encode(), digest_size=8).digest()
    return "train" if int.from_bytes(digest, "big") % TEST_SHARE else "test"


@functools.cache
def count_solvable(n: int, split: str | None = None) -> int:
    """How many statement tuples of n <= 3 people have a unique solution and fall into `split` (None: either).

    By enumeration: at once for two people, ten seconds or so for three.
    """
    every = itertools.product(*(tuple(all_statements(speaker, n)) for speaker in range(n)))
    return sum(unique_solution(s) is not None and split in (None, split_of(s)) for s in every)


def count_available(n: int, names: int, split: str | None = None) -> int:
    """How many distinct puzzles (statements with names) of n <= 3 people there are."""
    return count_solvable(n, split) * math.perm(names, n)


def iter_puzzles(
    n: int, seed: int, names: int = len(text.NAMES), frames: int = len(text.FRAMES), split: str | None = None
) -> Iterator[dict]:
    """Puzzles of n people with a unique solution, in the published schema, no two alike in statements and names.

    The stream depends on these arguments only. `names`: draw from the first so many of `kk.text.NAMES`; `frames`:
    word statements with the first so many of `kk.text.FRAMES`; `split`: only puzzles of that side. It ends when
    two or three people have no further puzzle; it remembers what it gave out (about 100 bytes a puzzle).
    """
    _check(n, names, frames, split)
    rng = random.Random(f"kk/{seed}/{n}/{split}")  # only random() is used: the same numbers in every Python
    seen: set[bytes] = set()
    limit = math.inf
    while len(seen) < limit:
        if len(seen) == _COUNT_FROM.get(n):
            limit = count_available(n, names, split)
            if len(seen) >= limit:
                return
        statements, solution = _solvable(rng, n, split)
        people = _sample(rng, names, n)
        written = repr(statements)
        key = hashlib.blake2b(f"{written}{people}".encode(), digest_size=16).digest()
        wording = [text.FRAMES[int(rng.random() * frames)] for _ in range(n)]
        if key not in seen:
            seen.add(key)
            names_drawn = [text.NAMES[i] for i in people]
            quiz = text.quiz_text(statements, names_drawn, wording)
            yield _row(quiz, names_drawn, solution, written, index=len(seen) - 1)


def _check(n: int, names: int, frames: int, split: str | None) -> None:
    if n < 2:
        raise ValueError(f"people={n}: no puzzle of fewer than 2 people has a unique solution")
    if not n <= names <= len(text.NAMES):
        raise ValueError(f"names={names}: must be from people={n} to {len(text.NAMES)}, the number of names there are")
    if not 1 <= frames <= len(text.FRAMES):
        raise ValueError(f"frames={frames}: must be from 1 to {len(text.FRAMES)}, the number of sentence frames")
    if split not in (None, *SPLITS):
        raise ValueError(f"split={split!r}: must be one of {', '.join(SPLITS)}, or None for both")


def _solvable(rng: random.Random, n: int, split: str | None) -> tuple[Statements, tuple[bool, ...]]:
    """The next statements with a unique solution and of the wanted side, with that solution."""
    while True:
        statements = random_statements(rng, n)
        solution = unique_solution(statements)
        if solution is not None and split in (None, split_of(statements)):
            return statements, solution


def _sample(rng: random.Random, population: int, k: int) -> list[int]:
    """k distinct numbers below `population`, in random order (the first steps of a Fisher-Yates shuffle)."""
    pool = list(range(population))
    for i in range(k):
        j = i + int(rng.random() * (population - i))
        pool[i], pool[j] = pool[j], pool[i]
    return pool[:k]


def _row(quiz: str, names: list[str], solution: Sequence[bool], statements: str, index: int) -> dict[str, object]:
    return {
        "quiz": quiz,
        "names": names,
        "knight_knave": text.KNIGHT_KNAVE,
        "solution": list(solution),
        "solution_text": text.solution_text(solution, names),
        "solution_text_format": text.solution_text_format(solution, names),
        "statements": statements,
        "index": index,
    }


def parse_people(spec: str) -> list[int]:
    """ "2-5" or "3,5,8" or "2-4,7" as sorted numbers of people."""
    sizes: set[int] = set()
    for part in spec.split(","):
        low, _, high = part.partition("-")
        if not (low.isdecimal() and (high or low).isdecimal()) or int(high or low) < int(low):
            raise ValueError(f"--people {spec}: write sizes like 2-5 or 3,5,8")
        sizes.update(range(int(low), int(high or low) + 1))
    return sorted(sizes)


def write_split(path: Path, puzzles: Iterator[dict], count: int, advance: Callable[[], object]) -> None:
    """Write `count` puzzles as JSON lines; the file appears under its name only when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with unfinished.open("w", encoding="utf-8") as file:
            for row in itertools.islice(puzzles, count):
                file.write(json.dumps(row) + "\n")
                advance()
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def check_supply(n: int, names: int, wanted: dict[str, int]) -> None:
    """ValueError with the number available when a split of few people cannot have so many distinct puzzles."""
    for split, count in wanted.items():
        if count > _COUNT_FROM.get(n, math.inf) and count > (there_are := count_available(n, names, split)):
            raise ValueError(
                f"people={n}: {count} {split} puzzles asked for, but with {names} names only {there_are} distinct ones "
                f"exist; ask for fewer, or raise --names (at most {len(text.NAMES)})"
            )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m kk.generate", description="Knights and Knaves puzzles as JSON lines."
    )
    parser.add_argument("--people", default="2-8", help="sizes, such as 2-5 or 3,5,8 (default: %(default)s)")
    parser.add_argument("--per-size", type=int, default=900, help="training puzzles a size (default: %(default)s)")
    parser.add_argument("--test-per-size", type=int, default=100, help="test puzzles a size (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1234, help="each size and split has its own stream of this seed")
    parser.add_argument("--names", type=int, default=len(text.NAMES), help="use the first so many names (default: all)")
    parser.add_argument("--frames", type=int, default=len(text.FRAMES), help="and sentence frames (default: all)")
    parser.add_argument("--out", type=Path, required=True, help="folder for train/ and test/")
    args = parser.parse_args(argv)
    wanted = {"train": args.per_size, "test": args.test_per_size}
    try:
        sizes = parse_people(args.people)
        for n in sizes:
            _check(n, args.names, args.frames, None)
            check_supply(n, args.names, wanted)
    except ValueError as error:
        parser.error(str(error))
    with Progress(*Progress.get_default_columns(), MofNCompleteColumn()) as progress:
        for n, split in itertools.product(sizes, SPLITS):
            task = progress.add_task(f"{split}, {n} people", total=wanted[split])
            puzzles = iter_puzzles(n, args.seed, args.names, args.frames, split)
            path = args.out / split / f"people{n}.jsonl"
            write_split(path, puzzles, wanted[split], functools.partial(progress.advance, task))


if __name__ == "__main__":
    main()

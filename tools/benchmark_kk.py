"""How fast Knights and Knaves puzzles are made and judged, beside the plain way to do it.

    python tools/benchmark_kk.py --people 2-14 --seconds 5     puzzles a second
    python tools/benchmark_kk.py --agree 100000                two solvers on as many random puzzles of all sizes

Puzzles with one solution a second of CPU time, in one process, as JSON lines with their texts: ours with and without
the reasoning (the cot_… fields), and a baseline that draws statements and evaluates all 2^n assignments recursively, as
the published generator does. --agree compares the generator's solver with that of kk.verify.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console
from rich.progress import track
from rich.table import Table

from kk import text
from kk.batch import Draws, space
from kk.batch_solver import solve_many
from kk.chunks import Spec
from kk.generate import parse_people
from kk.grammar import PUBLISHED, Statement, Statements, random_statements
from kk.second_solver import solutions
from kk.stream import ANY, Stream
from kk.trace import holds


# --------------------------------------------------------------------------------------------------------- generation
def brute_force(statements: Statements) -> list[tuple[bool, ...]]:
    """All solutions: every one of the 2^n assignments, every statement evaluated recursively until one does not fit."""
    return [
        roles
        for roles in itertools.product((False, True), repeat=len(statements))
        if all(holds(statement, roles) == role for statement, role in zip(statements, roles))
    ]


def baseline(n: int, seed: int) -> Iterator[str]:
    """Puzzles with one solution as JSON lines, drawn and solved one by one."""
    rng = random.Random(seed)
    for index in itertools.count():
        statements, found = (), []
        while len(found) != 1:
            statements = random_statements(rng, n)
            found = brute_force(statements)
        yield json.dumps(_row(statements, found[0], rng, index))


def _row(statements: Sequence[Statement], solution: tuple[bool, ...], rng: random.Random, index: int) -> dict:
    names = rng.sample(text.NAMES, len(statements))
    return {
        "quiz": text.quiz_text(statements, names, [rng.choice(text.FRAMES) for _ in names]),
        "names": names,
        "knight_knave": text.KNIGHT_KNAVE,
        "solution": list(solution),
        "solution_text": text.solution_text(solution, names),
        "solution_text_format": text.solution_text_format(solution, names),
        "statements": repr(statements),
        "index": index,
    }


def ours(n: int, seed: int, cot: bool, side: str = ANY) -> Iterator[str]:
    """JSON lines of kk.generate."""
    return (line for _, line in Stream(Spec(n, seed, cot=cot), {side: float("inf")}))


def rate(make: Callable[[], Iterator[str]], seconds: float) -> float:
    """Lines a second of CPU time, the best of three runs of a third of `seconds`; tables are made before."""
    best = 0.0
    for _ in range(3):
        lines = make()
        count, begin = 0, time.process_time()
        while (took := time.process_time() - begin) < seconds / 3 or not count:
            next(lines)
            count += 1
        best = max(best, count / took)
    return best


def generation(args: argparse.Namespace) -> None:
    table = Table("people", "with reasoning /s", "training side /s", "without reasoning /s", "brute force /s", "times")
    for n in track(parse_people(args.people), "sizes", console=Console(stderr=True)):
        whole, train, plain = (
            rate(lambda n=n, cot=cot, side=side: ours(n, args.seed, cot, side), args.seconds)
            for cot, side in ((True, ANY), (True, "train"), (False, ANY))
        )
        slow = rate(lambda n=n: baseline(n, args.seed), args.seconds)
        figures = (f"{value:,.0f}" for value in (whole, train, plain))
        table.add_row(str(n), *figures, f"{slow:,.2f}" if slow < 100 else f"{slow:,.0f}", f"{plain / slow:,.0f}")
    Console().print(table)


# -------------------------------------------------------------------------------------------------------------- agree
def agree(args: argparse.Namespace) -> int:
    """Exit code 1 when the two solvers differ on any of the random puzzles."""
    sizes, outcomes, wrong = parse_people(args.people), Counter(), 0
    for place, n in enumerate(track(sizes, "sizes", console=Console(stderr=True))):
        share = args.agree * (place + 1) // len(sizes) - args.agree * place // len(sizes)
        statements = space(n, PUBLISHED)
        codes = statements.draw(Draws(f"agree/{args.seed}/{n}"), share)
        counts, roles = solve_many(statements, codes)
        for row, count, solution in zip(codes.tolist(), counts.tolist(), roles.tolist()):
            found = solutions([statements.statements[code] for code in row])
            outcomes[n, count] += 1
            wrong += len(found) != count or (count == 1 and list(found[0]) != solution)
    table = Table("people", "no solution", "one", "several")
    for n in sizes:
        table.add_row(str(n), *(f"{outcomes[n, count]:,}" for count in range(3)))
    Console().print(table)
    print(f"{outcomes.total():,} puzzles: {wrong} on which the two solvers differ")
    return 1 if wrong else 0


# ------------------------------------------------------------------------------------------------------------- reward
def reward_times(args: argparse.Namespace) -> None:
    """Print reward time against the length of a response: filled in with the rewards' side of this benchmark."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--people", default="2-14", help="sizes, such as 2-5 or 3,5,8 (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=3.0, help="CPU time of each figure (default: %(default)s)")
    parser.add_argument("--agree", type=int, metavar="N", help="only this: solve N random puzzles with two solvers")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    if args.agree is not None:
        return agree(args)
    generation(args)
    reward_times(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Puzzles a second, ours and the plain way; and two solvers on the same puzzles."""

from __future__ import annotations

import itertools
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console
from rich.progress import track

from kk import text
from kk.batch import Draws, space
from kk.batch_solver import solve_many
from kk.chunks import Spec
from kk.grammar import PUBLISHED, Statement, Statements, random_statements
from kk.second_solver import solutions
from kk.stream import ANY, Stream
from kk.trace import holds
from kk_bench.tables import show


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


def generation(sizes: Sequence[int], seconds: float, seed: int) -> None:
    """Print puzzles a second, each figure measured for so many seconds."""
    rows = []
    for n in track(sizes, "sizes", console=Console(stderr=True)):
        whole, train, plain = (
            rate(lambda n=n, cot=cot, side=side: ours(n, seed, cot, side), seconds)
            for cot, side in ((True, ANY), (True, "train"), (False, ANY))
        )
        slow = rate(lambda n=n: baseline(n, seed), seconds)
        figures = (f"{value:,.0f}" for value in (whole, train, plain))
        rows.append([str(n), *figures, f"{slow:,.2f}" if slow < 100 else f"{slow:,.0f}", f"{plain / slow:,.0f}"])
    show(
        "Puzzles with one solution a second of CPU time, one process",
        [
            "people",
            "with reasoning",
            "with reasoning, training side",
            "without",
            "brute force",
            "without / brute force",
        ],
        rows,
    )


def agreement(sizes: Sequence[int], puzzles: int, seed: int) -> int:
    """Print on how many of so many random puzzles the two solvers differ; exit code 1 when on any."""
    outcomes, wrong = Counter(), 0
    for place, n in enumerate(track(sizes, "sizes", console=Console(stderr=True))):
        share = puzzles * (place + 1) // len(sizes) - puzzles * place // len(sizes)
        statements = space(n, PUBLISHED)
        codes = statements.draw(Draws(f"agree/{seed}/{n}"), share)
        counts, roles = solve_many(statements, codes)
        for row, count, solution in zip(codes.tolist(), counts.tolist(), roles.tolist()):
            found = solutions([statements.statements[code] for code in row])
            outcomes[n, count] += 1
            wrong += len(found) != count or (count == 1 and list(found[0]) != solution)
    rows = [[str(n), *(f"{outcomes[n, count]:,}" for count in range(3))] for n in sizes]
    show(
        f"{outcomes.total():,} random puzzles: {wrong} on which the two solvers differ",
        ["people", "no solution", "one", "several"],
        rows,
    )
    return 1 if wrong else 0

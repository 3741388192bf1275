"""Puzzles changed in one place, to tell reasoning from memory: `python -m kk.perturb --in FILE --kind leaf --out FILE`.

A model that has learned puzzles by heart answers the changed puzzle as it did the first (arXiv:2410.23123). Two kinds:

    statement   one person says something else
    leaf        one claim about one person, in one statement, is another one

The changed puzzle has one solution, and it is not that of the first. Everything else stays, the names and the wording
of the other statements too, and so does `index`, which joins a puzzle to its changes. Each puzzle's random stream is a
function of (seed, kind, puzzle) alone. Some puzzles of two or three people have no such change; they are counted.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import random
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kk import text
from kk.changes import KINDS, Change, changes
from kk.cli import exit_code
from kk.files import Unread, count_rows, writing_text
from kk.grammar import Statements
from kk.importing import parse_statements, read_puzzles
from kk.progress import bar
from kk.reasoning import reason
from kk.split import class_of


def reworded(puzzle: Mapping[str, Any], before: Statements, change: Change) -> str:
    """The puzzle's quiz with the changed person's claim in new words, and not a letter else.

    Claims are looked for in the people's order; nothing between two of them may say who is a knight or a knave.
    ValueError when the quiz does not word its statements as this project or the published data do.
    """
    quiz, names, words = puzzle["quiz"], puzzle["names"], roles_of(puzzle)
    roles = _mention(words)
    end = max(quiz.find("inhabitants: "), 0)
    place = end, end
    for person, statement in enumerate(before):
        claim = text.claim_text(statement, names, words)
        begin = min(_find(quiz, claim, end), _find(quiz, _capital(claim), end))
        if begin == len(quiz) or roles.search(quiz, end, begin):
            raise ValueError(f"{names[person]}'s statement {claim!r} is not where it should be in the quiz")
        end = begin + len(claim)
        if person == change.person:
            place = begin, end
    if len(roles.findall(quiz, end)) not in (0, 2):  # "So who is a knight and who is a knave?"
        raise ValueError(f"the quiz goes on after {names[-1]}'s statement: {quiz[end:][:60]!r}")
    claim = text.claim_text(change.statements[change.person], names, words)
    quoted = quiz[: place[0]].endswith('"')
    return quiz[: place[0]] + (_capital(claim) if quoted else claim) + quiz[place[1] :]


def roles_of(puzzle: Mapping[str, Any]) -> text.Roles:
    """The puzzle's words for its roles. ValueError when they have other articles than they should."""
    given = puzzle["knight_knave"]
    roles = text.Roles(given["knight"], given["knave"])
    if (given["a_knight"], given["a_knave"]) != (roles.a(True), roles.a(False)):
        raise ValueError(f"knight_knave says {given['a_knight']!r} and {given['a_knave']!r} for {roles}")
    return roles


@functools.cache
def _mention(roles: text.Roles) -> re.Pattern[str]:
    """Finds the roles with their articles."""
    return re.compile(rf"\b(?:{re.escape(roles.a(True))}|{re.escape(roles.a(False))})\b")


def _find(quiz: str, claim: str, start: int) -> int:
    """Where the claim begins; the quiz's length when it does not occur."""
    found = quiz.find(claim, start)
    return len(quiz) if found < 0 else found


def _capital(claim: str) -> str:
    return claim[:1].upper() + claim[1:]


def changed_puzzle(puzzle: Mapping[str, Any], before: Statements, change: Change) -> dict[str, Any]:
    """A row of the published schema, with the reasoning of kk.reasoning. ValueError as in `reworded`."""
    names, roles, statements = puzzle["names"], roles_of(puzzle), change.statements
    return {
        "quiz": reworded(puzzle, before, change),
        "names": names,
        "knight_knave": puzzle["knight_knave"],
        "solution": list(change.solution),
        "solution_text": text.solution_text(change.solution, names, roles),
        "solution_text_format": text.solution_text_format(change.solution, names, roles),
        "cot_head": text.COT_HEAD,
        "cot_repeat_steps": [text.step_text(step, statements, names, roles) for step in reason(statements)],
        "cot_foot": text.COT_FOOT,
        "statements": repr(statements),
        "index": puzzle["index"],
    }


def perturb(
    path: Path, kind: str, seed: int, per_puzzle: int = 1, known: frozenset[bytes] = frozenset()
) -> Iterator[list[dict[str, Any]]]:
    """The changed puzzles of each puzzle of a file, at most `per_puzzle`, [] when there is none.

    known: classes (kk.split.class_of) that no changed puzzle may be of. ValueError with the place of a bad row.
    """
    for place, read in read_puzzles(path):
        if isinstance(read, Unread):
            raise ValueError(f"{place}: {read}")
        before = parse_statements(read.puzzle["statements"])
        rng = random.Random(f"kk/perturb/{seed}/{kind}/{read.puzzle['names']}/{before}")
        found = (
            change for change in changes(before, kind, rng) if not known or class_of(change.statements) not in known
        )
        try:
            yield [changed_puzzle(read.puzzle, before, change) for change in itertools.islice(found, per_puzzle)]
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None


def classes(path: Path) -> frozenset[bytes]:
    """The classes of a file's puzzles."""
    return frozenset(
        class_of(parse_statements(read.puzzle["statements"]))
        for _, read in read_puzzles(path)
        if not isinstance(read, Unread)
    )


def run(args: argparse.Namespace) -> None:
    """Write the changed puzzles, and say how many there are. ValueError or OSError when nothing was written."""
    if args.per_puzzle < 1:
        raise ValueError(f"--per-puzzle {args.per_puzzle}: must be at least 1")
    known = classes(args.source) if args.new_classes else frozenset()
    n_puzzles = n_changed = n_without = 0
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(writing_text(args.out))
        progress = stack.enter_context(bar())
        task = progress.add_task(f"{args.kind} of {args.source.name}", total=count_rows(args.source))
        for rows in perturb(args.source, args.kind, args.seed, args.per_puzzle, known):
            file.writelines(json.dumps(row) + "\n" for row in rows)
            n_puzzles, n_changed, n_without = n_puzzles + 1, n_changed + len(rows), n_without + (not rows)
            progress.advance(task)
        if not n_changed:
            raise ValueError(f"--in {args.source}: none of its {n_puzzles} puzzles has a change of one {args.kind}")
    print(f"{args.out}: {n_changed} changed puzzles of {n_puzzles}; {n_without} have no change of one {args.kind}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kk.perturb", description="Puzzles changed in one place.")
    parser.add_argument("--in", dest="source", type=Path, required=True, help="puzzles: .jsonl or published .parquet")
    parser.add_argument("--kind", choices=KINDS, required=True, help="what changes: a person's statement, or one leaf")
    parser.add_argument("--out", type=Path, required=True, help=".jsonl file of the changed puzzles")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--per-puzzle", type=int, default=1, help="changes of a puzzle at most (default: %(default)s)")
    parser.add_argument("--new-classes", action="store_true", help="none that is a relabelling of a puzzle of --in")
    args = parser.parse_args(argv)
    return exit_code(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())

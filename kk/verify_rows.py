"""What a row of a file of puzzles claims, and whether that is true by itself. `kk.verify` compares rows."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from kk.files import Unread
from kk.importing import parse_statements
from kk.second_solver import solutions
from kk.text import KNIGHT_KNAVE


class Fault(ValueError):
    """What is wrong with a row: a kind, to be counted, and the rest of the sentence."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Puzzle(NamedTuple):
    """What a row says."""

    names: list[str]
    solution: list[bool]  # True: a knight
    statements: tuple
    split: str | None
    texts: dict[str, str]  # quiz and solution_text, if there
    roles: tuple[str, str]  # "a knight", "a knave"


def read_puzzle(row: Mapping[str, Any]) -> Puzzle:
    """A row of JSON lines (names, solution, statements …) or of parquet (reward_model.ground_truth, extra_info)."""
    info = row.get("extra_info") or {}
    if not isinstance(info, Mapping):
        raise Fault("schema", f"extra_info is {info!r:.60}, not an object")
    truth = row if row.get("statements") is not None else _ground_truth(row.get("reward_model"))
    roles = _roles(row.get("knight_knave") or KNIGHT_KNAVE)
    names, solution = _listed(truth.get("solution_text_format"), roles)
    for field, said in (("names", names), ("solution", solution)):
        given = row.get(field, info.get(field))
        if given is not None and given != said:
            raise Fault("text", f"{field} {given!r:.80} disagrees with solution_text_format")
    texts = {field: row.get(field, info.get(field)) for field in ("quiz", "solution_text")}
    for field, value in texts.items():
        if value is not None and not isinstance(value, str):
            raise Fault("schema", f"{field} is {value!r:.60}, not a text")
    split = info.get("split")
    return Puzzle(
        names,
        solution,
        _statements(truth.get("statements"), len(names)),
        split if split else None,
        {field: value for field, value in texts.items() if value is not None},
        roles,
    )


def _roles(words: Any) -> tuple[str, str]:
    knight, knave = (words.get(key) if isinstance(words, Mapping) else None for key in ("a_knight", "a_knave"))
    if not (isinstance(knight, str) and isinstance(knave, str) and knight and knave and knight != knave):
        raise Fault("schema", f"knight_knave is {words!r:.60}, without a_knight and a_knave")
    return knight, knave


def _ground_truth(model: Any) -> Mapping[str, Any]:
    truth = model.get("ground_truth") if isinstance(model, Mapping) else None
    if isinstance(truth, str):
        try:
            truth = json.loads(truth)
        except (ValueError, RecursionError):
            truth = None
    if not isinstance(truth, Mapping):
        raise Fault("schema", "neither statements nor a reward_model.ground_truth that is an object")
    return truth


def _listed(listing: Any, roles: tuple[str, str]) -> tuple[list[str], list[bool]]:
    """Names and roles of "(1) Zoey is a knave\\n(2) …"."""
    if not isinstance(listing, str):
        raise Fault("schema", f"solution_text_format is {listing!r:.60}, not a text")
    names, solution = [], []
    for number, line in enumerate(listing.split("\n"), 1):
        name, is_, role = line.removeprefix(f"({number}) ").rpartition(" is ")
        if not line.startswith(f"({number}) ") or not is_ or role not in roles or not name or name in names:
            raise Fault("text", f"solution_text_format has {line!r:.60} as line {number}")
        names.append(name)
        solution.append(role == roles[0])
    return names, solution


def _statements(text: Any, people: int) -> tuple:
    if not isinstance(text, str):
        raise Fault("schema", f"statements is {text!r:.60}, not a text")
    try:
        statements = parse_statements(text)
    except Unread as reason:
        raise Fault("schema", str(reason)) from None
    if len(statements) != people:
        raise Fault("schema", f"{len(statements)} statements of {people} people")
    return statements


def check_puzzle(puzzle: Puzzle) -> None:
    """Raises the first Fault of a puzzle by itself."""
    found = solutions(puzzle.statements)
    listed = tuple(puzzle.solution)
    if not found:
        raise Fault("unsolvable", "the statements have no solution")
    if len(found) > 1:
        other = found[0] if found[0] != listed else found[1]
        raise Fault("ambiguous", f"the statements have more than one solution: knights {_knights(puzzle, other)}, too")
    if found[0] != listed:
        raise Fault("wrong", f"the listed solution is wrong: the knights are {_knights(puzzle, found[0])}")
    if (told := puzzle.texts.get("solution_text")) is not None:
        for name, is_knight in zip(puzzle.names, listed):
            right, wrong = (f"{name} is {role}" for role in (puzzle.roles if is_knight else puzzle.roles[::-1]))
            if right not in told or re.search(rf"(?<!\w){re.escape(wrong)}(?!\w)", told):
                raise Fault("text", f"solution_text does not say that {right}")
    quiz = puzzle.texts.get("quiz")
    if quiz is not None and (absent := [name for name in puzzle.names if name not in quiz]):
        raise Fault("text", f"the quiz does not speak of {absent[0]!r}")


def _knights(puzzle: Puzzle, roles: Sequence[bool]) -> str:
    return ", ".join(name for name, is_knight in zip(puzzle.names, roles) if is_knight) or "nobody"

"""Read puzzles out of files: our own JSON lines, and the JSON lines and parquet files that others have published.

Every puzzle is checked before it is passed on: the listed solution must be the only one of its statements, and the
quiz must speak of the listed people. The published parquet files hold text of a chat template inside the user's
message; exactly the wrappings below are taken off, and any other is refused.
"""

from __future__ import annotations

import ast
import functools
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from kk.files import Unread, place, read_rows
from kk.puzzle import unique_solution
from kk.text import KNIGHT_KNAVE

# A system message and a user message in ChatML, with or without the assistant's turn opened after them.
_CHATML = re.compile(
    r"<\|im_start\|>system\n(?P<system>[^|]*)<\|im_end\|>\n<\|im_start\|>user\n(?P<quiz>[^|]*?)\n"
    r"(?:<\|im_end\|>\n<\|im_start\|>assistant\n(?:<think>)?)?"
)
# The wrapping for models without a chat template.
_PLAIN = re.compile(r"(?P<system>The user asks a question, (?s:.*))\n\nUser:(?P<quiz>[^\n]*)\nAssistant: <think>")
# What only a chat template may put into a prompt.
TEMPLATE_TEXT = re.compile(r"<\|[\w ]+\|>|\[/?INST\]|<(?:start|end)_of_turn>|\nAssistant:")

_COLUMNS = (
    "prompt",
    "reward_model",
    "extra_info",
    "quiz",
    "names",
    "knight_knave",
    "solution",
    "index",
    "solution_text_format",
    "statements",
)
COT = ("cot_head", "cot_repeat_steps", "cot_foot")  # a solution in words: text, list of texts, text


class Imported(NamedTuple):
    """One checked puzzle."""

    puzzle: dict[str, Any]  # quiz, names, knight_knave, solution, solution_text_format, statements, index; COT if there
    split: str | None  # "train" or "test" when the row says so
    system: str  # the system message that came with it, or ""


def read_puzzles(path: Path) -> Iterator[tuple[str, Imported | Unread]]:
    """(place, puzzle or the reason why it is none) of every row of a file."""
    for number, row in read_rows(path, (*_COLUMNS, *COT)):
        if isinstance(row, Unread):
            yield place(path, number), row
            continue
        try:
            yield place(path, number), imported(row, number)
        except Unread as reason:
            yield place(path, number), reason


def imported(row: Mapping[str, Any], number: int = 0) -> Imported:
    """A row of the published schemas as a checked puzzle. Raises Unread with the reason.

    number: what the puzzle's index becomes when the row has none.
    """
    info = row.get("extra_info") or {}
    if not isinstance(info, Mapping):
        raise Unread(f"extra_info is {info!r:.60}, not an object")
    if row.get("prompt") is not None:
        quiz, system = _unwrapped(row["prompt"], row.get("quiz") or info.get("quiz"))
        truth = _truth(row.get("reward_model"))
    else:
        quiz, system, truth = _text(row, "quiz"), "", row
    words = _words(row.get("knight_knave"))
    listing, statements = _text(truth, "solution_text_format"), _text(truth, "statements")
    names, roles = _listed(listing, words)
    for field, value in (("names", names), ("solution", roles)):
        if (said := row.get(field, info.get(field))) is not None and said != value:
            raise Unread(f"{field} {said!r:.80} disagree with solution_text_format")
    _check_solution(parse_statements(statements), roles)
    if absent := [name for name in names if name not in quiz]:
        raise Unread(f"the quiz does not speak of {absent[0]!r}")
    index = info.get("index", row.get("index", number))
    if not isinstance(index, int) or isinstance(index, bool) or abs(index) >= 1 << 63:
        raise Unread(f"index is {index!r:.60}, not an integer")
    puzzle = {
        "quiz": quiz,
        "names": names,
        "knight_knave": words,
        "solution": roles,
        "solution_text_format": listing,
        "statements": statements,
        "index": index,
    }
    if all(row.get(field) is not None for field in COT):
        puzzle |= {field: row[field] for field in COT}
    split = info.get("split")
    return Imported(puzzle, split if split in ("train", "test") else None, system)


def _text(row: Mapping[str, Any], field: str) -> str:
    value = row.get(field)
    if not isinstance(value, str) or not value:
        raise Unread(f"{field} is {value!r:.60}, not a text")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise Unread(f"{field} has half of a surrogate pair, which is no character") from None
    return value


def _unwrapped(prompt: Any, expected: Any) -> tuple[str, str]:
    """(quiz, system message) of a prompt: chat messages, clean or with one of the known wrappings in the user's."""
    if not isinstance(prompt, list) or not all(isinstance(m, Mapping) for m in prompt):
        raise Unread(f"prompt is {prompt!r:.60}, not a list of messages")
    roles = [message.get("role") for message in prompt]
    if roles not in (["user"], ["system", "user"]):
        raise Unread(f"prompt has messages of {roles!r:.60}, not of a user or of a system and a user")
    content = _text(prompt[-1], "content")
    wrapped = _CHATML.fullmatch(content) or _PLAIN.fullmatch(content)
    if wrapped and len(prompt) == 1:
        quiz, system = wrapped["quiz"], wrapped["system"].strip()
    else:
        quiz, system = content, _text(prompt[0], "content") if len(prompt) == 2 else ""
        if isinstance(expected, str) and expected and content.startswith(expected):
            quiz = expected  # what follows is an instruction
    if found := TEMPLATE_TEXT.search(quiz):
        raise Unread(f"the user's message has template text {found[0]!r} in no wrapping that is known here")
    if isinstance(expected, str) and expected and quiz != expected:
        raise Unread("the user's message is not the quiz of extra_info or of the column quiz")
    if not quiz.endswith("?"):
        raise Unread(f"the user's message ends with {quiz[-20:]!r}: an instruction? Only a quiz can be told from it")
    return quiz, system


def _truth(reward_model: Any) -> Mapping[str, Any]:
    """solution_text_format and statements of reward_model.ground_truth, a JSON text or (older files) an object."""
    truth = reward_model.get("ground_truth") if isinstance(reward_model, Mapping) else None
    if isinstance(truth, str):
        try:
            truth = json.loads(truth)
        except (ValueError, RecursionError):
            raise Unread(f"reward_model.ground_truth is not JSON: {truth!r:.60}") from None
    if not isinstance(truth, Mapping):
        raise Unread(f"reward_model.ground_truth is {truth!r:.60}, not an object")
    return truth


def _words(given: Any) -> dict[str, str]:
    """The words for the two roles, as in the published field knight_knave."""
    if given is None:
        return KNIGHT_KNAVE
    if not isinstance(given, Mapping) or not all(isinstance(given.get(key), str) for key in KNIGHT_KNAVE):
        raise Unread(f"knight_knave is {given!r:.60}, not the six words {', '.join(KNIGHT_KNAVE)}")
    return {key: given[key] for key in KNIGHT_KNAVE}


def _listed(listing: str, words: Mapping[str, str]) -> tuple[list[str], list[bool]]:
    """Names and roles (True: a knight) of "(1) Zoey is a knave\\n(2) …"."""
    roles = {words["a_knight"]: True, words["a_knave"]: False}
    names, solution = [], []
    for number, line in enumerate(listing.split("\n"), 1):
        name, is_, role = line.removeprefix(f"({number}) ").rpartition(" is ")
        if not is_ or role not in roles or not name or name in names or not line.startswith(f"({number}) "):
            expected = f"({number}) Name is {words['a_knight']} or {words['a_knave']}"
            raise Unread(f"solution_text_format has {line!r:.60} where {expected!r} belongs")
        names.append(name)
        solution.append(roles[role])
    return names, solution


@functools.lru_cache(maxsize=4)  # a row's statements are asked for by the check and by those who write it
def parse_statements(text: str) -> tuple:
    """Statements of the grammar, from the repr of nested tuples. Raises Unread for anything else."""
    try:  # as JSON: several times as fast as literal_eval
        statements = _tuples(json.loads(text.translate(_AS_JSON)))
    except (ValueError, RecursionError):
        try:
            statements = ast.literal_eval(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            statements = None
    if not isinstance(statements, tuple):
        raise Unread(f"statements is {text!r:.60}, not the text of nested tuples")
    for statement in statements:
        _check_statement(statement, len(statements))
    return statements


_AS_JSON = str.maketrans({"(": "[", ")": "]", "'": '"'})
_OPERANDS = {"not": (1, 1), "and": (2, 99), "or": (2, 99), "->": (2, 2), "<=>": (2, 2)}  # fewest and most


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _check_statement(statement: Any, people: int) -> None:
    kind, *parts = statement if isinstance(statement, tuple) and statement else (None,)
    if kind in ("telling-truth", "lying"):
        if len(parts) == 1 and type(parts[0]) is int and 0 <= parts[0] < people:
            return
    elif isinstance(kind, str) and kind in _OPERANDS and _OPERANDS[kind][0] <= len(parts) <= _OPERANDS[kind][1]:
        for part in parts:
            _check_statement(part, people)
        return
    raise Unread(f"{statement!r:.60} is no statement about {people} people")


def _check_solution(statements: tuple, roles: list[bool]) -> None:
    if len(statements) != len(roles):
        raise Unread(f"{len(statements)} statements of {len(roles)} people")
    try:
        solution = unique_solution(statements)
    except ValueError as error:  # too many people to solve
        raise Unread(str(error)) from None
    if solution != tuple(roles):
        raise Unread("the listed solution is not the only one of the statements")

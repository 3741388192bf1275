"""The reward of Knights and Knaves: a tagged format, and an answer that is read strictly.

The scale is that of Logic-RL (arXiv:2502.14768): format +1 or -1; answer +2 right, -1.5 wrong, -2 unreadable or in a
bad format. Totals: 3, -0.5, -1, -3. An answer is a list of "Name is a knight|knave" and nothing else. Whatever is left
over (a negation, a question, a hedge, a look-alike letter) makes it unreadable, so that no wording can be judged right
that does not say the right thing.
"""

from __future__ import annotations

import functools
import json
import re
import string

from megatron_dump.types import Score

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
END_OF_TURN = frozenset(
    {"<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>", "<|end|>", "<end_of_turn>", "<eos>", "</s>"}
)
ROLES = ("knight", "knave")

_TOKEN = re.compile(r"\w+|\n|[^\w\s]")  # one pass, no backtracking
_HEADING = ["knights", "and", "knaves", ":"]
# ASCII only: str.lower() would turn the Kelvin sign into a k.
_LOWER = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)

Name = tuple[str, ...]  # a name's tokens


class Unreadable(ValueError):
    """The answer says something besides who is a knight and who is a knave; the message says what."""


def kk_reward(text: str, ground_truth: str) -> Score:
    """Judge a completion. Time is linear in its length; ValueError when `ground_truth` is not a puzzle's."""
    truth = _read_truth(ground_truth)
    answer = _answer_block(text)
    if answer is None:
        return Score(-3.0, correct=False, well_formed=False, reason="bad format")
    if len(answer) > 512 + 8 * len(ground_truth):  # no honest rendering is as long; bounds the work below
        return Score(-1.0, correct=False, well_formed=False, reason="unreadable: answer too long")
    try:
        said = read_answer(answer, frozenset(truth))
    except Unreadable as error:
        return Score(-1.0, correct=False, well_formed=False, reason=f"unreadable: {error}"[:120])
    if said == truth:
        return Score(3.0, correct=True, well_formed=True, reason="right")
    return Score(-0.5, correct=False, well_formed=True, reason="wrong")


def _answer_block(text: str) -> str | None:
    """What stands in the answer tags; None unless each tag occurs once, in order, with nothing after the last but
    white space and at most one end-of-turn token."""
    if any(text.count(tag) != 1 for tag in TAGS):
        return None
    places = [text.find(tag) for tag in TAGS]
    if places != sorted(places):
        return None
    rest = text[places[3] + len(TAGS[3]) :].strip()
    if rest and rest not in END_OF_TURN:
        return None
    return text[places[2] + len(TAGS[2]) : places[3]]


def _tokens(text: str) -> list[str]:
    """Words, line ends and single signs, ASCII letters in lower case; other white space only separates."""
    return _TOKEN.findall(text.translate(_LOWER))


@functools.lru_cache(maxsize=4096)  # a group's completions share their ground truth
def _read_truth(ground_truth: str) -> dict[Name, str]:
    """Name -> role from the JSON text's solution_text_format, lines "(1) Zoey is a knave"; names may be any text."""
    truth: dict[Name, str] = {}
    try:
        lines = json.loads(ground_truth)["solution_text_format"].splitlines()
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"ground truth is not JSON with solution_text_format: {ground_truth[:200]!r}") from error
    for number, line in enumerate(lines, 1):
        name, is_a, role = line.strip().removeprefix(f"({number}) ").rpartition(" is a ")
        key = tuple(_tokens(name))
        if not is_a or role not in ROLES or not key or key in truth:
            raise ValueError(f'ground truth line {number} is not "({number}) Name is a knight|knave": {line!r}')
        truth[key] = role
    if not truth:
        raise ValueError(f"ground truth names nobody: {ground_truth[:200]!r}")
    return truth


def read_answer(answer: str, names: frozenset[Name]) -> dict[Name, str]:
    """The role given to each of `names`. Unreadable unless the text is clauses about them, with list marks, bold and
    punctuation around, everybody is named, and nobody is both."""
    if answer.count("**") % 2:
        raise Unreadable("unclosed bold")
    tokens = _tokens(answer.replace("**", "").strip())
    position = len(_HEADING) if tokens[: len(_HEADING)] == _HEADING else 0
    longest_first = sorted(names, key=len, reverse=True)
    said: dict[Name, str] = {}
    while True:
        start = position
        position, joined = _skip_marks(tokens, position)
        if position == len(tokens):
            break
        if said and position == start:
            raise Unreadable(f"{tokens[position]!a} after a clause")
        position, name, role = _clause(tokens, position, longest_first)
        if said.setdefault(name, role) != role:
            raise Unreadable(f"{' '.join(name)!a} is said to be both")
    if joined:
        raise Unreadable("an unfinished clause")
    if len(said) != len(names):
        raise Unreadable(f"{len(said)} of {len(names)} people named")
    return said


def _skip_marks(tokens: list[str], position: int) -> tuple[int, bool]:
    """Past line ends, punctuation, "and", bullets and numbers such as "(1)", "1." or "1)"; True when more must follow,
    because an "and", a bullet or a number came last."""
    joined = False
    while position < len(tokens):
        token, following = tokens[position], tokens[position + 1 : position + 3]
        if token in ("\n", ",", ";", "."):
            position += 1
            continue
        if token in ("and", "-", "*", "•"):
            width = 1
        elif token == "(" and len(following) == 2 and _is_number(following[0]) and following[1] == ")":
            width = 3
        elif _is_number(token) and following and following[0] in (".", ")", ":"):
            width = 2
        else:
            break
        position, joined = position + width, True
    return position, joined


def _is_number(token: str) -> bool:
    return token.isascii() and token.isdigit()


def _clause(tokens: list[str], position: int, names: list[Name]) -> tuple[int, Name, str]:
    """Read "Name is a role", "Name is the role", "Name is role" or "Name: role": (position after it, name, role)."""
    name = next((name for name in names if tuple(tokens[position : position + len(name)]) == name), None)
    if name is None:
        raise Unreadable(f"{tokens[position]!a} is not a name")
    end = position + len(name)
    if tokens[end : end + 1] in (["is"], [":"]):
        end += 1
        if tokens[end : end + 1] in (["a"], ["the"]):
            end += 1
        if tokens[end : end + 1] in (["knight"], ["knave"]):
            return end + 1, name, tokens[end]
    raise Unreadable(f"{' '.join(tokens[position : end + 1])!a} does not begin a clause")

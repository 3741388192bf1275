"""The reward of exact mathematical answers, compared by the math-verify library.

The library searches a whole text for something like an answer. Here it only ever sees one short expression, found by
us: a long text costs linear time, and words around the right number ("not 4", "3 or 4") are not skipped but read.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import threading
from typing import Any

import math_verify
from math_verify.errors import TimeoutException

from megatron_dump.rewards import scale
from megatron_dump.rewards.format import BadFormat, TagFormat
from megatron_dump.rewards.registry import GroundTruthError
from megatron_dump.types import Score

PLACES = ("tags", "boxed")
_LONGEST, _DEEPEST = 256, 16  # characters and levels of brackets; the library's parser is exponential in the latter
_SIGNS = str.maketrans(
    {"−": "-", "–": "-", "×": "\\times ", "·": "\\cdot ", "÷": "\\div ", "∞": "\\infty ", "°": "^\\circ "}
)
_BOXED = "\\boxed{"
_WRAPPINGS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"), ("**", "**"), ("`", "`"))
_WORDS = re.compile(r"\\(?:text|textbf|mathrm)\s*\{([^{}\\]*)\}|([A-Za-z]{4,}(?:[' -][A-Za-z]+)*)")
_NUMBER = re.compile(r"-?(?:[\d.,]+(?:/\d+)?|\\[dt]?frac\s*(?:\{\d+\}|\d)\s*(?:\{\d+\}|\d))\s*\\?%?")
_SUMMED_UP = re.compile(
    r"[\w)}]\s*(?:[+*!-]|\\(?:times|cdot|div|pm|mp)\b)|\\(?:sum|i?i?int|oint|prod|lim|[dt]?binom)(?![a-zA-Z])"
)
_SCIENTIFIC = re.compile(r"-?\d+(?:\.\d+)?\s*(?:\\times|\\cdot|\*)\s*10\s*\^\s*(?:-?\d|\{\s*-?\d+\s*\})")
_ASIDE = re.compile(r"\?|\b(?:not|no|wrong|false|incorrect|maybe|perhaps|if|unless|except|never|neither)\b", re.I)
_UNIT = re.compile(r"(.*\d)\s*(?!is\b)[A-Za-z]{2,}(?: [A-Za-z]{2,})?")  # 18 dollars
_MIXED = re.compile(r"(\d)\s+(\d+)\s*/\s*(\d+)")  # 1 1/2
_LOOSE_DIGITS = re.compile(r"\d\s+\d")  # "1 2" would be read as their sum


class Unreadable(ValueError):
    """There is no one answer; the message says why."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MathReward(TagFormat):
    """Judges a mathematical answer: equal to the ground truth, in any notation.

    mode: one of `scale.MODES`. answer_in: "tags", <answer>…</answer> with or without a \\boxed{} in it, or "boxed",
    the text's last \\boxed{}, no tags needed. timeout_s: seconds (an integer) that reading, and again comparing, may
    take; the library keeps it by a signal, hence in a process's main thread only.
    """

    mode: str = "dump"
    answer_in: str = "tags"
    timeout_s: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        scale.check_mode(self.mode)
        if self.answer_in not in PLACES:
            raise ValueError(f"answer_in: {self.answer_in!r} is unknown; known: {', '.join(PLACES)}")
        if isinstance(self.timeout_s, bool) or not isinstance(self.timeout_s, int) or self.timeout_s < 1:
            raise ValueError(f"timeout_s: {self.timeout_s!r} must be a whole number of seconds, at least 1")

    def __call__(self, text: str, ground_truth: str) -> Score:
        """Judge a completion. ground_truth: the answer, LaTeX or plain, with or without $…$ or \\boxed{}.

        TimeoutError when the answer takes too long to read or compare, GroundTruthError when there is no ground truth.
        """
        truth = clean(ground_truth)
        if not truth:
            raise GroundTruthError(f"ground truth is no mathematical answer: {ground_truth[:200]!r}")
        try:
            answer = self._answer(text)
        except BadFormat as error:
            return scale.score(self.mode, scale.BAD_FORMAT, str(error))
        try:
            right = equal(truth, answer, self.timeout_s)
        except Unreadable as error:
            return scale.score(self.mode, scale.UNREADABLE, str(error))
        # Wrong answers that differ in notation alone count as different ones.
        said = truth if right else "".join(clean(answer).split())
        return scale.score(self.mode, scale.RIGHT if right else scale.WRONG, said=said)

    def _answer(self, text: str) -> str:
        if self.answer_in == "tags":
            return self.answer_of(text)
        start = text.rfind(_BOXED)
        boxed = text[start : start + _LONGEST]
        if start < 0 or (end := _closing(boxed, len(_BOXED))) < 0:
            raise BadFormat("no \\boxed{…} of reasonable length")
        return boxed[: end + 1]


def equal(truth: str, answer: str, timeout_s: int) -> bool:
    """Whether an answer is the (cleaned) truth. Unreadable unless it is one expression; TimeoutError."""
    if len(answer.strip()) > _LONGEST + 4 * len(truth):
        raise Unreadable("answer too long")
    if answer.count(_BOXED) > 1:
        raise Unreadable("several boxed answers")
    answer = clean(answer)
    if answer == truth:
        return True
    if _WORDS.fullmatch(truth):  # as mathematics, words are products of letters in any order
        return _plain(answer) == _plain(truth)
    answer = _MIXED.sub(r"\1\\frac{\2}{\3}", answer)
    _check(answer, truth)
    if _NUMBER.fullmatch(truth) and (measured := _UNIT.fullmatch(answer)):
        answer = measured[1]
    try:
        limit = timeout_s if threading.current_thread() is threading.main_thread() else None
        gold, said = _parse(truth, limit), _parse(answer, limit)
        if not said:
            raise Unreadable(f"{answer[:60]!a} is no expression")
        return _verify(gold, said, limit)
    except TimeoutException:
        raise TimeoutError(f"{answer[:60]!a} took over {timeout_s} s") from None


@functools.lru_cache(maxsize=4096)
def clean(text: str) -> str:
    """The expression itself: without \\boxed{}, dollars and the like around it, a full stop, typographic signs."""
    text, before = text.strip().translate(_SIGNS), None
    while text != before:
        before = text
        text = text.strip().removesuffix(".")
        for opening, closing in _WRAPPINGS:
            if text.startswith(opening) and text.endswith(closing) and len(text) >= len(opening + closing):
                text = text[len(opening) : len(text) - len(closing)]
        if text.startswith(_BOXED) and _closing(text, len(_BOXED)) == len(text) - 1:
            text = text[len(_BOXED) : -1]
    text = text.removeprefix("\\$").removeprefix("$")  # a currency's
    return re.sub(r"(?<=\d)(?:\\,|\\!|\{,\})(?=\d)", "", text).replace("**", "^")


def _closing(text: str, start: int) -> int:
    """Place of the brace that closes the one before `start`; -1 if none does."""
    depth = 1
    for place in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if not depth:
            return place
    return -1


def _check(answer: str, truth: str) -> None:
    """Unreadable for what the library would read too kindly."""
    depth = deepest = result = 0
    for place, sign in enumerate(answer):
        depth += (sign in "{([") - (sign in "})]")
        deepest = max(deepest, depth)
        if sign == "=" and not depth and "," not in answer:
            result = place + 1  # of 3 * 4 = 12
    if depth or deepest > _DEEPEST:
        raise Unreadable("brackets open, or too many")
    if "$" in answer or _BOXED in answer:
        raise Unreadable("several expressions")
    if aside := _ASIDE.search(answer):
        raise Unreadable(f"{aside[0]!a} in the answer")
    if _LOOSE_DIGITS.search(answer):
        raise Unreadable("digits apart")
    last = answer[result:].strip()
    if _NUMBER.fullmatch(truth) and _SUMMED_UP.search(last) and not _SCIENTIFIC.fullmatch(last):
        raise Unreadable("a calculation, not its result")


def _plain(text: str) -> str:
    """Words for comparison: no \\text{}, no brackets around, lower case."""
    if match := _WORDS.fullmatch(text):
        text = match[1] or match[2] or ""
    return " ".join(text.strip(" ()").lower().split())


@functools.lru_cache(maxsize=4096)  # a group's completions share their ground truth, and often their answer
def _parse(expression: str, timeout_s: int | None) -> list[Any]:
    """What the library makes of one expression: sympy objects, none if it is not LaTeX. TimeoutException."""
    share = "\\%" if expression.endswith("%") else ""
    wrapped = f"${expression.removesuffix('%').removesuffix(chr(92))}${share}"
    try:
        return math_verify.parse(
            wrapped,
            [math_verify.LatexExtractionConfig()],
            fallback_mode="no_fallback",
            parsing_timeout=timeout_s,  # pyright: ignore[reportArgumentType]  None is meant to be given
            raise_on_error=True,
        )
    except Exception:  # noqa: BLE001  the parser raises whatever the text makes it raise: it is no expression then
        return []


def _verify(gold: list[Any], said: list[Any], timeout_s: int | None) -> bool:
    try:
        return math_verify.verify(gold, said, timeout_seconds=timeout_s, raise_on_error=True)
    except Exception:  # noqa: BLE001  as sympy does where two things cannot be compared
        return False

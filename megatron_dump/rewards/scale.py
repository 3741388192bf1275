"""The scale of rewards that the tagged tasks share, so that a mixture of them trains on comparable numbers.

Logic-RL's values (arXiv:2502.14768): format +1 or -1; answer +2 right, -1.5 wrong, -2 unreadable or in a bad format.
"""

from __future__ import annotations

from megatron_dump.types import Score

RIGHT, WRONG, UNREADABLE, BAD_FORMAT = "right", "wrong", "unreadable", "bad format"
_ANSWER = {RIGHT: 2.0, WRONG: -1.5, UNREADABLE: -2.0, BAD_FORMAT: -2.0}
MODES = {
    "dump": "format + answer: 3 right, -0.5 wrong, -1 unreadable, -3 bad format",
    "answer": "the answer's part alone: 2, -1.5, -2, -2",
    "binary": "1 right, else 0",
}
_LONGEST_REASON = 120  # characters


def check_mode(mode: object) -> None:
    if mode not in MODES:
        raise ValueError(f"mode: {mode!r} is unknown; known: {', '.join(MODES)}")


def score(
    mode: str, verdict: str, detail: str = "", *, credit: float = 0.0, said: str | None = None, **more: float
) -> Score:
    """A Score for one of the four verdicts above; `more` are further components; said: Score.answer.

    credit: from 0 to 1, how far the answer's part moves from this verdict's value to that of a right answer.
    """
    answer, layout, right = _ANSWER[verdict], -1.0 if verdict == BAD_FORMAT else 1.0, float(verdict == RIGHT)
    answer += credit * (_ANSWER[RIGHT] - answer)
    return Score(
        reward={"dump": layout + answer, "answer": answer, "binary": right}[mode],
        correct=verdict == RIGHT,
        well_formed=verdict in (RIGHT, WRONG),
        reason=(f"{verdict}: {detail}" if detail else verdict)[:_LONGEST_REASON],
        components={"format": layout, "answer": answer, "accuracy": right, **more},
        answer=said,
    )

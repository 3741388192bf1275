"""The reward of Knights and Knaves: a tagged format, and an answer that is read strictly (`kk_answer`)."""

from __future__ import annotations

import dataclasses
import functools
import json
import re

from megatron_dump.rewards import scale
from megatron_dump.rewards.format import BadFormat, TagFormat
from megatron_dump.rewards.kk_answer import Unreadable, read_answer
from megatron_dump.rewards.kk_words import Cast, Words, impostors, tokens
from megatron_dump.rewards.registry import GroundTruthError
from megatron_dump.types import Score

# The role words of published variants: the other word where a puzzle's solution shows only one of them.
ROLE_PAIRS = (
    ("knight", "knave"),
    ("saint", "sinner"),
    ("hero", "villain"),
    ("angel", "devil"),
    ("altruist", "egoist"),
    ("sage", "fool"),
    ("pioneer", "laggard"),
    ("truth-teller", "liar"),
)
_LINE = re.compile(r"\((\d+)\) (.+) is an? (\S.*)")


@dataclasses.dataclass(frozen=True)
class Truth:
    """A puzzle's solution."""

    roles: dict[Words, Words]  # of everybody
    cast: Cast
    longest: int  # characters that an answer may have


@dataclasses.dataclass(frozen=True, kw_only=True)
class KKReward(TagFormat):
    """Judges a puzzle's answer. `mode` is one of `scale.MODES`; the other options are the format's.

    Components: format, answer, accuracy (1 right, else 0) and people, the share whose role is right.
    """

    mode: str = "dump"

    def __post_init__(self) -> None:
        super().__post_init__()
        scale.check_mode(self.mode)

    def __call__(self, text: str, ground_truth: str) -> Score:
        """Judge a completion. Time is linear in its length; GroundTruthError when `ground_truth` is not a puzzle's.

        ground_truth: JSON text {"solution_text_format": "(1) Zoey is a knave\\n(2) …"}; with "knight_knave", the
        published field of role words, where the words are none of ROLE_PAIRS.
        """
        truth = _read_truth(ground_truth)
        try:
            answer = self.answer_of(text).strip()
        except BadFormat as error:
            return scale.score(self.mode, scale.BAD_FORMAT, str(error), people=0.0)
        if len(answer) > truth.longest:  # bounds the work below
            return scale.score(self.mode, scale.UNREADABLE, "answer too long", people=0.0)
        try:
            said = read_answer(answer, truth.cast)
        except Unreadable as error:
            return scale.score(self.mode, scale.UNREADABLE, str(error), people=0.0)
        right = sum(said[name] == role for name, role in truth.roles.items()) / len(said)
        verdict = scale.RIGHT if said == truth.roles else scale.WRONG
        written = ", ".join(sorted(f"{' '.join(name)}: {' '.join(role)}" for name, role in said.items()))
        return scale.score(self.mode, verdict, said=written, people=right)


kk_reward = KKReward()


@functools.lru_cache(maxsize=4096)  # a group's completions share their ground truth
def _read_truth(ground_truth: str) -> Truth:
    try:
        data = json.loads(ground_truth)
        written = data["solution_text_format"]
        lines = written.splitlines()
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise GroundTruthError(f"ground truth is not JSON with solution_text_format: {ground_truth[:200]!r}") from error
    roles: dict[Words, Words] = {}
    for number, line in enumerate(lines, 1):
        match = _LINE.fullmatch(line.strip())
        name, role = (tuple(tokens(match[2])), tuple(tokens(match[3]))) if match else ((), ())
        if not match or match[1] != str(number) or not name or not role or name in roles:
            raise GroundTruthError(f'ground truth line {number} is not "({number}) Name is a role": {line[:200]!r}')
        roles[name] = role
    cast = Cast(frozenset(roles), _role_words(data.get("knight_knave"), {*roles.values()}), impostors(written))
    if not roles or len(cast.roles) > 2:
        found = ", ".join(sorted(" ".join(role) for role in cast.roles)) or "nobody"
        raise GroundTruthError(f"ground truth needs people of two roles, not {found}: {ground_truth[:200]!r}")
    return Truth(roles, cast, longest=1024 + 8 * len(written))


def _role_words(declared: object, seen: set[Words]) -> frozenset[Words]:
    """The words for the two roles: those the solution shows, and the other of the pair they belong to."""
    if isinstance(declared, dict):
        seen = seen | {tuple(tokens(str(declared[key]))) for key in ("knight", "knave") if key in declared}
    for pair in ROLE_PAIRS:
        both = frozenset(tuple(tokens(word)) for word in pair)
        if seen <= both:
            return both
    return frozenset(seen)

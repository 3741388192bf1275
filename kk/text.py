"""Puzzles in words: the quiz, its solution, the numbered rendering that rewards compare with, and the reasoning.

`kk.render` writes the same texts for many puzzles at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kk.grammar import Statement, is_leaf
from kk.names import NAMES
from kk.reasoning import CLASH, FORCED, REVERSE, SUPPOSE, Step

__all__ = [
    "FRAMES",
    "KNIGHTS",
    "KNIGHT_KNAVE",
    "NAMES",
    "Roles",
    "claim_text",
    "listing",
    "parse_roles",
    "quiz_text",
    "role",
    "solution_text",
    "solution_text_format",
    "spoken",
    "step_text",
]

# {claim} stands inside a sentence ("if ..."), {Claim} begins one ("If ..."): both differ only for implications.
FRAMES = (
    '{name} said, "{Claim}."',
    "{name} told you that {claim}.",
    'In {name}\'s words: "{Claim}."',
    '{name} remarked, "{Claim}."',
    "According to {name}, {claim}.",
    '"{Claim}," {name} declared.',
    "{name} claimed that {claim}.",
    'You heard {name} say, "{Claim}."',
)
COT_HEAD = (
    "Note each role that one claim forces; where none is forced, try a role and see whether all claims still fit."
)
COT_FOOT = "Every claim fits these roles, so that is the solution."
# What stands before and after the subject of a step: a clause such as "Zoey is a knight"; CLASH: the speaker's name.
STEPS = {
    SUPPOSE: ("Suppose ", ""),
    FORCED: ("Then ", ", because "),
    CLASH: ("But that does not fit what ", " says: "),
    REVERSE: ("So ", ""),
}
SAYS = " says that "


@dataclass(frozen=True)
class Roles:
    """The words for those who tell the truth and those who lie."""

    knight: str = "knight"
    knave: str = "knave"

    def a(self, is_knight: bool) -> str:
        """With its article: "a knight", "an egoist"."""
        word = self.knight if is_knight else self.knave
        return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"

    def many(self, is_knight: bool) -> str:
        """ "knights", "heroes"."""
        word = self.knight if is_knight else self.knave
        if word[-1] == "y" and word[-2:-1] not in "aeiou":
            return word[:-1] + "ies"
        return word + ("es" if word.endswith(("s", "x", "z", "ch", "sh", "o")) else "s")

    @property
    def words(self) -> dict[str, str]:
        """The published field `knight_knave`."""
        return {
            "knight": self.knight,
            "knave": self.knave,
            "a_knight": self.a(True),
            "a_knave": self.a(False),
            "Knight": self.knight.capitalize(),
            "Knave": self.knave.capitalize(),
        }


KNIGHTS = Roles()
KNIGHT_KNAVE = KNIGHTS.words
# Pairs as in the published generator; any other pair of words will do.
PAIRS = (
    "knight/knave",
    "pioneer/laggard",
    "saint/sinner",
    "hero/villain",
    "angel/devil",
    "altruist/egoist",
    "sage/fool",
)


def parse_roles(spec: str) -> tuple[Roles, ...]:
    """ "saint/sinner" or "saint/sinner,hero/villain", or "all" of PAIRS. ValueError for anything else."""
    made = []
    for pair in PAIRS if spec == "all" else spec.split(","):
        words = pair.split("/")
        if (
            len(words) != 2
            or words[0] == words[1]
            or not all(w.isascii() and w.isalpha() and w.islower() for w in words)
        ):
            raise ValueError(
                f"--roles {spec}: write two words such as saint/sinner (lower-case letters), pairs with commas, or all"
            )
        made.append(Roles(*words))
    return tuple(made)


def role(is_knight: bool) -> str:
    """With its article: "a knight" or "a knave"."""
    return KNIGHTS.a(is_knight)


def claim_text(statement: Statement, names: Sequence[str], roles: Roles = KNIGHTS) -> str:
    """The statement as a clause without a full stop; names[i] is person i. Operators inside others are bracketed."""
    kind, first = statement[0], statement[1]
    if is_leaf(statement):
        return f"{names[first]} is {roles.a(kind == 'telling-truth')}"
    if kind == "not" and is_leaf(first):
        return f"{names[first[1]]} is not {roles.a(first[0] == 'telling-truth')}"
    parts = [
        claim_text(part, names, roles) if _plain(part) else f"({claim_text(part, names, roles)})"
        for part in statement[1:]
    ]
    if kind == "not":
        return f"it is not true that {parts[0]}"
    if kind == "->":
        return f"if {parts[0]} then {parts[1]}"
    if kind == "<=>":
        return f"{parts[0]} if and only if {parts[1]}"
    return listing(parts, kind)


def _plain(statement: Statement) -> bool:
    return is_leaf(statement) or (statement[0] == "not" and is_leaf(statement[1]))


def spoken(statement: Statement, speaker: str, names: Sequence[str], frame: str, roles: Roles = KNIGHTS) -> str:
    """One sentence in which `speaker` makes the statement; `frame` is one of FRAMES."""
    claim = claim_text(statement, names, roles)
    return frame.format(name=speaker, claim=claim, Claim=claim[0].upper() + claim[1:])


def listing(items: Sequence[str], word: str = "and") -> str:
    """ "a", "a and b", "a, b, and c"."""
    if len(items) < 3:
        return f" {word} ".join(items)
    return ", ".join(items[:-1]) + f", {word} " + items[-1]


def quiz_text(
    statements: Sequence[Statement], names: Sequence[str], frames: Sequence[str], roles: Roles = KNIGHTS
) -> str:
    """The puzzle as the solver reads it; frames[i] words person i's statement."""
    said = [spoken(s, name, names, frame, roles) for s, name, frame in zip(statements, names, frames, strict=True)]
    return f"{opening(len(names), roles)}{listing(names)}. {' '.join(said)} {question(roles)}"


def opening(n: int, roles: Roles = KNIGHTS) -> str:
    """What stands before the names of n people."""
    knights, knaves = roles.many(True), roles.many(False)
    return (
        f"A very special island is inhabited only by {knights} and {knaves}. {knights.capitalize()} always tell the "
        f"truth, and {knaves} always lie. You meet {n} inhabitants: "
    )


def question(roles: Roles = KNIGHTS) -> str:
    """What stands after the statements."""
    return f"So who is {roles.a(True)} and who is {roles.a(False)}?"


def solution_text(solution: Sequence[bool], names: Sequence[str], roles: Roles = KNIGHTS) -> str:
    """ "Zoey is a knave, Oliver is a knight, and Sam is a knight." """
    clauses = [f"{name} is {roles.a(is_knight)}" for name, is_knight in zip(names, solution, strict=True)]
    return ", ".join(clauses[:-1]) + ", and " + clauses[-1] + "."


def solution_text_format(solution: Sequence[bool], names: Sequence[str], roles: Roles = KNIGHTS) -> str:
    """ "(1) Zoey is a knave\\n(2) Oliver is a knight": one numbered line a person."""
    pairs = zip(names, solution, strict=True)
    return "\n".join(f"({i}) {name} is {roles.a(is_knight)}" for i, (name, is_knight) in enumerate(pairs, 1))


def step_text(step: Step, statements: Sequence[Statement], names: Sequence[str], roles: Roles = KNIGHTS) -> str:
    """A step of kk.reasoning as a sentence."""
    before, after = STEPS[step.kind]
    subject = names[step.person] if step.kind == CLASH else f"{names[step.person]} is {roles.a(step.knight)}"
    reason = claim_text(statements[step.witness], names, roles) if step.kind in (FORCED, CLASH) else ""
    witness = names[step.witness] + SAYS if step.kind == FORCED else ""
    return f"{before}{subject}{after}{witness}{reason}."

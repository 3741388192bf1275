"""Puzzles in words: the quiz, its solution, and the numbered rendering that rewards compare with."""

from __future__ import annotations

from collections.abc import Sequence

from kk.puzzle import Statement

# Single ASCII words: names are matched as words when answers are read.
# fmt: off
NAMES = (
    "Zoey", "Oliver", "Sam", "Amelia", "Liam", "Emma", "Noah", "Mia", "Jack", "Ella", "Lucas", "Ava", "Henry", "Lily",
    "Owen", "Grace", "Ethan", "Chloe", "Daniel", "Sophia", "Jacob", "Isla", "Samuel", "Ruby", "Logan", "Alice",
    "David", "Hannah", "Peter", "Nora", "Thomas", "Clara", "Julia", "Leo", "Rose", "Adam", "Eva", "Oscar", "Laura",
    "Simon", "Anna", "Victor", "Marie", "Felix", "Helen", "Hugo", "Diana", "Arthur", "Irene", "Walter", "Judith",
    "Martin", "Teresa", "Edward", "Sylvia", "Robert", "Nancy", "Frank", "Linda", "George",
)
# fmt: on

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

# The six words of the published `knight_knave` field; other worlds (saints and sinners) would change them.
KNIGHT_KNAVE = {
    "knight": "knight",
    "knave": "knave",
    "a_knight": "a knight",
    "a_knave": "a knave",
    "Knight": "Knight",
    "Knave": "Knave",
}


def role(is_knight: bool) -> str:
    """With its article: "a knight" or "a knave"."""
    return "a knight" if is_knight else "a knave"


def claim_text(statement: Statement, names: Sequence[str]) -> str:
    """The statement as a clause without a full stop; names[i] is person i."""
    kind, first = statement[0], statement[1]
    if kind in ("telling-truth", "lying"):
        return f"{names[first]} is {role(kind == 'telling-truth')}"
    if kind == "not":
        return f"{names[first[1]]} is not {role(first[0] == 'telling-truth')}"
    left, right = claim_text(first, names), claim_text(statement[2], names)
    if kind == "->":
        return f"if {left} then {right}"
    return f"{left} {({'and': 'and', 'or': 'or', '<=>': 'if and only if'})[kind]} {right}"


def spoken(statement: Statement, speaker: str, names: Sequence[str], frame: str) -> str:
    """One sentence in which `speaker` makes the statement; `frame` is one of FRAMES."""
    claim = claim_text(statement, names)
    return frame.format(name=speaker, claim=claim, Claim=claim[0].upper() + claim[1:])


def listing(items: Sequence[str]) -> str:
    """ "a", "a and b", "a, b, and c"."""
    if len(items) < 3:
        return " and ".join(items)
    return ", ".join(items[:-1]) + ", and " + items[-1]


def quiz_text(statements: Sequence[Statement], names: Sequence[str], frames: Sequence[str]) -> str:
    """The puzzle as the solver reads it; frames[i] words person i's statement."""
    said = [spoken(s, name, names, frame) for s, name, frame in zip(statements, names, frames, strict=True)]
    return (
        "A very special island is inhabited only by knights and knaves. Knights always tell the truth, and knaves "
        f"always lie. You meet {len(names)} inhabitants: {listing(names)}. {' '.join(said)} "
        "So who is a knight and who is a knave?"
    )


def solution_text(solution: Sequence[bool], names: Sequence[str]) -> str:
    """ "Zoey is a knave, Oliver is a knight, and Sam is a knight." """
    clauses = [f"{name} is {role(is_knight)}" for name, is_knight in zip(names, solution, strict=True)]
    return ", ".join(clauses[:-1]) + ", and " + clauses[-1] + "."


def solution_text_format(solution: Sequence[bool], names: Sequence[str]) -> str:
    """ "(1) Zoey is a knave\\n(2) Oliver is a knight": one numbered line a person."""
    pairs = zip(names, solution, strict=True)
    return "\n".join(f"({i}) {name} is {role(is_knight)}" for i, (name, is_knight) in enumerate(pairs, 1))

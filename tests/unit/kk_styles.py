"""Ways to write the answer to a puzzle of Knights and Knaves: each takes [(name, role), …] and says just that.

And one puzzle, judged.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

from megatron_dump.rewards import kk
from megatron_dump.types import Score

Roles = Sequence[tuple[str, str]]


def ground_truth(roles: Roles, **more: object) -> str:
    lines = [f"({i}) {name} is {article(role)}" for i, (name, role) in enumerate(roles, 1)]
    return json.dumps({"solution_text_format": "\n".join(lines), **more})


def article(role: str) -> str:
    return f"{'an' if role[0] in 'aeiou' else 'a'} {role}"


def clauses(roles: Roles) -> list[str]:
    return [f"{name} is {article(role)}" for name, role in roles]


def lines(pattern: str) -> Callable[[Roles], str]:
    """One line a person; {i}, {name}, {role}, {a_role}."""

    def write(roles: Roles) -> str:
        people = enumerate(roles, 1)
        return "\n".join(pattern.format(i=i, name=n, role=r, a_role=article(r)) for i, (n, r) in people)

    return write


def sentence(roles: Roles) -> str:
    *most, last = clauses(roles)
    return f"{', '.join(most)}, and {last}."


def grouped(pattern: str, joint: str) -> Callable[[Roles], str]:
    """By role: {people} and the plural {roles}."""

    def write(roles: Roles) -> str:
        parts = []
        for role in sorted({role for _, role in roles}):
            people = [name for name, its in roles if its == role]
            parts.append(pattern.format(people=joint.join(people), roles=plural(role), Roles=plural(role).capitalize()))
        return "\n".join(parts)

    return write


def together(roles: Roles) -> str:
    """ "A and B are knights"; a role of one person is said of that person."""
    parts = []
    for role in sorted({role for _, role in roles}):
        people = [name for name, its in roles if its == role]
        parts += clauses([(people[0], role)]) if len(people) == 1 else [f"{' and '.join(people)} are {plural(role)}"]
    return "; ".join(parts) + "."


def plural(role: str) -> str:
    return f"{role}es" if role.endswith("o") else f"{role}s"


def table(roles: Roles) -> str:
    rows = "\n".join(f"| {name} | {role} |" for name, role in roles)
    return f"| Name | Role |\n|------|:----:|\n{rows}"


def headed(heading: str) -> Callable[[Roles], str]:
    return lambda roles: heading + "\n".join(clauses(roles))


STYLES: dict[str, Callable[[Roles], str]] = {
    "numbered": lines("({i}) {name} is {a_role}"),
    "numbered on one line": lambda roles: lines("({i}) {name} is {a_role}")(roles).replace("\n", " "),
    "1. with full stops": lines("{i}. {name} is {a_role}."),
    "1) with semicolons": lambda roles: lines("{i}) {name} is {a_role};")(roles).replace("\n", "\r\n"),
    "dashes": lines("- {name} is {a_role}"),
    "bullets, bold": lines("* **{name}** is a **{role}**"),
    "bold lines": lines("**({i}) {name} is {a_role}**"),
    "bold name and colon": lines("- **{name}:** {role}"),
    "italics": lines("_{name}_ is {a_role}"),
    "code": lines("`{name}`: `{role}`"),
    "colon": lines("{name}: {role}"),
    "colon, capitals": lambda roles: "\n".join(f"{name}: {role.capitalize()}" for name, role in roles),
    "equals": lines("{name} = {role}"),
    "arrow": lines("{name} → {role}"),
    "dash": lines("{name} – {role}"),
    "parentheses": lambda roles: ", ".join(f"{name} ({role})" for name, role in roles),
    "the": lines("{name} is the {role}."),
    "must be": lines("{name} must be {a_role}"),
    "sentence": sentence,
    "and": lambda roles: " and ".join(clauses(roles)),
    "reversed": lambda roles: ", ".join(clauses(roles)[::-1]),
    "said twice": lambda roles: "\n".join([*clauses(roles), clauses(roles)[0]]),
    "upper case": lambda roles: sentence(roles).upper(),
    "answer": headed("**Final answer:**\n"),
    "so": lambda roles: f"So, {sentence(roles)}",
    "therefore": lambda roles: f"Therefore, the answer is:\n\n{sentence(roles)}",
    "title": headed("### Solution\n\n"),
    "table": table,
    "JSON": lambda roles: f"```json\n{json.dumps(dict(roles), ensure_ascii=False, indent=1)}\n```",
    "together": together,
    "groups": grouped("{Roles}: {people}", ", "),
    "groups in lines": grouped("**{Roles}:**\n- {people}\n", "\n- "),
    "padded": lambda roles: f"\n\n   {sentence(roles)}  \n\t ",
}


PEOPLE = [("Zoey", "knave"), ("Oliver", "knight"), ("Sam", "knight")]
RIGHT = dict(PEOPLE)
CLAUSES = clauses(PEOPLE)
TRUTH = ground_truth(PEOPLE)


def judge(answer: str, truth: str = TRUTH) -> Score:
    return kk.kk_reward(f"<think>so</think>\n<answer>{answer}</answer>", truth)


def totals(score: Score) -> tuple[float, bool, bool]:
    return score.reward, score.correct, score.well_formed

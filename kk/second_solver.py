"""A second solver that shares nothing with the first: backtracking over roles, as DPLL does, for `kk.verify`.

Roles are guessed one person at a time. A claim whose truth the known roles decide gives its speaker a role; a claim of
a person with a role, about just one person without, gives that one the role that fits. A contradiction takes the last
guess back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

Roles = list[bool | None]


def truth(statement: tuple, roles: Roles) -> bool | None:
    """Whether a statement holds, None while that depends on people without a role."""
    kind = statement[0]
    if kind == "telling-truth":
        return roles[statement[1]]
    if kind == "lying":
        role = roles[statement[1]]
        return None if role is None else not role
    if kind == "not":
        inner = truth(statement[1], roles)
        return None if inner is None else not inner
    if kind in ("and", "or"):
        deciding = kind == "or"  # one such part decides
        unknown = False
        for part in statement[1:]:
            value = truth(part, roles)
            if value is deciding:
                return deciding
            unknown = unknown or value is None
        return None if unknown else not deciding
    left, right = truth(statement[1], roles), truth(statement[2], roles)
    if kind == "->":
        if left is False or right is True:
            return True
        return None if left is None or right is None else False
    return None if left is None or right is None else left == right  # <=>


def solutions(statements: Sequence[tuple], limit: int = 2) -> list[tuple[bool, ...]]:
    """At most `limit` of the assignments of roles, True a knight, in which everybody's claim fits his role."""
    search = _Search(statements)
    found: list[tuple[bool, ...]] = []
    for roles in search.run():
        found.append(roles)
        if len(found) == limit:
            break
    return found


class _Search:
    def __init__(self, statements: Sequence[tuple]) -> None:
        self.statements = statements
        self.about = [set(_mentioned(statement)) for statement in statements]
        self.concern: list[list[int]] = [[] for _ in statements]  # by person: the claims with a say about his role
        for speaker, people in enumerate(self.about):
            for person in people | {speaker}:
                self.concern[person].append(speaker)
        self.roles: Roles = [None] * len(statements)
        self.given: list[int] = []  # people with a role, in the order they got it
        self.by_concern = sorted(range(len(statements)), key=lambda person: -len(self.concern[person]))

    def run(self) -> Iterator[tuple[bool, ...]]:
        person = next((p for p in self.by_concern if self.roles[p] is None), None)
        if person is None:
            yield tuple(role is True for role in self.roles)
            return
        mark = len(self.given)
        for role in (True, False):
            if self._give(person, role):
                yield from self.run()
            while len(self.given) > mark:
                self.roles[self.given.pop()] = None

    def _give(self, person: int, role: bool) -> bool:
        """Give a role, and all that follow from it; False at a contradiction."""
        self.roles[person] = role
        self.given.append(person)
        place = len(self.given) - 1
        while place < len(self.given):
            for speaker in self.concern[self.given[place]]:
                if not self._follow(speaker):
                    return False
            place += 1
        return True

    def _follow(self, speaker: int) -> bool:
        value, role = truth(self.statements[speaker], self.roles), self.roles[speaker]
        if value is not None:
            if role is None:
                self.roles[speaker] = value
                self.given.append(speaker)
            return role is None or role is value
        if role is None:
            return True
        open_people = [person for person in self.about[speaker] if self.roles[person] is None]
        if len(open_people) > 1:
            return True
        (person,) = open_people
        fitting = []
        for trial in (True, False):
            self.roles[person] = trial
            if truth(self.statements[speaker], self.roles) is role:
                fitting.append(trial)
        self.roles[person] = None
        if len(fitting) == 1:
            self.roles[person] = fitting[0]
            self.given.append(person)
        return bool(fitting)


def _mentioned(statement: tuple) -> Iterator[int]:
    if statement[0] in ("telling-truth", "lying"):
        yield statement[1]
    else:
        for part in statement[1:]:
            yield from _mentioned(part)

"""Reads the answer to a puzzle of Knights and Knaves, strictly.

An answer is a list of claims about roles and nothing else. Whatever is left over (a negation, a question, a hedge, a
look-alike letter) makes it unreadable, so that no wording can be judged right that does not say the right thing:

    answer   heading? claim (separators claim)*
    claim    name ("is" | "must be" | ":" | "=" | "-" | "->" | "|") ("a" | "an" | "the")? role
             name "(" role ")"
             name (("," | "and") name)* "are" ("both" | "all")? roles
             (role | roles) ":" (name (separators name)* | "none")

Emphasis and double quotes are ignored; capitals are not told apart.
"""

from __future__ import annotations

from megatron_dump.rewards.kk_words import Cast, Words, impostors, tokens

_HEADING_TOKENS = 256  # a table's rule is the longest part
_LINKS = frozenset(("is", ":", "=", "-", "->", "|"))  # and "must be"
_ARTICLES = frozenset(("a", "an", "the"))
_QUANTIFIERS = frozenset(("both", "all"))
_SEPARATORS = frozenset("\n,;.|")
_ENDS = frozenset("\n;.")  # of a list of names
_JOINTS = frozenset(("and", "while", "-", "•", "+"))  # something must follow


class Unreadable(ValueError):
    """The answer says something besides who has which role; the message says what."""


def read_answer(answer: str, cast: Cast) -> dict[Words, Words]:
    """Name -> role, for everybody. In time linear in the answer.

    Unreadable unless it is written as above, everybody is named, and nobody has two roles.
    """
    if answer.count("**") % 2:
        raise Unreadable("unclosed bold")
    if strange := impostors(answer) - cast.letters:
        raise Unreadable(f"{min(strange)!a} is a look-alike")
    said: dict[Words, Words] = {}
    reader = _Reader(tokens(answer.strip()), cast)
    for name, role in reader.claims():
        if said.setdefault(name, role) != role:
            raise Unreadable(f"{' '.join(name)!a} is said to be both")
    if reader.absent & {*said.values()}:
        raise Unreadable("somebody has the role that none has")
    if len(said) != len(cast.names):
        raise Unreadable(f"{len(said)} of {len(cast.names)} people named")
    return said


class _Reader:
    """A recursive descent over the grammar above; `at` is the next token's place."""

    def __init__(self, words: list[str], cast: Cast) -> None:
        self.words, self.at = words, 0
        self.cast, self.names, self.roles, self.plurals = cast, cast.name_table, cast.role_table, cast.plural_table
        self.absent: set[Words] = set()  # roles that "none" has
        self._skip_heading()

    def claims(self) -> list[tuple[Words, Words]]:
        """All (name, role) in the order said."""
        found: list[tuple[Words, Words]] = []
        while True:
            start = self.at
            dangling = self._skip_separators()
            if self.at == len(self.words):
                break
            if found and self.at == start:
                raise Unreadable(f"{self.words[self.at]!a} after a claim")
            found += self._claim()
        if dangling:
            raise Unreadable("an unfinished claim")
        return found

    def _claim(self) -> list[tuple[Words, Words]]:
        if (name := self._take(self.names)) is None:
            return self._group()
        if self._take_word("("):
            role = self._role()
            if not self._take_word(")"):
                raise self._unexpected()
            return [(name, role)]
        if self._take_one_of(_LINKS) or self._take_words(("must", "be")):
            return [(name, self._role())]
        people = [name, *self._more_names()]
        if len(people) < 2 or not self._take_word("are"):
            raise self._unexpected()
        self._take_one_of(_QUANTIFIERS)
        if (role := self._take(self.plurals)) is None:
            raise self._unexpected()
        return [(person, self.cast.plurals[role]) for person in people]

    def _role(self) -> Words:
        self._take_one_of(_ARTICLES)
        if (role := self._take(self.roles)) is None:
            raise self._unexpected()
        return role

    def _more_names(self) -> list[Words]:
        """The names after a first one: ", name", "and name", ", and name"."""
        people = []
        while self._take_word(",") + self._take_word("and"):
            if (name := self._take(self.names)) is None:
                raise self._unexpected()
            people.append(name)
        return people

    def _group(self) -> list[tuple[Words, Words]]:
        """ "Knights: Zoey, Sam": names up to the next claim that is no mere name."""
        said = self._take(self.plurals) or self._take(self.roles)
        if said is None or not self._take_word(":"):
            raise self._unexpected()
        role = self.cast.plurals.get(said, said)
        if self._take_word("none"):
            self.absent.add(role)
            return []
        people: list[tuple[Words, Words]] = []
        while True:
            start = self.at
            self._skip_separators()
            between = self.words[start : self.at]
            name = self._take(self.names) if between or not people else None
            if name is None or self._linked():
                if name is not None and not _ENDS & {*between}:  # "Knights: A, B and C are knaves" may mean two things
                    raise self._unexpected()
                self.at = start
                break
            people.append((name, role))
        if not people:
            raise self._unexpected()
        return people

    def _linked(self) -> bool:
        """What follows makes the name before it a claim's own."""
        ahead = self.words[self.at] if self.at < len(self.words) else ""
        return ahead in ("(", "are", "must") or (ahead in _LINKS and ahead != "-")

    def _skip_separators(self) -> bool:
        """Past line ends, punctuation, "and", bullets and numbers such as "(1)", "1." or "1)"; True when more must
        follow, because an "and", a bullet or a number came last."""
        joined = False
        while self.at < len(self.words):
            token = self.words[self.at]
            if token in _SEPARATORS:
                self.at += 1
            elif (width := self._joint(token)) and not self._starts_name():
                self.at += width
                joined = True
            else:
                break
        return joined

    def _joint(self, token: str) -> int:
        """Width of the joint or number that begins with `token`, the next one; 0 if there is none."""
        if token in _JOINTS:
            return 1
        ahead = self.words[self.at + 1 : self.at + 3]
        if token == "(" and len(ahead) == 2 and _is_number(ahead[0]) and ahead[1] == ")":
            return 3
        return 2 if _is_number(token) and ahead and ahead[0] in (".", ")", ":") else 0

    def _skip_heading(self) -> None:
        """Past a heading, and a closing brace where it opened one."""
        words = self.words
        while words and words[-1] == "\n":
            words.pop()
        if self._starts_name():
            return
        match = self.cast.heading.match(" ".join(words[:_HEADING_TOKENS]) + " ")
        skipped = match[0].split(" ")[:-1] if match else []
        self.at = len(skipped)
        if "{" in skipped and words[-1] == "}":
            words.pop()

    def _starts_name(self) -> bool:
        start = self.at
        found = self._take(self.names) is not None
        self.at = start
        return found

    def _take(self, known: dict[str, list[Words]]) -> Words | None:
        """The longest of `known` that comes next."""
        for words in known.get(self.words[self.at], ()) if self.at < len(self.words) else ():
            if self._take_words(words):
                return words
        return None

    def _take_words(self, words: Words) -> bool:
        end = self.at + len(words)
        if (*self.words[self.at : end],) != words:
            return False
        self.at = end
        return True

    def _take_one_of(self, known: frozenset[str]) -> bool:
        if self.at == len(self.words) or self.words[self.at] not in known:
            return False
        self.at += 1
        return True

    def _take_word(self, word: str) -> bool:
        return self._take_words((word,))

    def _unexpected(self) -> Unreadable:
        return Unreadable(f"at {' '.join(self.words[self.at : self.at + 3]) or 'the end'!a}")


def _is_number(token: str) -> bool:
    return token.isascii() and token.isdigit()

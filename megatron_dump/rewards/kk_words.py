"""The words of a puzzle of Knights and Knaves: text to tokens, and the names and roles to look for among them."""

from __future__ import annotations

import dataclasses
import functools
import re
import unicodedata
from collections.abc import Iterable

Words = tuple[str, ...]  # a name's or a role's tokens

_TOKEN = re.compile(r"[^\W_]+|\n|->|[^\w\s]|_")  # one pass, no backtracking
_SAME = str.maketrans({"’": "'", "–": "-", "—": "-", "‑": "-", "−": "-", "→": "->", "⇒": "->", "“": '"', "”": '"'})
_EMPHASIS = frozenset('*_`"')


@dataclasses.dataclass(frozen=True)
class Cast:
    """Who is in a puzzle and what they may be."""

    names: frozenset[Words]
    roles: frozenset[Words]  # two, or one where the puzzle shows no other
    letters: frozenset[str] = frozenset()  # unusual characters that the names do have

    @functools.cached_property
    def name_table(self) -> dict[str, list[Words]]:
        return _by_first(self.names)

    @functools.cached_property
    def role_table(self) -> dict[str, list[Words]]:
        return _by_first(self.roles)

    @functools.cached_property
    def plurals(self) -> dict[Words, Words]:
        """Plural -> role."""
        return {(*role[:-1], role[-1] + end): role for role in self.roles for end in ("s", "es")}

    @functools.cached_property
    def plural_table(self) -> dict[str, list[Words]]:
        return _by_first(self.plurals)

    @functools.cached_property
    def heading(self) -> re.Pattern[str]:
        return _heading(frozenset(" ".join(words) for words in self.plurals))


def tokens(text: str) -> list[str]:
    """Words, line ends and single signs in lower case; emphasis is left out, other white space only separates."""
    # str.lower turns the Kelvin sign into a k; `impostors` keeps it out
    lower = unicodedata.normalize("NFC", text).translate(_SAME).lower()
    return [token for token in _TOKEN.findall(lower) if token not in _EMPHASIS]


def impostors(text: str) -> frozenset[str]:
    """Characters that Unicode's normal form replaces by another, as the Kelvin sign by K: never typed by accident."""
    if text.isascii():
        return frozenset()
    return frozenset(c for c in set(text) if not c.isascii() and unicodedata.normalize("NFC", c) != c)


@functools.lru_cache(maxsize=64)
def _heading(plurals: frozenset[str]) -> re.Pattern[str]:
    """What may come before the claims, in tokens with a blank after each.

    "The final answer is:", "Knights and knaves:", a table's head, an opening brace.
    """
    pairs = "|".join(sorted(f"{re.escape(a)} and {re.escape(b)}" for a in plurals for b in plurals if a != b)) or "(?!)"
    return re.compile(
        r"(?:(?:json|text|markdown|plaintext) )?(?:[\n#] )*"
        r"(?:(?:so|thus|therefore|hence|finally) (?:, )?)?"
        rf"(?:(?:(?:the )?(?:final |correct )?(?:answer|solution|conclusion|roles)(?: is| are)?|{pairs})"
        r" (?:: |\n )(?:[\n#] )*){0,2}"
        r"(?:(?:\| )?(?:name|person|inhabitant|character) \| (?:role|type|identity) (?:\| )?\n (?:[|:-] )+)?"
        r"(?:[\n{] )*"
    )


def _by_first(phrases: Iterable[Words]) -> dict[str, list[Words]]:
    """First word -> phrases that begin with it, the longest first."""
    found: dict[str, list[Words]] = {}
    for words in sorted(phrases, key=len, reverse=True):
        found.setdefault(words[0], []).append(words)
    return found

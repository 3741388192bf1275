"""Names of people: a list, and as many generated ones as needed after it."""

from __future__ import annotations

import functools

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
_SYLLABLES = tuple(consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou")
_ENDINGS = ("dor", "len", "mir", "ran", "sin", "vek")
_STRIDE = 4871  # a prime: neighbours sound different


@functools.cache
def names(count: int) -> tuple[str, ...]:
    """`count` different names: the first of NAMES, then pronounceable words such as "Zedudor", always the same ones.

    Two syllables of two letters and an ending of three are read back in one way only, so no two are alike; none is in
    NAMES. ValueError beyond 29,460.
    """
    possible = len(_SYLLABLES) ** 2 * len(_ENDINGS)
    if count > len(NAMES) + possible:
        raise ValueError(f"names={count}: at most {len(NAMES) + possible} can be made")
    return (*NAMES[:count], *(_generated(i * _STRIDE % possible) for i in range(count - len(NAMES))))


def _generated(number: int) -> str:
    number, first = divmod(number, len(_SYLLABLES))
    ending, second = divmod(number, len(_SYLLABLES))
    return (_SYLLABLES[first] + _SYLLABLES[second] + _ENDINGS[ending]).capitalize()

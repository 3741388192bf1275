"""Rules for keys that another program's YAML has and ours has not: what each becomes here, or why it is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Settings = Callable[[str], Any]  # the value at a dotted key: the YAML's or, where it has none, our default or None


@dataclasses.dataclass(frozen=True)
class Rule:
    """What becomes of one key; that of a block stands for all that is in it.

    read(value, settings) is {key of ours: its value}, {} for a value that asks for what happens anyway, or None for
    one that is refused.
    """

    key: str
    read: Callable[[Any, Settings], dict[str, Any] | None]
    means: str  # for the documentation: what it is used as, or which values are accepted; "" if none is
    refusal: str  # of other values: why, and what to write instead; "" if none is refused


def alike(one: Any, other: Any) -> bool:
    """bf16 and "bf16", 32 and "32" are."""
    return one == other or str(one) == str(other)


def written(value: Any) -> str:
    """A value as YAML has it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def moved(key: str, *ours: str, values: Mapping[Any, Any] | None = None, refusal: str = "") -> Rule:
    """The same setting under other names of ours; with `values`, those alone, each in our words."""

    def read(value: Any, _: Settings) -> dict[str, Any] | None:
        if values is None:
            return dict.fromkeys(ours, value)
        return dict.fromkeys(ours, values[value]) if isinstance(value, (str, int)) and value in values else None

    names = " and ".join(f"`{name}`" for name in ours)
    words = "".join(f"; `{written(theirs)}`: `{written(own)}`" for theirs, own in (values or {}).items())
    return Rule(key, read, names + words, refusal)


def reworded(key: str, words: Mapping[Any, Any]) -> Rule:
    """A key that ours has as well, some values of which have another name; the others are left to our own checks."""

    def read(value: Any, _: Settings) -> dict[str, Any]:
        return {key: words.get(value, value) if isinstance(value, (str, int)) else value}

    means = "the same; " + ", ".join(f"`{written(theirs)}` is `{written(own)}`" for theirs, own in words.items())
    return Rule(key, read, means, "")


def only(key: str, values: Sequence[Any], refusal: str) -> Rule:
    """Nothing to do for `values`, which ask for what happens anyway; others cannot be had."""
    accepted = ", ".join(f"`{written(value)}`" for value in values)
    return Rule(key, lambda value, _: {} if value in values else None, f"accepted: {accepted}", refusal)


def same_as(key: str, other: str, refusal: str) -> Rule:
    """Says again what another key says."""
    return Rule(
        key, lambda value, settings: {} if alike(value, settings(other)) else None, f"accepted: `{other}`'s", refusal
    )


def switched_off(key: str, switch: str, refusal: str) -> Rule:
    """A block about something that must be off: then it asks for nothing."""

    def read(block: Any, _: Settings) -> dict[str, Any] | None:
        return {} if block is None or (isinstance(block, dict) and not block.get(switch)) else None

    return Rule(key, read, f"accepted: with `{switch}: false`", refusal)


def refused(key: str, refusal: str) -> Rule:
    """Unless it is null or empty."""
    return Rule(key, lambda value, _: None if value not in (None, "", {}, []) else {}, "", refusal)

"""From a block of the YAML to a class and its options: one place for the errors about names and options."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

ROOT = "trainer.grpo.curriculum"


def resolve(section: str, known: Mapping[str, type], config: Mapping[str, Any]) -> tuple[type, dict[str, Any]]:
    """The class that `config["name"]` means, and all its options with defaults filled in.

    A class's options are the keyword-only parameters of its constructor. Raises ValueError, naming the key of the
    YAML, the value and what is known, for an unknown name or option.
    """
    name = str(config.get("name"))
    if name not in known:
        raise ValueError(f"{ROOT}.{section}.name: {name!r} is unknown; known: {', '.join(sorted(known))}")
    given = {key: value for key, value in config.items() if key != "name"}
    return known[name], _options(section, name, known[name], given)


def options(section: str, described: type, config: Mapping[str, Any]) -> dict[str, Any]:
    """All options of a block without a name, defaults filled in; ValueError for an unknown one."""
    if not isinstance(config, Mapping):
        raise ValueError(f"{ROOT}.{section}: {config!r} must be a block, as in {{key: value}}")
    return _options(section, section, described, config)


def _options(section: str, name: str, described: type, given: Mapping[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(described).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
    if unknown := sorted(set(given) - set(defaults)):
        offered = ", ".join(sorted(defaults)) or "none"
        raise ValueError(
            f"{ROOT}.{section}.{unknown[0]}: no such option (value {given[unknown[0]]!r}); options of {name}: {offered}"
        )
    return {**defaults, **given}


def describe(section: str, known: Mapping[str, type], config: Mapping[str, Any]) -> dict[str, Any]:
    """The resolved block, name and all options: what a checkpoint compares."""
    return {"name": config["name"], **resolve(section, known, config)[1]}


def check_number(key: str, value: Any, low: float, high: float = math.inf, *, whole: bool = False) -> None:
    """Raise ValueError naming `key` unless `value` is a finite number in [low, high] (an integer if `whole`)."""
    kinds = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not math.isfinite(value) or not low <= value <= high:
        kind = "an integer" if whole else "a number"
        span = f">= {low:g}" if high == math.inf else f"in [{low:g}, {high:g}]"
        raise ValueError(f"{ROOT}.{key}: {value!r} must be {kind} {span}")

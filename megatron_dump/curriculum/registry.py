"""From a block of the YAML to a class and its options: one place for the errors about names and options."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
from collections.abc import Mapping
from typing import Any

from megatron_dump.curriculum.own import FORMS, is_own, make_own, own_class

ROOT = "trainer.grpo.curriculum"


@dataclasses.dataclass(frozen=True)
class Named:
    """A block of the YAML whose `name` says which class it means: a built-in one, or one of the user's own."""

    section: str
    known: Mapping[str, type]  # the built-in ones
    protocol: type  # what a class of the user's own must have

    def resolve(self, config: Mapping[str, Any]) -> tuple[type, dict[str, Any]]:
        """The class that `config["name"]` means, and all its options with defaults filled in.

        A class's options are the keyword-only parameters of its constructor. Raises ValueError, naming the key of the
        YAML, the value and what is known, for an unknown name or option.
        """
        name = str(config.get("name"))
        given = {key: value for key, value in config.items() if key != "name"}
        if is_own(name):
            kind = own_class(self._key, name, self.protocol)
        elif name in self.known:
            kind = self.known[name]
        else:
            known = ", ".join(sorted(self.known))
            raise ValueError(f"{self._key}: {name!r} is unknown; known: {known}, or a class of your own: {FORMS}")
        return kind, _options(self.section, name, kind, given)

    def make(self, config: Mapping[str, Any], *given: Any) -> Any:
        """An object of the class, made as Class(*given, **options). ValueError as in `resolve`, and for bad values."""
        kind, options = self.resolve(config)
        name = str(config["name"])
        return make_own(self._key, name, kind, given, options) if is_own(name) else kind(*given, **options)

    def describe(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The resolved block, name and all options: what a checkpoint compares."""
        described = {"name": config["name"], **self.resolve(config)[1]}
        for option, value in described.items():
            try:
                json.dumps(value)
            except TypeError as error:
                key = f"{ROOT}.{self.section}.{option}"
                raise ValueError(f"{key}: {value!r} cannot be saved: give numbers, text, lists or blocks") from error
        return described

    @property
    def _key(self) -> str:
        return f"{ROOT}.{self.section}.name"


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
        if is_own(name):
            offered += " (the keyword-only parameters of its constructor)"
        raise ValueError(
            f"{ROOT}.{section}.{unknown[0]}: no such option (value {given[unknown[0]]!r}); options of {name}: {offered}"
        )
    options = {**defaults, **given}
    if needed := [key for key, value in options.items() if value is inspect.Parameter.empty]:
        raise ValueError(f"{ROOT}.{section}.{needed[0]}: no value, and {name} has no default: set it")
    return options


def check_number(key: str, value: Any, low: float, high: float = math.inf, *, whole: bool = False) -> None:
    """Raise ValueError naming `key` unless `value` is a finite number in [low, high] (an integer if `whole`)."""
    kinds = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not math.isfinite(value) or not low <= value <= high:
        kind = "an integer" if whole else "a number"
        span = f">= {low:g}" if high == math.inf else f"in [{low:g}, {high:g}]"
        raise ValueError(f"{ROOT}.{key}: {value!r} must be {kind} {span}")

"""From the block `model.data.rewards` to reward functions: names, options, and the errors about them."""

from __future__ import annotations

import fnmatch
import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from megatron_dump.types import Score

ROOT = "model.data.rewards"


class GroundTruthError(ValueError):
    """The row's ground truth cannot be read: the data set's fault, so it stops a run instead of scoring badly."""


class RewardFn(Protocol):
    def __call__(self, text: str, ground_truth: str) -> Score:
        """`text`: the completion without prompt and stop token; `ground_truth`: the row's reward_model.ground_truth.

        Never raises because of `text`, save TimeoutError; GroundTruthError when the ground truth cannot be read.
        """
        ...


Target = Callable[..., Any]  # a RewardFn, or a factory of one

# Name -> target or where to import it from: a reward that nobody asks for is not imported.
_TARGETS: dict[str, Target | str] = {
    "kk": "megatron_dump.rewards.kk:KKReward",
    "math": "megatron_dump.rewards.math:MathReward",
    "format": "megatron_dump.rewards.format:FormatReward",
    "reasoning_gym": "megatron_dump.rewards.reasoning_gym:ReasoningGymReward",
}
_OURS = frozenset(_TARGETS)


def register_reward(name: str, target: Target | str) -> None:
    """Make a reward known by name. ValueError when the name is taken.

    target: the reward function itself, or a factory of one (a class, say), or "package.module:attribute" for either.
    A factory takes no positional argument. Keyword-only parameters are what the configuration may set.
    """
    if name in _TARGETS:
        raise ValueError(f"reward function {name!r} exists already; choose another name")
    _TARGETS[name] = target


def reward_fn(name: str, options: Mapping[str, Any] | None = None) -> RewardFn:
    """The reward function of that name, or at the path "package.module:attribute", with these options.

    ValueError names the known names or options.
    """
    target, given = _target(name), dict(options or {})
    parameters = _parameters(target)
    known = {p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
    for key in sorted(set(given) - known):
        offered = ", ".join(sorted(known)) or "none"
        raise ValueError(f"{key}: no such option (value {given[key]!r}); options of {name}: {offered}")
    if not any(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.VAR_POSITIONAL) for p in parameters):
        return target(**given)
    return functools.partial(target, **given) if given else target


def reward_for_source(source: str, mapping: Mapping[str, Any]) -> RewardFn:
    """The reward function for a data source, by a mapping of source patterns to names or blocks.

    mapping: {"kk_logic_*": "kk"} or {"kk_logic_*": {"name": "kk", "mode": "binary"}}. A key that equals the source
    wins; otherwise the first matching pattern (shell wildcards) in the mapping's order.
    """
    return reward_functions(mapping, [source])[source]


def reward_functions(mapping: Mapping[str, Any], sources: Iterable[str]) -> dict[str, RewardFn]:
    """A reward function for every source; sources of one pattern share it. ValueError as in `reward_for_source`."""
    pattern_of = {source: _pattern(source, mapping) for source in sources}
    built = {pattern: _build(pattern, mapping[pattern]) for pattern in dict.fromkeys(pattern_of.values())}
    return {source: built[pattern] for source, pattern in pattern_of.items()}


def importable_targets(mapping: Mapping[str, Any]) -> dict[str, str]:
    """Name -> "module:attribute" of the rewards in a mapping that were registered at run time: what another process
    needs to know them. ValueError for one that no other process can import.
    """
    used = {value.get("name") if isinstance(value, Mapping) else value for value in mapping.values()}
    return {name: _path(name, target) for name, target in _TARGETS.items() if name in used and name not in _OURS}


def _pattern(source: str, mapping: Mapping[str, Any]) -> str:
    if source in mapping:
        return source
    for pattern in mapping:
        if fnmatch.fnmatchcase(source, pattern):
            return pattern
    raise ValueError(f"{ROOT}: no reward function for source {source!r}; patterns: {', '.join(mapping) or 'none'}")


def _build(pattern: str, value: Any) -> RewardFn:
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        raise ValueError(f"{ROOT}.{pattern}: {value!r} must be a name, or a block as in {{name: kk, mode: dump}}")
    options = {str(key): option for key, option in value.items() if key != "name"}
    try:
        return reward_fn(value["name"], options)
    except ValueError as error:
        raise ValueError(f"{ROOT}.{pattern}.{error}") from error


def _parameters(target: Target) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(target).parameters.values())
    except ValueError as error:  # some builtins and extensions have none
        raise ValueError(f"name: {target!r} has no signature; wrap it in a function of (text, ground_truth)") from error


def _target(name: str) -> Target:
    target = _TARGETS.get(name, name if ":" in name else None)
    if target is None:
        known = ", ".join(sorted(_TARGETS))
        raise ValueError(f"name: unknown reward function {name!r}; known: {known}, or a path package.module:function")
    return _import(target) if isinstance(target, str) else target


def _import(path: str) -> Target:
    module, _, attribute = path.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"name: cannot import reward function {path!r}: {error}") from error
    if not callable(found):
        raise ValueError(f"name: {path!r} is {found!r}, not a function")
    return found


def _path(name: str, target: Target | str) -> str:
    if isinstance(target, str):
        return target
    module, attribute = str(getattr(target, "__module__", "")), getattr(target, "__qualname__", "")
    found: Any = sys.modules.get(module) if module != "__main__" else None
    for part in attribute.split("."):
        found = getattr(found, part, None)
    if found is not target:
        raise ValueError(
            f"reward function {name!r} ({target!r}) cannot be imported by a reward process; put it at the top level of "
            "a module and register it as 'package.module:function', or set workers to 0"
        )
    return f"{module}:{attribute}"

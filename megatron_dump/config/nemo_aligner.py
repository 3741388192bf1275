"""A YAML of NeMo-Aligner as one of ours, key by key (nemo_aligner_keys.py); files of ours stay as they are."""

from __future__ import annotations

import copy
from typing import Any

from omegaconf import DictConfig, OmegaConf

from megatron_dump.config.foreign_keys import alike, written
from megatron_dump.config.nemo_aligner_keys import RULES
from megatron_dump.config.schema import Config

_ABSENT = object()


def translate(raw: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """(`raw` in our keys, a line for each key that is refused); `raw` is a resolved YAML and stays as it is."""
    found, defaults = copy.deepcopy(raw), OmegaConf.structured(Config)
    problems: list[str] = []
    changes: dict[str, Any] = {}

    def settings(key: str) -> Any:
        value = _at(raw, key)
        return _default(defaults, key) if value is _ABSENT or value == "???" else value

    for rule in RULES:
        value = _remove(found, rule.key)
        if value is _ABSENT:
            continue
        meaning = rule.read(value, settings)
        shown = rule.key if isinstance(value, dict) else f"{rule.key}={written(value)}"
        if meaning is None:
            problems.append(f"{shown}: {rule.refusal}")
            continue
        for ours, new in meaning.items():
            if ours != rule.key and _contradicts(_at(raw, ours), new, _default(defaults, ours)):
                problems.append(
                    f"{shown} means {ours}={written(new)}, which is {written(_at(raw, ours))}: remove one of them"
                )
            changes[ours] = new
    for key, value in changes.items():
        _set(found, key, value)
    return found, problems


def _contradicts(said: Any, new: Any, default: Any) -> bool:
    """A value of ours that is the default may come from the YAML that a recipe builds on."""
    return said is not _ABSENT and said != "???" and not alike(said, new) and not alike(said, default)


def _default(defaults: DictConfig, key: str) -> Any:
    value = OmegaConf.select(defaults, key, throw_on_missing=False)
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def _at(node: Any, key: str) -> Any:
    for part in key.split("."):
        if not isinstance(node, dict) or part not in node:
            return _ABSENT
        node = node[part]
    return node


def _remove(node: dict[str, Any], key: str) -> Any:
    """The value at a key, taken out, with blocks that are empty without it."""
    block, _, name = key.rpartition(".")
    parent = _at(node, block)
    if not isinstance(parent, dict) or name not in parent:
        return _ABSENT
    value = parent.pop(name)
    if not parent and "." in block:
        _remove(node, block)
    return value


def _set(node: dict[str, Any], key: str, value: Any) -> None:
    *blocks, name = key.split(".")
    for block in blocks:
        child = node.setdefault(block, {})
        node[block] = child if isinstance(child, dict) else {}
        node = node[block]
    node[name] = value

"""What a run's config.yaml changes against the defaults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from megatron_dump.config import HIDDEN, Config, is_secret


def read_settings(log_dir: Path) -> dict[str, Any] | None:
    """`a.b.c` -> value, as the run was started with; None without a config.yaml that can be read.

    A killed run may have left half a file, and a report must not depend on it.
    """
    path = log_dir / "config.yaml"
    try:
        loaded = OmegaConf.to_container(OmegaConf.load(path)) if path.exists() else None
    except (OmegaConfBaseException, YAMLError):
        return None
    return flatten(loaded) if isinstance(loaded, dict) else None


def default_settings() -> dict[str, Any]:
    """The same of gpt_grpo.yaml: the schema holds its defaults."""
    loaded = OmegaConf.to_container(OmegaConf.structured(Config))
    assert isinstance(loaded, dict)
    return flatten(loaded)


def changes(settings: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(key, the run's value, the default), as JSON, of every key that differs; a secret's value is not shown."""
    defaults = default_settings()
    rows = []
    for key in sorted({*settings, *defaults}):
        value, default = settings.get(key), defaults.get(key)
        if key not in settings or (key in defaults and value == default):  # an older run has fewer keys
            continue
        shown = HIDDEN if is_secret(key, value) else json.dumps(value, ensure_ascii=False)
        usual = json.dumps(default, ensure_ascii=False) if key in defaults else "–"
        rows.append((key, shown, "to be set" if default == "???" else usual))
    return rows


def flatten(tree: dict[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves by their dotted key; an empty block is a leaf."""
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        leaves |= flatten(value, f"{key}.") if isinstance(value, dict) and value else {key: value}
    return leaves

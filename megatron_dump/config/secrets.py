"""What must not be written down: values of keys that are named like secrets."""

from __future__ import annotations

import re
from typing import Any

from omegaconf import DictConfig, OmegaConf

HIDDEN = "***"
_NAME = re.compile(r"(api_?key|access_?key|secret|password|passwd|credential|token)s?$", re.IGNORECASE)


def is_secret(key: str, value: object) -> bool:
    """Whether `value` is not to be shown: text under such a name (dotted or not); a count of tokens is none."""
    return _NAME.search(key) is not None and isinstance(value, str)


def recorded(config: DictConfig) -> dict[str, Any]:
    """The configuration with its references resolved, for config.yaml.

    A secret that comes from the environment stays the reference it was (`${oc.env:WANDB_API_KEY}`): the file can
    be used again. Any other is `***`.
    """
    resolved, written = (OmegaConf.to_container(config, resolve=resolve) for resolve in (True, False))
    assert isinstance(resolved, dict) and isinstance(written, dict)
    return _without_secrets(resolved, written)


def _without_secrets(resolved: Any, written: Any, key: str = "") -> Any:
    if isinstance(resolved, dict):
        # A block may be a reference as a whole: then there is nothing written to go back to.
        sources = written if isinstance(written, dict) else {}
        return {name: _without_secrets(value, sources.get(name), str(name)) for name, value in resolved.items()}
    if isinstance(resolved, list):
        sources = written if isinstance(written, list) else [None] * len(resolved)
        return [_without_secrets(*pair, key) for pair in zip(resolved, sources, strict=True)]
    if not is_secret(key, resolved):
        return resolved
    return written if isinstance(written, str) and written.startswith("${") else HIDDEN

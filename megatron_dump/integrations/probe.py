"""Is the host the one that an integration was written for? Asked of its signatures, not of its version number."""

from __future__ import annotations

import importlib.metadata
import inspect
from collections.abc import Callable, Mapping
from typing import Any


def require_signatures(
    package: str, found: Mapping[str, Callable[..., Any] | None], expected: Mapping[str, str]
) -> None:
    """RuntimeError naming every callable that is missing, or takes other parameters than expected.

    package: the host's distribution; found: dotted name -> the callable, None where there is none; expected: dotted
    name -> parameter names without self, separated by spaces.
    """
    wrong = []
    for name, parameters in expected.items():
        target = found.get(name)
        if target is None:
            wrong.append(f"{name} is missing")
            continue
        takes = [parameter for parameter in inspect.signature(target).parameters if parameter != "self"]
        if takes != parameters.split():
            wrong.append(f"{name} takes ({', '.join(takes)}), expected ({', '.join(parameters.split())})")
    if wrong:
        host = f"{package} {importlib.metadata.version(package)}"
        raise RuntimeError(f"{host} differs from what the curriculum knows: {'; '.join(wrong)}")

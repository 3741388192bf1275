"""Policies of the user's own: from "package.module:Class" or "path/to/file.py:Class" to the class."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

FORMS = "package.module:Class or path/to/file.py:Class"


def is_own(name: str) -> bool:
    """No built-in policy has a colon in its name."""
    return ":" in name


def own_class(key: str, name: str, protocol: type) -> type:
    """The class that `name` means. A file's path is relative to the working directory.

    ValueError names `key`, the name and a remedy: where nothing can be imported, where there is no such class, and
    where the class lacks a member of `protocol`.
    """
    where, _, attribute = name.rpartition(":")
    try:
        module = _run_file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
    except Exception as error:
        remedy = (
            "check the path, which starts at the working directory, and what the file imports"
            if where.endswith(".py")
            else "check the name and PYTHONPATH, or name a file: path/to/file.py:Class"
        )
        raise ValueError(f"{key}: {name!r} cannot be imported: {in_one_line(error)}; {remedy}") from error
    found: Any = module
    for part in attribute.split("."):
        found = getattr(found, part, None)
    if not isinstance(found, type):
        classes = [n for n, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
        offered = ", ".join(n for n in classes if isinstance(vars(module)[n], type)) or "none"
        raise ValueError(f"{key}: {name!r}: {where} has no class {attribute!r}; its classes: {offered}")
    if missing := _missing(found, protocol):
        home = f"{protocol.__name__} in {protocol.__module__.replace('.', '/')}.py"
        raise ValueError(f"{key}: {name!r} lacks {', '.join(missing)}; give the class every member of {home}")
    return found


def make_own(key: str, name: str, kind: type, given: Sequence[Any], options: Mapping[str, Any]) -> Any:
    """An object of the class. ValueError in one line where its constructor raises, or its state cannot be saved."""
    try:
        made = kind(*given, **options)
        state = made.state_dict() if hasattr(made, "state_dict") else {}
        kinds = {str(array): np.asarray(values).dtype for array, values in state.items()}
    except Exception as error:
        raise ValueError(
            f"{key}: {name!r} cannot be made: {in_one_line(error)}; mend the class or its options"
        ) from error
    if unfit := [f"{array!r} of dtype {dtype}" for array, dtype in kinds.items() if dtype.kind not in "biuf"]:
        raise ValueError(f"{key}: {name!r}: state_dict has {unfit[0]}, which is not saved; make it an array of numbers")
    return made


def in_one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _run_file(path: Path) -> ModuleType:
    """The file as a module. It runs once in a process, as an import does."""
    path = path.resolve()
    name = f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"  # two files may have the same stem
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # for a path that ends with .py there is a loader
    sys.modules[name] = module = importlib.util.module_from_spec(spec)  # first: dataclasses look for their module here
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _missing(kind: type, protocol: type) -> list[str]:
    """Members of the protocol that the class does not have, or has only as the protocol's own empty ones."""
    methods = [n for n, value in vars(protocol).items() if inspect.isfunction(value) and not n.startswith("_")]
    members = [*inspect.get_annotations(protocol), *methods]
    absent = [n for n in members if getattr(kind, n, None) is None or getattr(kind, n) is vars(protocol).get(n)]
    return list(dict.fromkeys([*absent, *sorted(getattr(kind, "__abstractmethods__", ()))]))

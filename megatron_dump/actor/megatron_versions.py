"""Differences between the versions of megatron-core that this package runs on; nothing else asks for a version.

It imports megatron in functions alone, so that actor/__init__.py can refuse a version before anything imports it.
Each difference says from which version on it is there, and why. When a version is no longer supported, its lines go.
docs/status.md says what has been run with which version.
"""

from __future__ import annotations

import functools
import importlib.util
import io
import pathlib
import re
import warnings
from typing import Any

import torch

OLDEST, NEWEST = (0, 16), (0, 19)  # that this package was run with


def installed() -> tuple[int, int] | None:
    """megatron-core's version, read from its file: importing an unknown version may fail. None where there is none."""
    found = importlib.util.find_spec("megatron") and importlib.util.find_spec("megatron.core")
    if not found or not found.origin:
        return None
    text = pathlib.Path(found.origin).with_name("package_info.py").read_text()
    major, minor = (re.search(rf"^{part} = (\d+)", text, re.MULTILINE) for part in ("MAJOR", "MINOR"))
    assert major and minor, f"{found.origin}: no version in package_info.py"
    return int(major[1]), int(minor[1])


VERSION = installed() or OLDEST  # without any, the first import of megatron fails by itself


def refuse_older(version: tuple[int, int] = VERSION) -> None:
    """ImportError for a megatron-core older than OLDEST."""
    if version < OLDEST:
        raise ImportError(f"megatron-core {_text(version)} is too old: pip install 'megatron-core>={_text(OLDEST)}'")


def warn_of_newer(version: tuple[int, int] = VERSION) -> None:
    """One warning for a megatron-core newer than NEWEST: Python shows that of one place once a process."""
    if version > NEWEST:
        warnings.warn(
            f"megatron-core {_text(version)} is newer than what megatron_dump was run with ({_text(OLDEST)} to "
            f"{_text(NEWEST)}); if it fails, pip install 'megatron-core=={_text(NEWEST)}.*'",
            stacklevel=2,
        )


def _text(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def mlp_of(spec: Any, kind: Any, tensor_group: torch.distributed.ProcessGroup) -> Any:
    """The dense feed-forward layer that `spec` describes, of another class; split over `tensor_group`.

    From 0.18 on the layer calls partial(MLP.as_mlp_submodule, submodules=…), with the group. Before, it builds a
    ModuleSpec and hands the group to its own class alone; others would take the process's global one.
    """
    from megatron.core.transformer.spec_utils import ModuleSpec

    if VERSION < (0, 18):
        return ModuleSpec(kind, {"tp_group": tensor_group}, spec.submodules)
    return functools.partial(kind.as_mlp_submodule, submodules=spec.keywords["submodules"])


def load(state: dict[str, Any], folder: pathlib.Path) -> dict[str, Any]:
    """dist_checkpointing.load of what any supported version has saved. Collective.

    Up to 0.18, what is not a tensor lies in common.pt; from 0.19 on, in an object beside the tensors. Newer versions
    read both, older ones are given what is in the object.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import serialization
    from megatron.core.dist_checkpointing.mapping import ShardedObject
    from megatron.core.dist_checkpointing.strategies import common as strategies
    from torch.distributed.checkpoint import FileSystemReader

    if VERSION >= (0, 19) or (folder / "common.pt").exists():
        return dist_checkpointing.load(state, str(folder))
    key = ShardedObject("common_state", None, (1,), (0,)).unique_key
    found: dict[str, Any] = {key: io.BytesIO()}
    torch.distributed.checkpoint.load(found, storage_reader=FileSystemReader(folder), no_dist=True)
    common = found[key] if isinstance(found[key], list) else torch.load(found[key], weights_only=True)
    owner: Any = serialization if VERSION >= (0, 17) else strategies.TorchCommonLoadStrategy
    kept, owner.load_common = owner.load_common, lambda *_: common[0]
    try:
        return dist_checkpointing.load(state, str(folder))
    finally:
        owner.load_common = kept

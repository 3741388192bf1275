"""Differences between the versions of megatron-core that this package runs on; nothing else asks for a version.

Each difference says from which version on it is there, and why. When a version is no longer supported, its lines go.
docs/status.md says what has been run with which version.
"""

from __future__ import annotations

import functools
import io
import pathlib
import warnings
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core import package_info as megatron_core
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies import common as strategies
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.spec_utils import ModuleSpec
from torch.distributed.checkpoint import FileSystemReader

OLDEST, NEWEST = (0, 16), (0, 19)  # that this package was run with
VERSION = (megatron_core.MAJOR, megatron_core.MINOR)


def check(version: tuple[int, int] = VERSION, warn: bool = True) -> None:
    """ImportError for a megatron-core older than OLDEST; with `warn`, one warning for a newer one than NEWEST."""
    found, oldest, newest = (".".join(map(str, v)) for v in (version, OLDEST, NEWEST))
    if version < OLDEST:
        raise ImportError(f"megatron-core {found} is too old: pip install 'megatron-core>={oldest}'")
    if version > NEWEST and warn:
        # Python shows a warning of one place once a process.
        warnings.warn(
            f"megatron-core {found} is newer than what megatron_dump was run with ({oldest} to {newest}); if it fails, "
            f"pip install 'megatron-core=={newest}.*'",
            stacklevel=2,
        )


def mlp_of(spec: Any, kind: type[MLP], tensor_group: torch.distributed.ProcessGroup) -> Any:
    """The dense feed-forward layer that `spec` describes, of another class; split over `tensor_group`.

    From 0.18 on the layer calls partial(MLP.as_mlp_submodule, submodules=…), with the group. Before, it builds a
    ModuleSpec and hands the group to its own class alone; others would take the process's global one.
    """
    if VERSION < (0, 18):
        return ModuleSpec(kind, {"tp_group": tensor_group}, spec.submodules)
    return functools.partial(kind.as_mlp_submodule, submodules=spec.keywords["submodules"])


def load(state: dict[str, Any], folder: pathlib.Path) -> dict[str, Any]:
    """dist_checkpointing.load of what any supported version has saved. Collective.

    Up to 0.18, what is not a tensor lies in common.pt; from 0.19 on, in an object beside the tensors. Newer versions
    read both, older ones are given what is in the object.
    """
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

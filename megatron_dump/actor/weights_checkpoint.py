"""The model's weights alone in megatron-core's dist_checkpointing format, as they lie in a run's checkpoints.

PATH/model holds them; a run's step_<n>/model holds the optimizer beside them, which is not read here. Loading unpickles
megatron-core's own files: give it only checkpoints that you wrote.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import nn

from megatron_dump.actor import checkpoint_write, megatron_versions
from megatron_dump.actor.architecture import Architecture
from megatron_dump.actor.hf_files import some
from megatron_dump.actor.parallel import Parallel
from megatron_dump.actor.partial_folder import PartialFolder
from megatron_dump.distributed import fail_together

_EMBEDDING = "embedding.word_embeddings.weight"
_FP8 = "._extra_state"  # in the names of what Transformer Engine keeps of FP8
_MODEL = "model"  # folder of the tensors in a checkpoint


def save_weights(modules: Sequence[nn.Module], parallel: Parallel, path: str, replace: bool = False) -> None:
    """Write PATH/model, for any layout to load. Collective; RuntimeError on every rank when PATH exists."""
    folder = PartialFolder(path, (_MODEL,) if replace else ())
    with fail_together(f"saving {path}", device=parallel.device):
        if parallel.rank == 0:
            folder.prepare()
            (folder.partial / _MODEL).mkdir()
    checkpoint_write.save(_sharded_state(modules), folder.partial / _MODEL)
    with fail_together(f"saving {path}", device=parallel.device):
        if parallel.rank == 0:
            folder.publish()


def load_weights(modules: Sequence[nn.Module], arch: Architecture, parallel: Parallel, path: str) -> None:
    """Fill the parameters from PATH/model, whatever layout wrote it. Collective.

    RuntimeError on every rank, naming tensors and shapes, when they are not those of this model.
    """
    state = _sharded_state(modules)
    with fail_together(f"loading {path}", device=parallel.device):
        _check(state, _stored(path), arch, path)
    loaded = megatron_versions.load(state, pathlib.Path(path) / _MODEL)
    for name, module in zip(state, modules, strict=True):
        load_state(module, loaded[name])


def stored_dtype(path: str) -> torch.dtype:
    """Of the weights in PATH/model. FileNotFoundError when there are none."""
    return _stored(path)[_EMBEDDING].dtype


def _sharded_state(modules: Sequence[nn.Module]) -> dict[str, Any]:
    """Chunks of an interleaved pipeline are told apart in this process only; on disk a tensor has its global name."""
    return {f"model{i}": sharded_weights(module) for i, module in enumerate(modules)}


def sharded_weights(module: nn.Module) -> dict[str, Any]:
    """A module's weights as megatron-core shards them, under names that do not depend on whose layers they are.

    Without what Transformer Engine keeps of FP8 beside them: megatron-core's local norms have no such entry.
    """
    state = module.sharded_state_dict()  # pyright: ignore[reportCallIssue]
    return {name: value for name, value in state.items() if _FP8 not in name}


def load_state(module: nn.Module, state: dict[str, Any]) -> None:
    """Fill a module from what was loaded as its `sharded_weights`. RuntimeError when a weight is missing."""
    own = {name: value for name, value in module.state_dict().items() if _FP8 in name}
    module.load_state_dict({**own, **state})


def _stored(path: str) -> dict[str, ShardedTensor]:
    folder = pathlib.Path(path) / _MODEL
    if not (folder / "metadata.json").is_file():
        raise FileNotFoundError(f"{folder} is no checkpoint: give the step_<n> folder of a run")
    stored = dist_checkpointing.load_tensors_metadata(str(folder))
    if _EMBEDDING not in stored:
        raise ValueError(f"{folder} holds no model: it has no {_EMBEDDING}")
    return stored


def _check(state: dict[str, Any], stored: dict[str, ShardedTensor], arch: Architecture, path: str) -> None:
    wrong = []
    for tensor in (t for chunk in state.values() for t in chunk.values() if isinstance(t, ShardedTensor)):
        theirs = stored.get(tensor.key)
        if theirs is None:
            wrong.append(f"{tensor.key} is missing")
        # The vocabulary is filled up to a multiple that depends on the layout.
        elif tensor.global_shape != theirs.global_shape and not tensor.allow_shape_mismatch:
            wrong.append(f"{tensor.key} has shape {list(theirs.global_shape)}, not {list(tensor.global_shape)}")
    if (rows := stored[_EMBEDDING].global_shape[0]) < arch.vocab_size:
        wrong.append(f"{_EMBEDDING} has {rows} rows, not {arch.vocab_size}")
    if wrong:
        raise ValueError(f"{path} is a checkpoint of another model: {some(wrong)}")

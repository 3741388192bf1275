"""Transformer Engine's layers on CPU, where they can be built, loaded and saved but not run."""

from __future__ import annotations

import pathlib

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from transformer_engine.pytorch.module.base import TransformerEngineBaseModule

from megatron_dump.actor import convert, model, weights_checkpoint
from tests.distributed.families import FAMILIES, build, tensors, write_family
from tests.distributed.launch import run_ranks

pytestmark = pytest.mark.te
LAYOUTS = {"one": (1, {}), "TP2xPP2": (4, {"tensor": 2, "pipeline": 2}), "EP2": (2, {"expert": 2})}
CASES = [(f, x) for f in FAMILIES for x in LAYOUTS if x != "EP2" or f.endswith("moe")]


def build_both(path: pathlib.Path, sizes: dict[str, int]):
    """(modules, arch, grid) of megatron-core's local layers and of Transformer Engine's, in a forked rank."""
    modules, arch, grid = build(path, **sizes)
    model.transformer_engine_runs = lambda: True
    config = model.transformer_config(arch, grid, "32")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.cuda.is_available", lambda: True)  # constructors ask, though they make tensors on the CPU
        fused = [model.build_model(arch, config, grid, chunk=i) for i in range(len(modules))]
    convert.load_hf(fused, arch, grid, str(path))
    assert not _has_engine(modules) and _has_engine(fused)
    return (modules, arch, grid), (fused, arch, grid)


def _has_engine(modules) -> bool:
    return any(isinstance(m, TransformerEngineBaseModule) for chunk in modules for m in chunk.modules())


def sharded(modules) -> dict[str, tuple]:
    """Where this rank's tensors lie in the whole model's, by name."""
    found = {}
    for chunk in modules:
        for value in chunk.sharded_state_dict().values():
            for tensor in value.build() if hasattr(value, "build") else [value]:
                if isinstance(tensor, ShardedTensor):
                    found[tensor.key, tensor.global_offset] = (tensor.global_shape, tensor.local_shape, tensor.dtype)
    return found


def moved(source, target, path: str) -> bool:
    """Does a checkpoint of one implementation's weights give the other the same?"""
    (modules, _, _), (others, arch, grid) = source, target
    weights_checkpoint.save_weights(modules, grid, path)
    expected = [tensor.clone() for _, tensor in convert.named_hf_weights(others, arch, grid)]
    for parameter in (p for chunk in others for p in chunk.parameters()):
        parameter.data.fill_(float("nan"))
    weights_checkpoint.load_weights(others, arch, grid, path)
    found = [tensor for _, tensor in convert.named_hf_weights(others, arch, grid)]
    return all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_both_implementations_are_the_same_model_on_disk(family, layout, tmp_path):
    """A Hugging Face folder, the places of tensors in a checkpoint, and checkpoints that the other one wrote."""
    world, sizes = LAYOUTS[layout]
    write_family(tmp_path / "in", family)

    def on_rank():
        local, fused = build_both(tmp_path / "in", sizes)
        convert.save_hf(*fused, str(tmp_path / "out"), source=str(tmp_path / "in"))
        places = [sharded(modules) for modules, _, _ in (local, fused)]
        return places, moved(local, fused, str(tmp_path / "local")), moved(fused, local, str(tmp_path / "engine"))

    for (local, fused), to_engine, to_local in run_ranks(on_rank, world):
        assert local and fused == local
        assert to_engine and to_local
    expected, found = tensors(tmp_path / "in"), tensors(tmp_path / "out")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())

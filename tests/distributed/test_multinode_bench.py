"""tools/benchmark_multinode.py on real ranks: collectives, a step, bytes held, and the report of it all."""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import sys

import pytest
import torch

sys.path.append(str(pathlib.Path(__file__).resolve().parents[2] / "tools"))

from multinode_bench import collectives, memory, parts, steps
from multinode_bench.constants import read_constants
from multinode_bench.shape import Shape

from megatron_dump.actor import memory as real
from megatron_dump.actor import parallel
from megatron_dump.actor.layout import Layout
from tests.distributed.launch import run_ranks
from tests.distributed.runs import arguments, make_data
from tests.distributed.tiny import make_actor, share_of, write_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("multinode")


def options(out, **given) -> argparse.Namespace:
    return argparse.Namespace(out=out, **given)


def test_collectives_of_training_groups(folder):
    """Two tensor ranks × two replicas: each operation of each group once a size, and its line through the sizes."""
    run_ranks(lambda: measure_collectives(folder), 4)
    (path,) = (folder / "collectives").glob("*.json")
    found = json.loads(path.read_text())
    assert (found["backend"], found["ranks"], found["nodes"]) == ("gloo", 4, 1)
    assert {(r["group"], r["ranks"]) for r in found["rows"]} == {("tensor", 2), ("data", 2), ("world", 4)}
    assert len(found["rows"]) == 3 * len(collectives.OPERATIONS) * len(collectives.QUICK_SIZES)
    for row in found["rows"]:
        assert 0 < row["fastest"] <= row["seconds"] <= row["slowest"]
        assert row["algbw"] == pytest.approx(row["bytes"] / row["seconds"])
        factor = {2: 1.0, 4: 1.5}[row["ranks"]] if row["operation"] == "all_reduce" else 1.0
        assert row["busbw"] == pytest.approx(factor * row["algbw"])
    assert len(found["fits"]) == 9 and all(fit["alpha_s"] > 0 or fit["beta_s_per_byte"] > 0 for fit in found["fits"])
    page = (folder / "report.html").read_text()
    assert "data:image/png;base64," in page and "http:" not in page and "https:" not in page


def measure_collectives(out) -> None:
    found = collectives.measure(parallel.initialize(Layout(tensor=2)), quick=True)
    if torch.distributed.get_rank() == 0:
        parts.save_collectives(found, Layout(tensor=2), out)


CASES = [
    (1, 1, 1, {}),
    (4, 2, 1, {}),
    (2, 1, 2, {}),
    (4, 1, 2, {"model": {"virtual_pipeline_model_parallel_size": 2}}),
    (2, 1, 1, {"model": {"context_parallel_size": 2}}),
    (2, 1, 1, {"model": {"use_distributed_optimizer": False}}),
    (2, 1, 1, {"model": {"overlap_grad_reduce": True}, "trainer": {"precision": "bf16"}}),
]


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-TP{case[1]}PP{case[2]}-{len(str(case[3]))}")
def test_bytes_of_a_dense_actor(tmp_path, family, case):
    """Parameters, gradients, optimizer and reference, on every rank, to the byte."""
    write_model(str(tmp_path), tied=family == "qwen2", family=family)
    world, tensor, pipeline, overrides = case
    for measured, predicted in run_ranks(lambda: held(tmp_path, tensor, pipeline, **overrides), world):
        assert predicted == measured


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe"])
@pytest.mark.parametrize(
    ("world", "tensor", "model"),
    [
        (2, 1, {"expert_model_parallel_size": 2}),
        (4, 1, {"expert_model_parallel_size": 2}),
        (4, 2, {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1, "sequence_parallel": True}),
    ],
)
def test_bytes_of_an_actor_with_experts(tmp_path, family, world, tensor, model):
    write_model(str(tmp_path), tied=False, family=family)
    for measured, predicted in run_ranks(lambda: held(tmp_path, tensor, 1, model=model), world):
        assert predicted == measured


def held(path, tensor, pipeline, **overrides) -> tuple[list[int], list[int]]:
    """(measured, predicted) bytes of this rank, by memory.PARTS."""
    actor = make_actor(str(path), tensor, pipeline, **overrides)
    place = actor.parallel
    predicted = memory.held(
        Shape(actor.arch, place.layout),
        place.pipeline_rank,
        place.data_rank * place.context_size + place.context_rank,
        place.data_size * place.context_size,
        actor.transformer_config.params_dtype.itemsize,
        actor.options.use_distributed_optimizer,
        actor.options.overlap_grad_reduce,
    )
    measured = real.held(actor.models, actor.optimizer, actor.reference.weights)
    return measured, [predicted.parameters, predicted.gradients, predicted.optimizer, predicted.reference]


@pytest.mark.parametrize(("tensor", "sequence"), [(1, False), (2, False), (2, True)])
def test_activations_are_those_that_autograd_keeps(tmp_path, tensor, sequence):
    """What a layer saves for its backward pass, each storage once, without weights."""
    write_model(str(tmp_path))

    def saved() -> tuple[float, float]:
        actor = make_actor(str(tmp_path), tensor, model={"sequence_parallel": sequence})
        layer, place = actor.module.decoder.layers[1], actor.parallel
        tokens = share_of(actor).tokens
        length, rows = tokens.shape[1], len(tokens)
        hidden = torch.randn(length // (tensor if sequence else 1), rows, 32, requires_grad=True)
        known = {p.untyped_storage().data_ptr() for p in actor.module.parameters()}
        kept: dict[int, int] = {}

        def keep(value: torch.Tensor) -> torch.Tensor:
            storage = value.untyped_storage()
            if value.is_floating_point() and storage.data_ptr() not in known:
                kept[storage.data_ptr()] = storage.nbytes()
            return value

        rotary = actor.module.rotary_pos_emb(length)
        known.add(rotary.untyped_storage().data_ptr())
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
            output = layer(hidden, attention_mask=None, rotary_pos_emb=rotary)
        assert output is not None
        return float(sum(kept.values())), memory.layer_activations(Shape(actor.arch, place.layout), length * rows, 4)

    for measured, predicted in run_ranks(saved, tensor):
        print(f"TP{tensor}, sequence {sequence}: {predicted / measured:.3f}")
        assert predicted == pytest.approx(measured, rel=0.35)


def test_steps_of_one_rank_predict_bytes_and_seconds_of_two(folder, tmp_path):
    """Steps of the real trainer on one rank and on two layouts of two; constants from the former and collectives."""
    run_ranks(lambda: measure_collectives(folder), 4)
    data = make_data(tmp_path)
    for world, tensor, name, prompts in ((1, 1, "1", 4), (1, 1, "1-half", 2), (2, 2, "TP2", 4), (2, 1, "DP2", 4)):
        settings = {"trainer.grpo.num_prompts_per_grpo_step": prompts, "model.global_batch_size": 4 * prompts}
        given = arguments(world, data, tmp_path / "unused", tensor=tensor, **settings)
        run_ranks(lambda name=name, given=given: steps.measure(name, "strong", given, 1, folder), world)
    parts.run_simulation(options(folder, check=folder))
    found = json.loads((folder / "check.json").read_text())
    assert len(found["bytes"]) == 4 * 4 and all(row["exact"] for row in found["bytes"])
    fitted = {row["name"]: row["fitted"] for row in found["seconds"]}
    assert fitted == {"1": True, "1-half": True, "TP2": False, "DP2": False}
    for row in found["seconds"]:
        measured = [both["measured"] for phase, both in row["phases"].items() if phase != "step"]
        assert sum(measured) == pytest.approx(row["phases"]["step"]["measured"])  # of the one step
        assert row["ratio"] > 0
    constants = read_constants(folder / "constants.json")
    assert constants.measured_ranks == 4 and constants.cores_per_node == os.cpu_count()
    assert (folder / "check.png").exists() and "Predicted" in (folder / "report.html").read_text()

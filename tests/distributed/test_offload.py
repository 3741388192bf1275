"""Optimizer states on the host while completions are generated, and what the memory report says."""

from __future__ import annotations

import pytest
import torch

from megatron_dump.actor import memory
from megatron_dump.actor.offload import optimizer_parts, own_tensors
from tests.distributed.launch import run_ranks
from tests.distributed.test_checkpoints import digest, step
from tests.distributed.tiny import make_actor, share_of, write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("model"))
    write_model(path)
    return path


def _buffers(actor) -> list:
    return [b for model in actor.models for b in (*model.buffers, *model.expert_parallel_buffers)]


@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_offloading_changes_no_bit(model, precision):
    """Three steps with the states away while the policy runs forward, against three without."""

    def train(offload: bool):
        actor = make_actor(
            model, 1, 2, trainer={"precision": precision}, model={"grpo": {"offload_adam_states": offload}}
        )
        forwards = []
        for seed in range(3):
            with actor.generating():
                assert all((b.grad_data.untyped_storage().size() == 0) == offload for b in _buffers(actor))
                forwards.append(actor.compute_logprobs(share_of(actor, seed)))
            if offload:
                assert all(b.grad_data.untyped_storage().size() and not b.grad_data.any() for b in _buffers(actor))
            step(actor, seed)
        return digest(actor), [None if f is None else f.tobytes() for f in forwards]

    assert run_ranks(train, 4, True) == run_ranks(train, 4, False)


@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_the_states_move_and_the_weights_stay(model, precision):
    """In bf16 the master weights move too; in fp32 they are the model's weights, which generation needs."""

    def rank():
        actor = make_actor(model, trainer={"precision": precision}, model={"grpo": {"offload_adam_states": True}})
        step(actor, 0)
        parts, weights = optimizer_parts(actor.optimizer), [p for m in actor.modules for p in m.parameters()]
        tensors = own_tensors(parts, actor.models)
        before = [(t.data_ptr(), t.clone()) for t in tensors], [p.data_ptr() for p in weights]
        with actor.generating():
            assert all(t.data_ptr() != p and t.device.type == "cpu" for t, (p, _) in zip(tensors, before[0]))
        assert all(torch.equal(t, was) for t, (_, was) in zip(tensors, before[0], strict=True))
        assert [p.data_ptr() for p in weights] == before[1]
        groups = [p for part in parts for group in part.optimizer.param_groups for p in group["params"]]
        n = sum(p.numel() for p in groups)
        return n, sum(t.numel() for t in tensors) / n, sum(p.numel() for p in weights)

    for n, moved, parameters in run_ranks(rank, 2):
        assert moved == {"32": 2, "bf16": 3}[precision]
        assert n == pytest.approx(parameters / 2, rel=0.1)  # this rank's half, give or take the padding


def test_states_return_when_generation_fails(model):
    def rank():
        actor = make_actor(model, model={"grpo": {"offload_adam_states": True}})
        step(actor, 0)
        was = digest(actor)
        with pytest.raises(KeyError), actor.generating():
            raise KeyError
        assert digest(actor) == was
        step(actor, 1)

    run_ranks(rank, 1)


@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_the_report_counts_every_part(model, precision):
    """2 data-parallel ranks; bytes worked out from the number of parameters."""

    def rank():
        actor = make_actor(model, trainer={"precision": precision})
        n = sum(p.numel() for m in actor.modules for p in m.parameters())
        held = memory.held(actor.models, actor.optimizer, actor.reference.weights)
        line, usage = actor.memory_report(), actor.memory_usage()
        step(actor, 0)
        # moments count before they exist
        assert memory.held(actor.models, actor.optimizer, actor.reference.weights) == held
        return n, held, line, usage

    (n, first, line, usage), (_, second, other_line, other_usage) = run_ranks(rank, 2)
    assert (line, usage) == (other_line, other_usage)
    weight, master = {"32": (4, 0), "bf16": (2, 4)}[precision]
    for parameters, gradients, _, reference in (first, second):
        assert parameters == reference == weight * n
        assert 4 * n <= gradients < 4.4 * n  # with padding
    assert first[2] + second[2] == (8 + master) * n
    groups = line.split("; ")  # one for both ranks, or one each: the halves of a buffer hold other parameters
    assert line.startswith("memory of rank") and all(f"{name} 0." in group for group in groups for name in memory.PARTS)
    assert 0.05 < usage["perf/memory_rss_gb"] < 50

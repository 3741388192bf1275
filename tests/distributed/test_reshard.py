"""Which copy of the policy generates, and copies that keep the tensor split."""

from __future__ import annotations

import pytest

from megatron_dump.actor.whole import WholePolicy, copy_bytes
from megatron_dump.rollout import reshard
from megatron_dump.rollout.megatron import MegatronGenerator
from megatron_dump.rollout.sampling import SamplingOptions
from tests.distributed.launch import run_ranks
from tests.distributed.test_rollout import CP2, EP2, PP2, SP, TP2, VPP2, _requests
from tests.distributed.tiny import STOP, make_actor, write_model

STAGES = {
    "TP2xPP2": (4, {**TP2, **PP2}),
    "TP2xSPxPP2xVPP2": (4, {**TP2, **SP, **VPP2}),
    "TP2xSPxCP2": (4, {**TP2, **SP, **CP2}),
    "PP2": (2, PP2),
}


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def model(request, tmp_path_factory):
    path = str(tmp_path_factory.mktemp("model"))
    write_model(path, tied=request.param)
    return path, run_ranks(lambda: _generate(path, {}, False), 1)[0]


def _generate(path, keys, mode):
    """Completions by `inference_backend.reshard=mode`, their log-probabilities, and what was chosen."""
    actor = make_actor(path, model=keys)
    options = SamplingOptions(20, (STOP, 7), 0.7)
    choice = reshard.choose(actor, mode)
    generator = reshard.policy_generator(
        actor, choice, "32", lambda policy: MegatronGenerator(policy, options, 3, 64, lambda ids: "")
    )
    completions = generator.generate(0, _requests())
    assert generator.notice == choice.notice
    return [(c.group_id, c.sample, c.token_ids.tolist()) for c in completions], choice


@pytest.mark.parametrize("layout", STAGES)
def test_copies_without_stages_generate_the_same(model, layout):
    path, (expected, _) = model
    world, keys = STAGES[layout]
    for completions, choice in run_ranks(lambda: _generate(path, keys, "pipeline"), world):
        assert choice.copy == reshard.PIPELINE
        assert completions == expected


@pytest.mark.parametrize(
    ("world", "keys", "experts"),
    [(4, {**TP2, **PP2}, False), (2, VPP2, False), (4, {**EP2, **PP2}, True), (2, {**TP2, **SP}, True)],
)
@pytest.mark.parametrize("keep_tensor", [False, True])
@pytest.mark.parametrize("tied", [True, False])
def test_the_size_of_a_copy_is_known_beforehand(tmp_path, world, keys, experts, keep_tensor, tied):
    write_model(str(tmp_path), tied=tied, family="qwen3_moe" if experts else "qwen2")
    keep_tensor = keep_tensor and not experts

    def rank():
        actor = make_actor(str(tmp_path), model=keys)
        copy = WholePolicy(actor, "32", keep_tensor)
        return copy_bytes(actor, keep_tensor), sum(p.numel() * p.element_size() for p in copy.module.parameters())

    for announced, real in run_ranks(rank, world):
        assert announced == real


def test_copies_of_experts_that_keep_the_tensor_split_are_refused(tmp_path):
    write_model(str(tmp_path), family="qwen3_moe")
    with pytest.raises(RuntimeError, match=r"reshard=pipeline: the model has experts; set it to true or false"):
        run_ranks(lambda: WholePolicy(make_actor(str(tmp_path), model=PP2), "32", keep_tensor=True), 2)


@pytest.mark.parametrize(
    ("world", "keys", "free", "copy"),
    [  # a whole copy takes about 100 kB, one split over two tensor ranks half of that
        (2, {}, 10**9, reshard.SPLIT),
        (2, TP2, 10**9, reshard.WHOLE),
        (2, PP2, 10**9, reshard.WHOLE),
        (2, CP2, 10**9, reshard.WHOLE),
        (4, {**TP2, **PP2}, 10**9, reshard.WHOLE),
        (4, {**TP2, **SP, **VPP2}, 300_000, reshard.PIPELINE),
        (4, {**TP2, **PP2}, 300_000, reshard.SPLIT),
        (2, TP2, 300_000, reshard.SPLIT),
    ],
)
def test_auto_takes_what_fits(model, monkeypatch, world, keys, free, copy):
    path, (expected, _) = model
    monkeypatch.setattr(reshard, "free_bytes", lambda device: free)
    for completions, choice in run_ranks(lambda: _generate(path, keys, "auto"), world):
        assert choice.copy == copy
        assert completions == expected
        assert f"generation runs on {copy} of the policy: trainer.grpo.inference_backend.reshard=auto" in choice.notice


def test_auto_without_room_is_refused_where_only_copies_can_generate(model, monkeypatch):
    monkeypatch.setattr(reshard, "free_bytes", lambda device: 1000)
    for keys in (CP2, VPP2):
        with pytest.raises(RuntimeError, match=r"reshard=auto; whole copies: .* 0\.0 MB .*; set reshard=true to"):
            run_ranks(lambda keys=keys: _generate(model[0], keys, "auto"), 2)


def test_every_rank_sees_the_same_free_memory():
    import torch

    found = run_ranks(lambda: reshard.free_bytes(torch.device("cpu")), 2)
    assert found[0] == found[1] > 0

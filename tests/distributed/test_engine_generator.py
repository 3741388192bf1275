"""Engines driven by a replica's lead: everyone gets the completions, a death loses and repeats nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_dump.distributed import Replica
from megatron_dump.rollout import Request
from megatron_dump.rollout.engine_generator import EngineGenerator
from megatron_dump.rollout.engine_process import EngineProcess
from megatron_dump.rollout.sampling import request_seed
from megatron_dump.types import Prompt
from tests.distributed.launch import RankFailed, run_ranks
from tests.unit.scripted_engine import DIE, REFUSE

FACTORY = "tests.unit.scripted_engine:ScriptedEngine"


def _requests(replica=0, first_token=1, n=6) -> list[Request]:
    rng = np.random.default_rng(replica)
    prompts = [np.array([first_token if g == 2 else 1, *rng.integers(1, 50, 4)]) for g in range(n)]
    return [Request(10 * replica + g, Prompt(g, "s", p, ""), n=g % 3 + 1, first=g % 2) for g, p in enumerate(prompts)]


def _generate(folder, size, requests_of, submits=1, dies_once=True):
    """On this rank, in replicas of `size` ranks: what it got, and how often engines were renewed."""
    rank, world = dist.get_rank(), dist.get_world_size()
    number = rank // size
    groups = [dist.new_group(list(range(i, i + size))) for i in range(0, world, size)]
    replica = Replica(number, world // size, None, torch.device("cpu"), groups[number])
    engine = None
    if replica.is_lead:
        options = {"marks": str(folder / f"mark {number}") if dies_once else None}
        engine = EngineProcess(FACTORY, options, folder / f"engine {number}.log", timeout_s=30)
    renewed = []

    def renew():
        renewed.append(0)
        if engine is not None and not engine.alive():
            engine.restart()
        dist.barrier()  # a collective, as the real one is

    generator = EngineGenerator(engine, replica, 7, lambda ids: " ".join(map(str, ids)), renew)
    pending = [generator.submit(step, requests_of(number)) for step in range(submits)]
    got = [
        (c.group_id, c.sample, c.token_ids.tolist(), c.logprobs.tolist(), c.finished, c.text)
        for p in pending
        for c in p.result()
    ]
    if engine is not None:
        engine.close()
    return got, len(renewed)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    (result,) = run_ranks(lambda: _generate(tmp_path_factory.mktemp("alone"), 1, _requests), 1)
    return result[0]


def test_every_rank_of_a_replica_gets_the_completions_in_the_order_of_the_requests(alone, tmp_path):
    assert [row[:2] for row in alone] == [(r.group_id, s) for r in _requests() for s in r.samples]
    for *_, tokens, _, finished, text in alone:
        assert text == " ".join(map(str, tokens[: len(tokens) - finished]))
    for got, renewed in run_ranks(lambda: _generate(tmp_path, 2, _requests), 2):
        assert (got, renewed) == (alone, 0)


def test_replicas_have_engines_of_their_own_and_may_have_nothing_to_do(alone, tmp_path):
    results = run_ranks(lambda: _generate(tmp_path, 1, lambda i: _requests() if i == 1 else []), 2)
    assert [got for got, _ in results] == [[], alone]


@pytest.mark.parametrize("size", [1, 2])
def test_what_a_dead_engine_was_asked_for_is_asked_again(tmp_path, size):
    """The engine of replica 0 dies over its third prompt, with another step behind it; all ranks renew."""
    expected = run_ranks(lambda: _generate(tmp_path, 1, lambda i: _requests(i, abs(DIE)), submits=2), 1)[0][0]

    def requests_of(number):
        return _requests(number, DIE if number == 0 else 1)

    results = run_ranks(lambda: _generate(tmp_path, size, requests_of, submits=2), 2)
    for got, _ in results[:size]:
        assert got == expected
    assert {renewed for _, renewed in results} == {1}


def test_an_engine_that_dies_again_and_again_ends_the_run_on_every_rank(tmp_path):
    def rank():
        try:
            _generate(tmp_path, 1, lambda i: _requests(i, DIE), dies_once=False)
        except RuntimeError as error:
            return str(error)

    for message in run_ranks(rank, 2):
        assert "generation: rank 0 failed: EngineDied: the engine" in message


def test_a_refusal_is_not_tried_again(tmp_path):
    with pytest.raises(RankFailed, match="generation: rank 0 failed: EngineRefused: told to refuse"):
        run_ranks(lambda: _generate(tmp_path, 1, lambda i: _requests(i, REFUSE)), 1)


def test_seeds_are_a_function_of_all_their_parts():
    base = (1, 2, 3, 4)
    seeds = {request_seed(*(v + (i == j) for j, v in enumerate(base))) for i in range(5)}
    assert len(seeds) == 5 and all(0 <= seed < 2**63 for seed in seeds)
    assert request_seed(*base) == request_seed(*base)
    low = {request_seed(1, 2, g, s) & 0xFFFFFFFF for g in range(50) for s in range(50)}
    assert len(low) == 2500

"""What is sampled does not depend on who samples it: batches, their order, data parallel ranks, split experts."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_dump.rollout import Request
from megatron_dump.rollout.megatron import MegatronGenerator
from megatron_dump.rollout.sampling import SamplingOptions
from megatron_dump.types import Completion, Prompt
from tests.distributed.launch import run_ranks
from tests.distributed.tiny import STOP, VOCABULARY, make_actor, write_model

TP2, PP2, EP2 = ({f"{kind}_parallel_size": 2} for kind in ("tensor_model", "pipeline_model", "expert_model"))
SP, ETP1 = {"sequence_parallel": True}, {"expert_tensor_parallel_size": 1}
OPTIONS = SamplingOptions(max_length=20, stop_ids=(STOP, 7), temperature=0.7)
Tokens = dict[tuple[int, int], list[int]]


def _requests() -> list[Request]:
    """Groups of several sizes, 19 completions."""
    rng = np.random.default_rng(2)
    sizes = [3, 1, 4, 2, 6, 3]
    return [
        Request(g, Prompt(g, "s", rng.integers(1, VOCABULARY, rng.integers(2, 12)), ""), n) for g, n in enumerate(sizes)
    ]


def _apart(requests: list[Request]) -> list[Request]:
    """Every completion as a request of its own."""
    return [Request(r.group_id, r.prompt, 1, sample) for r in requests for sample in r.samples]


def _tokens(completions: list[Completion]) -> Tokens:
    return {(c.group_id, c.sample): c.token_ids.tolist() for c in completions}


def _generate(path, keys, requests, max_rows=64, options=OPTIONS) -> tuple[Tokens, float]:
    """This data-parallel rank's share of the requests, and how far the trainer's log-probabilities are from theirs."""
    actor = make_actor(path, model=keys)
    mine = requests[actor.parallel.data_rank :: actor.parallel.data_size]
    completions = MegatronGenerator(actor, options, 3, max_rows, lambda ids: "").generate(0, mine)
    prompts = {r.group_id: r.prompt.token_ids for r in requests}
    actor.micro_batch_size = actor.forward_micro_batch_size = 1
    rows = [prompts[c.group_id] for c in completions]
    # Ranks that hold other experts must take as many micro-batches.
    batch = actor.make_batch(rows, completions, np.zeros(len(rows)), 1.0, n_rows=sum(r.n for r in requests))
    logprobs = actor.compute_logprobs(batch)
    found = _tokens(completions)
    if logprobs is None:
        return found, 0.0
    return found, float(np.abs((logprobs - batch.rollout_logprobs) * batch.loss_mask).max())


def _merge(results: list[tuple[Tokens, float]]) -> Tokens:
    """All ranks' completions; ranks of a replica have the same."""
    merged: Tokens = {}
    for found, difference in results:
        assert difference < 1e-4
        assert all(merged.get(key, tokens) == tokens for key, tokens in found.items())
        merged |= found
    return merged


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model, and what one rank generates on it in one batch."""
    path = str(tmp_path_factory.mktemp("model"))
    write_model(path)
    return path, _merge(run_ranks(lambda: _generate(path, {}, _requests()), 1))


@pytest.mark.parametrize(
    ("world", "keys", "max_rows", "order"),
    [
        (1, {}, 64, "reversed"),
        (1, {}, 1, "as drawn"),
        (1, {}, 7, "shuffled"),
        (1, {}, 5, "apart"),
        (2, {}, 64, "as drawn"),
        (2, {}, 4, "shuffled"),
        (2, {}, 6, "apart"),
        (4, TP2, 6, "reversed"),
    ],
)
def test_completions_do_not_depend_on_batches_or_data_parallel_ranks(model, world, keys, max_rows, order):
    path, expected = model
    requests = _requests()
    if order == "reversed":
        requests = requests[::-1]
    if order in ("shuffled", "apart"):
        requests = requests if order == "shuffled" else _apart(requests)
        requests = [requests[i] for i in np.random.default_rng(0).permutation(len(requests))]
    assert _merge(run_ranks(lambda: _generate(path, keys, requests, max_rows), world)) == expected


def test_rows_are_refilled_as_completions_end(model):
    """Six rows make 19 completions in fewer passes than six at a time would take, a batch as long as its longest."""
    path, expected = model
    requests = _apart(_requests())

    def rank() -> tuple[Tokens, int]:
        actor, passes = make_actor(path), []
        actor.module.register_forward_hook(lambda *_: passes.append(1))
        completions = MegatronGenerator(actor, OPTIONS, 3, 6, lambda ids: "").generate(0, requests)
        return _tokens(completions), len(passes)

    found, passes = run_ranks(rank, 1)[0]
    assert found == expected
    lengths = [len(expected[r.group_id, r.first]) for r in requests]
    assert passes < sum(max(lengths[i : i + 6]) for i in range(0, 19, 6))


@pytest.mark.parametrize("min_length", [5, 20])
def test_no_completion_ends_before_min_length(model, min_length):
    path, _ = model
    options = SamplingOptions(20, (STOP, 7, 9), 0.7, min_length=min_length)
    found = _merge(run_ranks(lambda: _generate(path, {}, _requests(), options=options), 1))
    for tokens in found.values():
        assert not {STOP, 7, 9} & set(tokens[:min_length])
    if min_length == 5:
        assert min(map(len, found.values())) < 10


EXPERT_LAYOUTS = {
    "EP2": (2, EP2),
    "EP2xDP4": (4, EP2),
    "TP2xSP": (2, {**TP2, **SP}),
    "EP2xTP2xSP": (4, {**EP2, **TP2, **SP, **ETP1}),
    "EP4xTP2xSP": (4, {**TP2, **SP, **ETP1, "expert_model_parallel_size": 4}),
    "EP2xPP2": (4, {**EP2, **PP2}),
}


@pytest.fixture(scope="module", params=["qwen3_moe", "qwen2_moe"])
def experts(request, tmp_path_factory):
    path = str(tmp_path_factory.mktemp(request.param))
    write_model(path, family=request.param)
    return path, _merge(run_ranks(lambda: _generate(path, {}, _requests()), 1))


@pytest.mark.parametrize("layout", EXPERT_LAYOUTS)
def test_split_experts_generate_the_same(experts, layout):
    """Replicas have other numbers of passes to make, and each pass needs all of them."""
    path, expected = experts
    world, keys = EXPERT_LAYOUTS[layout]
    assert _merge(run_ranks(lambda: _generate(path, keys, _requests(), 5), world)) == expected


def test_a_replica_without_requests_keeps_step_with_the_others(experts):
    path, expected = experts
    requests = _requests()[:1]
    found = _merge(run_ranks(lambda: _generate(path, EP2, requests), 2))
    assert found == {key: tokens for key, tokens in expected.items() if key[0] == 0}

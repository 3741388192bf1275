"""vLLM itself behind an EngineHandle: log-probabilities, seeds, weights, failures. transformers is the judge."""

from __future__ import annotations

import os
import signal
import time

import numpy as np
import psutil
import pytest
import torch

from megatron_dump.distributed import Replica
from megatron_dump.rollout import Request
from megatron_dump.rollout.engine import EngineDied, EngineRefused, EngineRequest
from megatron_dump.rollout.engine_generator import EngineGenerator
from megatron_dump.rollout.sampling import request_seed
from megatron_dump.types import Prompt
from tests.vllm.models import STOPS, VOCABULARY, Served, Weights, logits, plain, requests, worst_difference, write_model

pytestmark = pytest.mark.vllm

CUT = {"temperature": 0.7, "top_k": 12, "top_p": 0.8}
SMALL = {"kv_cache_memory_bytes": 10 * 32 * 768, "max_num_seqs": 16, "max_model_len": 96}  # ten blocks: preempts


def _serve(tmp_path_factory, seed, tied, **settings):
    folder = tmp_path_factory.mktemp("model")
    served = Served(folder, write_model(folder, seed, tied), **settings)
    served.push()
    return served


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    """Tied embeddings; temperature, top-k and top-p."""
    served = _serve(tmp_path_factory, 0, True, **CUT)
    yield served
    served.close()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Embeddings not tied; the whole distribution but for early stop tokens."""
    served = _serve(tmp_path_factory, 1, False, min_length=3)
    yield served
    served.close()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """As `cut`, with little memory for its cache; what harms an engine is done to this one."""
    served = _serve(tmp_path_factory, 0, True, block=SMALL, **CUT)
    yield served
    served.close()


@pytest.mark.parametrize("name", ["cut", "whole"])
def test_logprobs_are_transformers(request, name):
    served, asked = request.getfixturevalue(name), requests()
    answers = served.ask(asked)
    assert worst_difference(served.model, asked, answers, served.options.temperature) < 1e-4
    outputs = [output for group in answers for output in group]
    assert [len(group) for group in answers] == [len(r.seeds) for r in asked]
    assert {output.policy_version for output in outputs} == {served.version}
    ends = set()
    for output in outputs:
        tokens = output.token_ids.tolist()
        assert output.finished == (tokens[-1] in STOPS) and not set(STOPS) & set(tokens[:-1])
        assert output.finished or len(tokens) == 16
        assert len(tokens) > served.options.min_length
        ends.add(tokens[-1] if output.finished else -1)
    assert len(ends) > 1


def test_only_what_top_k_and_top_p_keep_is_sampled(cut):
    asked, left_out = requests(), 0
    for r, group in zip(asked, cut.ask(asked), strict=True):
        for output in group:
            chances = torch.softmax(logits(cut.model, r.prompt, output.token_ids).double() / CUT["temperature"], -1)
            ordered, index = chances.sort(-1, descending=True)
            ordered[:, CUT["top_k"] :] = 0  # of these the fewest that hold top_p
            before = (ordered.cumsum(-1) - ordered) / ordered.sum(-1, keepdim=True)
            allowed = (ordered > 0) & (before < CUT["top_p"] + 1e-4)
            for t, token in enumerate(output.token_ids.tolist()):
                assert token in index[t][allowed[t]].tolist()
            left_out += int((~allowed).sum())
    assert left_out > 1000


def test_samples_follow_the_distribution(whole):
    asked = EngineRequest(np.array([7, 8, 9]), tuple(request_seed(1, 2, 3, i) for i in range(800)))
    first = np.array([output.token_ids[0] for output in whole.ask([asked])[0]])
    expected = torch.softmax(logits(whole.model, asked.prompt, np.array([0]))[0].double(), -1).numpy()
    expected[list(STOPS)] = 0.0  # min_length
    expected /= expected.sum()
    found = np.bincount(first, minlength=VOCABULARY) / len(first)
    assert (np.abs(found - expected) < 4 * np.sqrt(expected / len(first)) + 1 / len(first)).all()


@pytest.mark.parametrize("name", ["cut", "whole"])
def test_a_completion_does_not_depend_on_its_batch(request, name):
    served, asked = request.getfixturevalue(name), requests()
    expected = plain(served.ask(asked))
    assert plain(served.ask(asked[::-1])) == expected[::-1]
    for i in (0, 3):
        assert plain(served.ask([asked[i]])) == [expected[i]]
    ragged = [EngineRequest(r.prompt, r.seeds[: i % 5]) for i, r in enumerate(asked)]
    rest = [EngineRequest(r.prompt, r.seeds[i % 5 :]) for i, r in enumerate(asked)]
    parts = zip(plain(served.ask(ragged)), plain(served.ask(rest)), strict=True)
    assert [a + b for a, b in parts] == expected
    assert len({str(output) for group in expected for output in group}) > 20  # seeds decide


def test_a_crowded_cache_changes_nothing(cut, small):
    """Completions that lose their place in the cache and are computed again."""
    asked = requests(8, 8)
    assert plain(small.ask(asked)) == plain(cut.ask(asked))


@pytest.mark.parametrize("name", ["cut", "whole"])
def test_logprobs_follow_the_weights(request, name):
    """The prompts are the same, so a stale prefix cache or embedding would show."""
    served, asked = request.getfixturevalue(name), requests()
    before = served.ask(asked)
    saved = {n: p.detach().clone() for n, p in served.model.named_parameters()}
    with torch.no_grad():
        for parameter in served.model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    version = served.push()
    after = served.ask(asked)
    temperature = served.options.temperature
    assert worst_difference(served.model, asked, after, temperature) < 1e-4
    assert worst_difference(served.model, asked, before, temperature) > 1e-2
    assert {output.policy_version for group in after for output in group} == {version}
    with torch.no_grad():
        for n, parameter in served.model.named_parameters():
            parameter.copy_(saved[n])
    served.push()
    again = served.ask(asked)
    assert [[o.token_ids.tolist() for o in g] for g in again] == [[o.token_ids.tolist() for o in g] for g in before]


def test_after_sleep_the_weights_come_again(cut):
    asked = requests(2)
    expected = cut.ask(asked)
    cut.handle.sleep().result(60)
    cut.handle.wake().result(60)
    cut.sync.invalidate(cut.handle)
    cut.sync.push(cut.version)
    assert plain(cut.ask(asked)) == plain(expected)


def test_a_prompt_that_does_not_fit_is_refused_and_harms_nothing(small):
    with pytest.raises(
        EngineRefused, match=r"vllm.max_model_len=96: a prompt of 81 tokens with .*max_length=16 exceeds"
    ):
        small.ask([EngineRequest(np.ones(81, np.int64), (1,))])
    assert len(small.ask([EngineRequest(np.ones(80, np.int64), (1, 2))])[0]) == 2


def test_a_killed_engine_loses_and_repeats_nothing(small):
    """In the middle of a step; another step was asked for already."""
    rng = np.random.default_rng(0)
    asked = [Request(g, Prompt(g, "s", rng.integers(6, 60, 20), ""), n=g % 4 + 1, first=g % 3) for g in range(12)]
    replica = Replica(0, 1, None, torch.device("cpu"))
    renewed = []

    def renew():
        renewed.append(small.handle.alive())
        small.sync.push(small.version)

    generator = EngineGenerator(small.handle, replica, 5, str, renew)
    expected = [generator.generate(step, asked) for step in (1, 2)]
    assert [(c.group_id, c.sample) for c in expected[0]] == [(r.group_id, s) for r in asked for s in r.samples]
    pending = [generator.submit(step, asked) for step in (1, 2)]
    time.sleep(0.02)
    os.kill(small.handle.pid, signal.SIGKILL)
    for ours, theirs in zip([p.result() for p in pending], expected, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert (a.group_id, a.sample, a.finished, a.policy_version, a.text) == (
                b.group_id,
                b.sample,
                b.finished,
                b.policy_version,
                b.text,
            )
            np.testing.assert_array_equal(a.token_ids, b.token_ids)
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)
    assert renewed == [False]


def test_weights_that_miss_a_tensor_are_an_error(small):
    handle, weights = small.handle, Weights(small.model)
    dropped = next(i for i, piece in enumerate(weights.pieces) if piece[0] == "model.norm.weight")
    del weights.pieces[dropped]
    from megatron_dump.weight_sync.sync import WeightSync

    with pytest.raises(RuntimeError, match=r"no weights came for model.norm.weight \(1 parameters"):
        WeightSync(weights, [handle]).push(1)
    with pytest.raises(EngineDied, match=r"no weights came for model.norm.weight"):
        small.ask(requests(1))


def test_no_process_is_left(cut):
    cut.handle.ping().result(60)
    engine = psutil.Process(cut.handle.pid)
    family = [engine, *engine.children(recursive=True)]
    cut.handle.close()
    _, alive = psutil.wait_procs(family, timeout=5)
    assert alive == []
    with pytest.raises(EngineDied):
        cut.ask(requests(1))


def test_two_tensor_parallel_workers(tmp_path_factory):
    """Greedily, under a temperature: the likeliest token, and its log-probability under that temperature."""
    shared = set(os.listdir("/dev/shm"))
    served = _serve(tmp_path_factory, 2, True, block={"tensor_parallel_size": 2}, temperature=0.7, use_greedy=True)
    try:
        for _ in range(2):
            asked = requests(4, 1)
            answers = served.ask(asked)
            assert worst_difference(served.model, asked, answers, 0.7) < 1e-4
            for r, (output,) in zip(asked, answers, strict=True):
                best = logits(served.model, r.prompt, output.token_ids).argmax(-1).numpy()
                np.testing.assert_array_equal(output.token_ids, best)
            with torch.no_grad():
                for parameter in served.model.parameters():
                    parameter.mul_(1.1)
            served.push()
        engine = psutil.Process(served.handle.pid)
        family = [engine, *engine.children(recursive=True)]
        assert len(family) > 2
    finally:
        served.close()
    assert psutil.wait_procs(family, timeout=5)[1] == []
    assert not [name for name in set(os.listdir("/dev/shm")) - shared if name.startswith(("vllm", "psm"))]


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"enforce_eagr": True}, r"vllm.enforce_eagr: unknown to vLLM \S+; did you mean enforce_eager"),
        ({"zzzz": 1}, r"vllm.zzzz: unknown to vLLM \S+; it knows .*gpu_memory_utilization, .*tensor_parallel_size"),
        ({"seed": 3}, "vllm.seed=3: not to be set, each completion has its own"),
        ({"enable_chunked_prefill": True}, "vllm.enable_chunked_prefill=true: on a CPU vLLM cannot cut a prompt"),
    ],
)
def test_wrong_options_are_named(tmp_path, block, message):
    write_model(tmp_path)
    from megatron_dump.rollout.vllm_options import llm_arguments

    with pytest.raises(EngineRefused, match=message):
        llm_arguments(str(tmp_path), block)

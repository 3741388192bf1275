"""Generation on Megatron's weights: log-probabilities, layouts, sampling, stopping."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_dump.actor import convert
from megatron_dump.actor.whole import WholePolicy
from megatron_dump.rollout import Request
from megatron_dump.rollout.megatron import MegatronGenerator
from megatron_dump.rollout.recorded import RecordedGenerator, RecordingGenerator
from megatron_dump.rollout.resharded import ReshardedGenerator
from megatron_dump.rollout.sampling import SamplingOptions, pick_tokens
from megatron_dump.types import Prompt
from tests.distributed.launch import run_ranks
from tests.distributed.tiny import STOP, VOCABULARY, make_actor, share_of, write_model

TP2, PP2, CP2, EP2 = (
    {f"{kind}_parallel_size": 2} for kind in ("tensor_model", "pipeline_model", "context", "expert_model")
)
SP, VPP2 = {"sequence_parallel": True}, {**PP2, "virtual_pipeline_model_parallel_size": 2}
SPLIT = {"TP2": (2, TP2), "PP2": (2, PP2), "TP2xPP2": (4, {**TP2, **PP2}), "TP2xSPxPP2": (4, {**TP2, **SP, **PP2})}
WHOLE = {**SPLIT, "PP2xVPP2": (2, VPP2), "CP2": (2, CP2), "TP2xSPxCP2": (4, {**TP2, **SP, **CP2})}
EXPERTS = {
    "EP2": (2, EP2),
    "EP2xPP2xVPP2": (4, {**EP2, **VPP2}),
    "split experts": (2, {**TP2, **SP}),
    "EP2xTP2xSPxCP2": (4, {**EP2, **TP2, **SP, **CP2, "expert_tensor_parallel_size": 1}),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("model"))
    return path, write_model(path)


def _requests(n_prompts: int = 5, n: int = 3) -> list[Request]:
    rng = np.random.default_rng(1)
    prompts = [rng.integers(1, VOCABULARY, rng.integers(2, 12)) for _ in range(n_prompts)]
    return [Request(g, Prompt(g, "s", p, ""), n) for g, p in enumerate(prompts)]


def _generate(path, keys, requests, check_logprobs=False, max_rows=64, reshard=False, **options):
    """Completions under a layout (`keys` of `model:`), and how far the trainer's log-probabilities are from theirs."""
    actor = make_actor(path, model=keys)
    settings = SamplingOptions(**{"max_length": 20, "stop_ids": (STOP, 7), "temperature": 0.7, **options})
    common = (settings, 3, max_rows, lambda ids: " ".join(map(str, ids)))
    generator = MegatronGenerator(actor, *common)
    if reshard:
        whole = WholePolicy(actor, "32")
        generator = ReshardedGenerator(MegatronGenerator(whole, *common), whole)
    completions = generator.generate(0, requests)
    difference = 0.0
    if check_logprobs:
        prompts = {r.group_id: r.prompt.token_ids for r in requests}
        n = len(completions)
        actor.micro_batch_size = actor.forward_micro_batch_size = 1
        batch = actor.make_batch([prompts[c.group_id] for c in completions], completions, np.zeros(n), 1.0)
        logprobs = actor.compute_logprobs(batch)
        if logprobs is not None:
            difference = float(np.abs((logprobs - batch.rollout_logprobs) * batch.loss_mask).max())
    return [(c.group_id, c.sample, c.token_ids.tolist(), c.finished, c.text) for c in completions], difference


@pytest.fixture(scope="module")
def single(model):
    return run_ranks(lambda: _generate(model[0], {}, _requests(), check_logprobs=True), 1)[0]


def test_reported_logprobs_are_the_trainers(single):
    completions, difference = single
    assert difference < 1e-4
    assert [(g, s) for g, s, *_ in completions] == [(g, s) for g in range(5) for s in range(3)]


def test_completions_end_at_a_stop_token_or_the_limit(single):
    for _, _, tokens, finished, text in single[0]:
        assert finished == (tokens[-1] in (STOP, 7))
        assert not {STOP, 7} & set(tokens[:-1])
        assert finished or len(tokens) == 20
        assert text == " ".join(map(str, tokens[: len(tokens) - finished]))
    assert {finished for *_, finished, _ in single[0]} == {True, False}


@pytest.mark.parametrize("layout", SPLIT)
def test_every_layout_generates_the_same(model, single, layout):
    world, keys = SPLIT[layout]
    for completions, difference in run_ranks(lambda: _generate(model[0], keys, _requests(), True), world):
        assert completions == single[0]
        assert difference < 1e-4


@pytest.mark.parametrize("layout", WHOLE)
@pytest.mark.parametrize("n_prompts", [5, 1])
def test_resharded_generation_is_the_same(model, single, layout, n_prompts):
    """Whole copies of the weights on every rank; also with fewer prompts than ranks."""
    world, keys = WHOLE[layout]
    requests = _requests()[:n_prompts]
    for completions, difference in run_ranks(
        lambda: _generate(model[0], keys, requests, check_logprobs=True, reshard=True), world
    ):
        assert completions == single[0][: 3 * n_prompts]
        assert difference < 1e-4


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """A model with experts, and what one rank generates on it."""
    path = str(tmp_path_factory.mktemp("experts"))
    write_model(path, family="qwen3_moe")
    return path, run_ranks(lambda: _generate(path, {}, _requests(), check_logprobs=True), 1)[0]


@pytest.mark.parametrize("layout", EXPERTS)
def test_resharded_generation_with_experts_is_the_same(experts, layout):
    path, (expected, difference) = experts
    assert difference < 1e-4
    world, keys = EXPERTS[layout]
    requests = _requests()
    for completions, difference in run_ranks(
        lambda: _generate(path, keys, requests, check_logprobs=True, reshard=True), world
    ):
        assert completions == expected
        assert difference < 1e-4


def test_resharded_weights_follow_the_policy(model):
    """After an optimizer step the whole copy equals what the split model exports."""

    def rank():
        actor = make_actor(model[0], 2, 2)
        whole = WholePolicy(actor, "32")
        whole.refresh()
        before = whole.module.embedding.word_embeddings.weight.clone()
        batch = share_of(actor)
        batch.ref_logprobs = actor.compute_logprobs(batch, reference=True)
        actor.train_step(batch)
        whole.refresh()
        ours = dict(convert.named_hf_weights([whole.module], whole.arch, whole.parallel))
        theirs = convert.named_hf_weights(actor.modules, actor.arch, actor.parallel)
        moved = not torch.equal(before, whole.module.embedding.word_embeddings.weight)
        return moved and all(torch.equal(ours[name], weight) for name, weight in theirs)

    assert run_ranks(rank, 4) == [True] * 4


def test_a_completion_does_not_depend_on_its_batch(model, single):
    alone = run_ranks(lambda: _generate(model[0], {}, _requests()[3:4], max_rows=1), 1)[0][0]
    assert alone == single[0][9:12]


def test_greedy_equals_transformers(model):
    path, hf = model
    requests = _requests(n=1)
    ours, _ = run_ranks(lambda: _generate(path, TP2, requests, use_greedy=True, stop_ids=(VOCABULARY,)), 2)[0]
    for request, (_, _, tokens, _, _) in zip(requests, ours, strict=True):
        ids = torch.from_numpy(request.prompt.token_ids)[None]
        for token in tokens:  # step by step without a cache: an independent computation
            with torch.no_grad():
                assert int(hf(ids).logits[0, -1].argmax()) == token
            ids = torch.cat([ids, torch.tensor([[token]])], 1)


def test_sampling_follows_the_distribution():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    n = 20_000
    uniform = torch.from_numpy(np.random.default_rng(0).random(n))
    options = SamplingOptions(max_length=1, stop_ids=(0,), temperature=0.5)
    tokens, logprobs = pick_tokens(logits.expand(n, -1), uniform, options)
    expected = torch.softmax(logits[0] / 0.5, -1)
    np.testing.assert_allclose(torch.bincount(tokens, minlength=4) / n, expected, atol=0.01)
    np.testing.assert_allclose(logprobs, expected.log()[tokens], rtol=1e-5)


@pytest.mark.parametrize(
    ("option", "allowed"), [({"top_k": 2}, {1, 2}), ({"top_p": 0.7}, {1, 2}), ({"top_p": 0.5}, {2})]
)
def test_truncated_sampling_keeps_only_the_top(option, allowed):
    n = 2000
    uniform = torch.cat([torch.rand(n - 2, dtype=torch.float64), torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)])
    options = SamplingOptions(max_length=1, stop_ids=(0,), **option)
    tokens, _ = pick_tokens(torch.tensor([[0.0, 1.0, 2.0, -1.0]]).expand(n, -1), uniform, options)
    assert set(tokens.tolist()) == allowed


def test_recorded_completions_come_back(model, tmp_path):
    def rank():
        actor = make_actor(model[0])
        options = SamplingOptions(max_length=8, stop_ids=(STOP,))
        generator = MegatronGenerator(actor, options, seed=3, max_rows=64, decode=str)
        return RecordingGenerator(generator, str(tmp_path), 0).generate(4, _requests())

    recorded = run_ranks(rank, 1)[0]
    again = RecordedGenerator(str(tmp_path), str).generate(4, _requests())
    for a, b in zip(recorded, again, strict=True):
        assert (a.group_id, a.sample, a.finished, a.text) == (b.group_id, b.sample, b.finished, b.text)
        np.testing.assert_array_equal(a.token_ids, b.token_ids)
        np.testing.assert_array_equal(a.logprobs, b.logprobs)
    with pytest.raises(ValueError, match="another draw"):
        RecordedGenerator(str(tmp_path), str).generate(5, _requests())

"""share_prompts changes what is computed, not what comes out: training against rows by themselves, on every layout."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_dump.actor import batching, convert
from megatron_dump.actor.actor import MegatronGPTGRPOActor
from megatron_dump.types import Completion, TrainBatch
from tests.distributed.launch import run_ranks
from tests.distributed.tiny import FAMILIES, VOCABULARY, check_trained_alike, make_actor, write_model

SIZES = (5, 1, 3, 4, 2, 1)  # rollouts of each group
N = sum(SIZES)
TP2, PP2 = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
SP = {**TP2, "sequence_parallel": True}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
CASES = {  # model family, ranks, keys of `model:`
    "1": ("qwen2", 1, {}),
    "micro-batches of 1, nothing to share": ("qwen2", 1, {"micro_batch_size": 1}),
    "micro-batches of 8": ("qwen2", 1, {"micro_batch_size": 8}),
    "TP2": ("qwen3", 2, TP2),
    "PP2": ("qwen2", 2, PP2),
    "TP2xPP2": ("llama", 4, {**TP2, **PP2}),
    "TP2xSP": ("qwen3", 2, SP),
    "DP2": ("qwen2", 2, {}),
    "DP2-overlap": ("qwen2", 2, {"overlap_grad_reduce": True}),
    "TP2xSPxPP2xDP2": ("qwen2", 8, {**SP, **PP2}),
    "full recompute": ("qwen2", 1, FULL),
    "full recompute, PP2": ("qwen2", 2, {**FULL, **PP2}),
    "selective recompute, PP2": ("qwen2", 2, {"recompute_granularity": "selective", **PP2}),
    "dynamic micro-batches": ("qwen2", 1, {"dynamic_batching": {"enabled": True, "train_mb_tokens": 64}}),
    "dynamic micro-batches, TP2xSPxPP2xDP2": (
        "llama",
        8,
        {**SP, **PP2, "dynamic_batching": {"enabled": True, "train_mb_tokens": 56}},
    ),
    "EP2": ("qwen3_moe", 2, {"expert_model_parallel_size": 2}),
    "split experts": ("qwen3_moe", 2, SP),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    paths = {family: str(tmp_path_factory.mktemp(family)) for family in FAMILIES}
    return {family: (path, write_model(path, tied=family == "qwen2", family=family)) for family, path in paths.items()}


def _rollouts(seed: int) -> tuple[list[np.ndarray], list[Completion], np.ndarray, np.ndarray]:
    """Ragged groups, two of them with prompts that differ in the last token only; completions of 1 to 20 tokens."""
    rng = np.random.default_rng(seed)
    beginnings = [rng.integers(1, VOCABULARY, n) for n in (19, 9, 23, 23, 1, 8)]
    beginnings[3][:-1], beginnings[3][-1] = beginnings[2][:-1], (beginnings[2][-1] + 1) % VOCABULARY
    lengths = [1, 20, 2, *rng.integers(1, 20, N - 4), 1]
    completions = [
        Completion(g, i, rng.integers(0, VOCABULARY, n), rng.normal(-2, 0.1, n).astype(np.float32), True, 0)
        for (g, i), n in zip(((g, i) for g, size in enumerate(SIZES) for i in range(size)), lengths, strict=True)
    ]
    prompts = [beginnings[c.group_id] for c in completions]
    return prompts, completions, rng.normal(size=N), np.where(np.arange(N) % 5 == 3, 0.0, 1.25)


def _share(actor: MegatronGPTGRPOActor, seed: int) -> TrainBatch:
    """This rank's rollouts, dealt out in order, which cuts groups, and two rows or more that fill up."""
    prompts, completions, advantages, weights = _rollouts(seed)
    rows = np.array_split(np.arange(N), actor.parallel.data_size)[actor.parallel.data_rank]
    total = float(sum(len(c.token_ids) for c in completions))
    mine = [prompts[i] for i in rows], [completions[i] for i in rows], advantages[rows]
    return actor.make_batch(*mine, total, weights[rows], len(rows) + 2)


def _step(actor: MegatronGPTGRPOActor, seed: int) -> dict[str, float]:
    batch = _share(actor, seed)
    budget = actor.dynamic.train_mb_tokens if actor.dynamic.enabled else None
    _, shared = batching.divide(batch, actor.micro_batch_size, budget, actor.pad_to, actor.share_prompts)
    assert shared == (actor.share_prompts and actor.micro_batch_size > 1)
    batch.old_logprobs = actor.compute_logprobs(batch)
    if batch.old_logprobs is not None:  # as if the policy had moved since
        batch.old_logprobs = batch.old_logprobs + 0.3 * np.sin(np.arange(batch.tokens.shape[1], dtype=np.float32))
    batch.ref_logprobs = actor.compute_logprobs(batch, reference=True)
    return actor.train_step(batch)


def _train(path: str, **model) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    actor = make_actor(path, model=model)
    for group in actor.optimizer.param_groups:
        group["eps"] = 1e-4  # as in test_actor_layouts.py
    metrics = [_step(actor, seed) for seed in range(3)]
    return metrics, {name: w.clone() for name, w in convert.named_hf_weights(actor.modules, actor.arch, actor.parallel)}


@pytest.fixture(scope="module")
def rows_by_themselves(folders):
    return {family: run_ranks(_train, 1, path)[0] for family, (path, _) in folders.items()}


@pytest.mark.parametrize("case", CASES)
def test_training_equals_rows_by_themselves(folders, rows_by_themselves, case):
    family, world, model = CASES[case]
    expected, expected_weights = rows_by_themselves[family]
    results = run_ranks(lambda: _train(folders[family][0], share_prompts=True, **model), world)
    check_trained_alike(results, expected, expected_weights)


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_equal_transformers(folders, family):
    path, hf = folders[family]

    def rank():
        actor = make_actor(path, model={"share_prompts": True})
        batch = _share(actor, 0)
        return actor.compute_logprobs(batch), batch.loss_mask

    ours, mask = run_ranks(rank, 1)[0]
    prompts, completions, _, weights = _rollouts(0)
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        tokens = torch.from_numpy(np.concatenate([prompt, completion.token_ids]))[None]
        with torch.no_grad():
            logprobs = torch.log_softmax(hf(tokens).logits / 0.7, -1)[0, :-1]
        expected = logprobs.gather(-1, tokens[0, 1:, None])[len(prompt) - 1 :, 0].numpy()
        if weights[i]:
            np.testing.assert_allclose(ours[i, mask[i] > 0], expected, atol=1e-5)
        assert not ours[i, mask[i] == 0].any()

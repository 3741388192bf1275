"""What engines get from every layout, against the Hugging Face folder's own files."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from megatron_dump.actor import convert
from megatron_dump.actor.weight_stream import WeightStream
from megatron_dump.weight_sync import WeightSync, WeightSyncOptions
from tests.distributed.families import build, tensors, write_family
from tests.distributed.launch import run_ranks
from tests.distributed.tiny import make_actor, share_of, train_one_step, write_model
from tests.engine_processes import Collector, ProcessEngine, assert_equal
from tests.transformers_engine import TransformersEngine

LAYOUTS = {
    "TP2": (2, dict(tensor=2)),
    "PP2": (2, dict(pipeline=2)),
    "TP2xPP2": (4, dict(tensor=2, pipeline=2)),
    "VPP2": (2, dict(pipeline=2, virtual_pipeline=2)),
    "CP2": (2, dict(context=2)),
    "DP2": (2, dict()),
}
EXPERT_LAYOUTS = {
    "EP2": (2, dict(expert=2)),
    "EP2xTP2": (4, dict(tensor=2, expert=2)),
    "EP2xPP2": (4, dict(pipeline=2, expert=2)),
    "ETP2": (2, dict(tensor=2, expert_tensor=2)),
}
CASES = [
    *((family, layout) for family in ("qwen2-tied", "qwen2-untied") for layout in LAYOUTS),
    *((family, "TP2xPP2") for family in ("qwen3", "llama")),
    *(("qwen3-moe", layout) for layout in EXPERT_LAYOUTS),
    ("qwen2-moe", "EP2"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    @functools.cache
    def write(family):
        path = tmp_path_factory.mktemp(family)
        write_family(path, family)
        return path

    return write


def is_lead(grid):
    return torch.distributed.get_rank(grid.replica_group) == 0


def collect(path, sizes, precision="bf16", dtype=None, transport="shared_memory", everyone=True, n=1, shared=True):
    """A rank of the test: push twice, return what its engines have after each."""
    modules, arch, grid = build(path, precision, **sizes)
    drives = is_lead(grid) if everyone else grid.rank == 0
    handles = [ProcessEngine(Collector) for _ in range(n * drives)]
    # A bucket of 4 KB: many buckets, and tensors larger than one.
    options = WeightSyncOptions(transport=transport, bucket_mb=2**-8, timeout_s=30, dtype=dtype)
    sync = WeightSync(WeightStream(modules, arch, grid), handles, options, replica=grid.data_rank)
    if not shared:
        for crew in sync.crews:
            crew.shared = False
    try:
        sync.push(0)
        before = [handle.call("result").result(20) for handle in handles]
        with torch.no_grad():
            for module in modules:
                for parameter in module.parameters():
                    parameter.mul_(2)
        sync.push(1)
        return before, [handle.call("result").result(20) for handle in handles]
    finally:
        for handle in handles:
            handle.close()
        sync.close()


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("family", "layout"), CASES)
def test_engines_get_the_folders_tensors(folder, family, layout, shared):
    """Byte for byte, at every replica's engine, written into shared memory by all ranks or sent by messages."""
    world, sizes = {**LAYOUTS, **EXPERT_LAYOUTS}[layout]
    expected = tensors(folder(family))
    results = run_ranks(collect, world, folder(family), sizes, "bf16", None, "shared_memory", True, 1, shared)
    engines = [pair for before, after in results for pair in zip(before, after, strict=True)]
    layout_ranks = sizes.get("tensor", 1) * sizes.get("pipeline", 1) * sizes.get("context", 1)
    assert len(engines) == world // layout_ranks
    for before, after in engines:
        assert_equal(before, 0, expected)
        assert_equal(after, 1, {name: tensor * 2 for name, tensor in expected.items()})


@pytest.mark.parametrize("layout", ["TP2", "TP2xPP2"])
def test_several_receivers_of_one_broadcast(folder, layout):
    """Engines elsewhere: only rank 0 sends, in the dtype that they want."""
    world, sizes = LAYOUTS[layout]
    results = run_ranks(collect, world, folder("qwen3"), sizes, "bf16", "float32", "broadcast", False, 2)
    expected = tensors(folder("qwen3"))
    assert [len(after) for _, after in results] == [2] + [0] * (world - 1)
    for before, after in zip(*results[0], strict=True):
        assert_equal(before, 0, expected, torch.float32)
        assert_equal(after, 1, {name: tensor * 2 for name, tensor in expected.items()}, torch.float32)


@pytest.mark.parametrize(
    ("family", "world", "sizes"),
    [
        ("qwen2", 4, dict(tensor=2, pipeline=2)),
        ("qwen2", 2, dict(model={"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2})),
        ("qwen3_moe", 2, dict(model={"expert_model_parallel_size": 2})),
    ],
)
@pytest.mark.parametrize("tied", [True, False])
def test_engines_follow_training(tmp_path, family, world, sizes, tied):
    """After a train_step: what arrives is what save_hf writes, and the engine's log-probs are the trainer's."""
    write_model(str(tmp_path / "model"), tied=tied, family=family)
    scorer = Scorer(str(tmp_path / "model"), 4, [0])  # here: the ranks' patches for CPU upset transformers' loading

    def rank():
        actor = make_actor(str(tmp_path / "model"), **sizes)
        grid, temperature = actor.parallel, 0.7
        lead = is_lead(grid)
        collector = [ProcessEngine(Collector)] if lead else []
        engine = [ProcessEngine(lambda: scorer)] if lead else []
        weights = WeightStream(actor.modules, actor.arch, grid)
        sync = WeightSync(weights, collector + engine, WeightSyncOptions(timeout_s=30), replica=grid.data_rank)
        sync.push(actor.version)
        first = engine[0].call("scores", *rows_of(share_of(actor, seed=2)), temperature).result(20) if lead else None
        train_one_step(actor, seed=1)
        sync.push(actor.version)
        convert.save_hf(actor.modules, actor.arch, grid, str(tmp_path / "saved"))
        batch = share_of(actor, seed=2)
        ours = actor.compute_logprobs(batch)
        got = collector[0].call("result").result(20) if lead else None
        scores = engine[0].call("scores", *rows_of(batch), temperature).result(20) if lead else None
        for handle in collector + engine:
            handle.close()
        sync.close()
        return grid.data_rank, got, ours, scores, batch.loss_mask > 0, first

    results = run_ranks(rank, world)
    expected = tensors(tmp_path / "saved")
    ours = {replica: logprobs for replica, _, logprobs, *_ in results if logprobs is not None}
    leads = [result for result in results if result[1] is not None]
    assert leads
    for replica, got, _, scores, mask, first in leads:
        assert_equal(got, 1, expected)
        assert np.abs(scores - ours[replica])[mask].max() < 1e-5
        assert np.abs(first - scores).max() > 1e-3  # the step did move the weights


def rows_of(batch):
    return batch.tokens, batch.loss_mask


class Scorer(TransformersEngine):
    """An engine that scores given rows as well: its weights are seen through transformers' own forward."""

    @torch.no_grad()
    def scores(self, tokens, mask, temperature):
        tokens = torch.from_numpy(np.asarray(tokens, np.int64))
        scores = np.zeros(tokens.shape, np.float32)
        for i, row in enumerate(tokens):
            end = int(np.flatnonzero(mask[i]).max()) + 1
            logits = self.model(row[None, :end]).logits[0] / temperature
            logprobs = torch.log_softmax(logits.float(), -1)[:-1].gather(1, row[1:end, None])[:, 0]
            scores[i, 1:end] = logprobs.numpy() * mask[i, 1:end]
        return scores

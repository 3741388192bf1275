"""Memory and failures of a push from several ranks."""

from __future__ import annotations

import pathlib
import re

import pytest
import torch

from megatron_dump.actor.weight_stream import WeightStream
from megatron_dump.weight_sync import WeightSync, WeightSyncOptions
from tests.distributed.families import build, tensors, write_family
from tests.distributed.launch import run_ranks
from tests.engine_processes import Collector, Mishap, ProcessEngine, assert_equal


def is_lead(grid):
    return torch.distributed.get_rank(grid.replica_group) == 0


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("qwen2-tied")
    write_family(path, "qwen2-tied")
    return path


def peak_growth(action):
    """MB by which the process's resident memory, shared pages included, was higher at most while `action` ran."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew

    def read(key):
        status = pathlib.Path("/proc/self/status").read_text()
        return int(re.search(rf"{key}:\s+(\d+) kB", status)[1]) / 1024

    before = read("VmRSS")
    action()
    return read("VmHWM") - before


@pytest.mark.parametrize("transport", ["shared_memory", "broadcast"])
@pytest.mark.parametrize("shared", [True, False])
def test_no_rank_holds_more_than_its_buckets(tmp_path, transport, shared):
    """A model of 58 MB in buckets of 5 MB, over TP2xPP2."""
    sizes = dict(hidden_size=256, intermediate_size=4096, vocab_size=4096)
    write_family(tmp_path, "qwen2-untied", torch.float32, **sizes)

    def rank():
        modules, arch, grid = build(tmp_path, "32", tensor=2, pipeline=2)
        handles = [ProcessEngine(Collector)] if is_lead(grid) else []
        options = WeightSyncOptions(transport=transport, bucket_mb=5, timeout_s=30)
        sync = WeightSync(WeightStream(modules, arch, grid), handles, options)
        sync.crews[0].shared &= shared
        growth = [peak_growth(lambda version=version: sync.push(version)) for version in range(3)]
        for handle in handles:
            handle.close()
        return growth, sum(entry.nbytes for bucket in sync.crews[0].plan for entry in bucket.entries) / 2**20

    results = run_ranks(rank, 4)
    assert results[0][1] > 55
    for i, (growth, _) in enumerate(results):
        # Two buckets (a lead's, or a view of them), what is on its way, and what sockets and threads take.
        assert max(growth) < (3 * 5 if i == 0 or shared else 5) + 4, (i, growth)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("times", [1, 2])
def test_an_engine_that_dies_under_many_ranks(path, tmp_path, times, shared):
    """Two replicas with an engine each, one of which dies: restarted, or one clear error on every rank."""

    def rank():
        modules, arch, grid = build(path, "bf16", tensor=2)
        handles = []
        if is_lead(grid):
            handles = [ProcessEngine(Collector if grid.data_rank == 0 else lambda: Mishap("death", tmp_path, times))]
        options = WeightSyncOptions(bucket_mb=2**-8, timeout_s=20)
        sync = WeightSync(WeightStream(modules, arch, grid), handles, options, replica=grid.data_rank)
        for crew in sync.crews:
            crew.shared &= shared
        error = None
        try:
            sync.push(5)
        except RuntimeError as caught:
            error = str(caught)
        results = [handle.call("result").result(20) for handle in handles if handle.alive()]
        for handle in handles:
            handle.close()
        return error, results

    outcomes = run_ranks(rank, 4)
    expected = tensors(path)
    if times == 1:
        assert [error for error, _ in outcomes] == [None] * 4
        assert_equal(outcomes[2][1][0], 5, expected)
    else:
        (message,) = {error for error, _ in outcomes}
        assert "weight_sync: version 5 failed twice: rank 2: engine 0: EngineDied" in message
    assert_equal(outcomes[0][1][0], 5, expected)


def test_ranks_must_push_the_same_version(path):

    def rank():
        modules, arch, grid = build(path, "bf16", tensor=2)
        handles = [ProcessEngine(Collector)] if grid.rank == 0 else []
        sync = WeightSync(WeightStream(modules, arch, grid), handles)
        with pytest.raises(ValueError, match=r"the ranks push different versions: \[0, 1\]"):
            sync.push(grid.rank)
        for handle in handles:
            handle.close()

    run_ranks(rank, 2)


def test_a_rank_whose_weights_cannot_be_read(path):
    """Every rank gets the error, and the engine its end."""

    def rank():
        modules, arch, grid = build(path, "bf16", tensor=2)
        handles = [ProcessEngine(Collector)] if grid.rank == 0 else []
        weights = WeightStream(modules, arch, grid)
        read = weights.read
        if grid.rank == 1:

            def broken(index):
                if index == 7:
                    raise OSError("lost")
                return read(index)

            weights.read = broken
        sync = WeightSync(weights, handles, WeightSyncOptions(bucket_mb=2**-8, timeout_s=20))
        with pytest.raises(RuntimeError, match="version 0 failed twice: .*rank 1: OSError: lost"):
            sync.push(0)
        for handle in handles:
            handle.close()

    run_ranks(rank, 2)

"""A sync without Megatron, for tests in one process."""

from __future__ import annotations

import torch

from megatron_dump.weight_sync import WeightSync, WeightSyncOptions
from tests.engine_processes import Collector, ProcessEngine

TRANSPORTS = ("shared_memory", "broadcast")


class Whole:
    """A rank that has all of some tensors."""

    def __init__(self, tensors):
        self.tensors = tensors
        self.pieces = [
            (name, tuple(t.shape), str(t.dtype).removeprefix("torch."), i, 0, 0, len(t))
            for i, (name, t) in enumerate(tensors.items())
        ]

    def read(self, index):
        return self.tensors[self.pieces[index][0]]


def some_tensors(seed=0, dtypes=(torch.float32, torch.bfloat16, torch.int32)):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(7, 3), (1,), (300, 200), (5,), (129, 64), (64, 33, 2), (11,)]
    return {
        f"layer.{i}": (torch.randn(shape, generator=generator) * 100).to(dtypes[i % len(dtypes)])
        for i, shape in enumerate(shapes)
    }


def made_engines():
    """For a fixture: a function that starts an engine."""
    made = []

    def make(engine=Collector):
        made.append(ProcessEngine(engine))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


def sync_with(tensors, engines, bucket_mb=1, **options):
    defaults = dict(bucket_mb=bucket_mb, timeout_s=20.0)
    return WeightSync(Whole(tensors), engines, WeightSyncOptions(**{**defaults, **options}))

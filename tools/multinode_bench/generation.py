"""Seconds of generating a step's completions on the training weights, and what its caches take."""

from __future__ import annotations

import dataclasses
import math

from multinode_bench.memory import kv_cache
from multinode_bench.predict import Cost, Run

SPLIT, WHOLE, PIPELINE = "split", "whole", "pipeline"


@dataclasses.dataclass(frozen=True)
class Unit:
    """The ranks that generate together, and their part of the rollouts."""

    tensor: int  # ranks that split every matrix
    stages: int  # that a token passes one after another
    rollouts: float
    groups: float  # prompts, at least one

    @property
    def alone(self) -> bool:
        return self.tensor == self.stages == 1


def unit(run: Run, split: str) -> Unit:
    """`split`: the trained one, whole copies on every rank, or copies split over tensor ranks."""
    layout = run.layout
    tensor = 1 if split == WHOLE else layout.tensor
    stages = layout.pipeline if split == SPLIT else 1
    rollouts = run.work.rollouts * tensor * stages / run.world_size
    if split == SPLIT:
        rollouts = run.work.rollouts / run.replicas
    return Unit(tensor, stages, rollouts, max(1.0, rollouts / run.work.samples))


def generation(run: Run, split: str) -> Cost:
    """Copies brought up to date, prompts, then a position after another until the longest response ends."""
    shape, machine, lengths, width = run.shape, run.machine, run.work.lengths, unit(run, split)
    layers, element, crowding = shape.layers, run.work.element, run.crowding
    tokens, positions = width.rollouts * lengths.response, _positions(run, width)
    seen = lengths.prompt + lengths.response / 2
    prompts = width.groups * lengths.prompt * layers * shape.mean_flops(lengths.prompt / 2)
    prefill = prompts / (width.tensor * machine.forward_flops)
    flops = tokens * (layers * shape.mean_flops(seen) + shape.head_flops())
    kept = kv_cache(
        shape, width.rollouts, width.groups, lengths.prompt, lengths.response / 2, width.tensor, layers, element
    )
    read = positions * element * shape.whole_numel() / width.tensor + lengths.response * kept
    decode = max(flops / (width.tensor * machine.decode_flops), read / machine.memory_bytes_per_s)
    compute = crowding * (prefill + decode + positions * layers * machine.decode_layer_s)
    return Cost(compute, refresh(run, split) + _talk(run, width))


def _positions(run: Run, width: Unit) -> float:
    """How often the layers run: rows are refilled as they end, and the longest of the last ones is waited for."""
    lengths, together = run.work.lengths, _together(run, width)
    return lengths.longest + (width.rollouts / together - 1) * lengths.response


def _together(run: Run, width: Unit) -> float:
    return min(width.rollouts, run.work.config.model.grpo.generation_rollout_mbs)


def _talk(run: Run, width: Unit) -> float:
    """Seconds of all-reduces in every layer and messages between stages, position by position."""
    if width.alone:
        return 0.0
    hidden, positions, network = run.shape.arch.hf.hidden_size, _positions(run, width), run.network
    rows = width.rollouts * run.work.lengths.response / positions  # that are not done, on average
    message = rows * hidden * run.work.element
    vocabulary = rows * 4 * run.shape.arch.padded_vocab_size
    position = 2 * run.shape.layers * network.all_reduce(message, run.tensor) if width.tensor > 1 else 0.0
    position += network.scatter_or_gather(vocabulary, run.tensor) if width.tensor > 1 else 0.0
    if width.stages > 1:
        position += (width.stages - 1) * network.send(message, run.pipeline)
        position += network.broadcast(rows * 8, run.pipeline)  # the tokens drawn
    return positions * position


def refresh(run: Run, split: str) -> float:
    """Seconds to bring copies up to date, parameter by parameter: gathered over tensor ranks, sent to all stages."""
    layout, network = run.layout, run.network
    if split == SPLIT or layout.replica_size == 1:
        return 0.0
    parameters = [p for stage in range(layout.pipeline) for chunk in run.shape.parameters(stage) for p in chunk]
    gathered = layout.tensor if split == WHOLE else 1
    seconds = 0.0
    for parameter in parameters:
        size = run.work.element * parameter.size
        if gathered > 1:
            seconds += network.scatter_or_gather(size * gathered, run.tensor) / layout.pipeline
        if layout.pipeline > 1:
            seconds += network.broadcast(size * gathered, run.pipeline)
    return seconds


def choose(run: Run) -> str:
    """`reshard` of the configuration; auto is taken for whole copies where they take a quarter of a device at most."""
    reshard = run.work.config.trainer.grpo.inference_backend.reshard
    if reshard != "auto":
        return PIPELINE if reshard == "pipeline" else WHOLE if reshard else SPLIT
    layout, machine = run.layout, run.machine
    if layout.replica_size == 1:
        return SPLIT
    whole = run.work.element * run.shape.whole_numel()
    if machine.memory_bytes is None or whole <= machine.memory_bytes / 4:
        return WHOLE
    return PIPELINE if layout.context > 1 or layout.virtual_pipeline else SPLIT


def cache_bytes(run: Run, split: str) -> float:
    """Keys and values at the most, and the copy that generates."""
    width, lengths = unit(run, split), run.work.lengths
    layers = math.ceil(run.shape.layers / width.stages)
    rows = _together(run, width)
    groups = max(1.0, rows / run.work.samples)
    kept = kv_cache(run.shape, rows, groups, lengths.prompt, lengths.longest, width.tensor, layers, run.work.element)
    copy = 0 if split == SPLIT else run.work.element * run.shape.whole_numel() / width.tensor
    return kept + copy

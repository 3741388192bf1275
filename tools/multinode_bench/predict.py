"""Seconds of a GRPO step by phase, and the memory of a rank, predicted from a machine's constants.

A model of averages: every rank gets its share of the work, rollouts are alike but for the longest one, and nothing
is hidden behind anything else. Shown against measurements by `simulate --check`.
"""

from __future__ import annotations

import dataclasses

from megatron_dump.actor.layout import Layout
from multinode_bench.constants import Constants
from multinode_bench.network import Network, Span, span
from multinode_bench.shape import Shape
from multinode_bench.workload import MicroBatches, Workload


@dataclasses.dataclass(frozen=True)
class Cost:
    """Seconds of a phase: what ranks compute or copy, what they send, and what they wait for in the pipeline."""

    compute: float = 0.0
    communication: float = 0.0
    bubble: float = 0.0

    @property
    def total(self) -> float:
        return self.compute + self.communication + self.bubble

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.compute + other.compute, self.communication + other.communication, self.bubble + other.bubble)

    def times(self, n: float) -> Cost:
        return Cost(n * self.compute, n * self.communication, n * self.bubble)


@dataclasses.dataclass(frozen=True)
class Run:
    """A model in a layout on so many ranks of a machine."""

    shape: Shape
    world_size: int
    work: Workload
    machine: Constants

    @property
    def layout(self) -> Layout:
        return self.shape.layout

    @property
    def replicas(self) -> int:
        return self.world_size // self.layout.replica_size

    @property
    def network(self) -> Network:
        return self.machine.network

    @property
    def crowding(self) -> float:
        return self.machine.crowding(self.world_size)

    @property
    def tensor(self) -> Span:
        return span(1, self.layout.tensor, self.machine.ranks_per_node)

    @property
    def gradients(self) -> Span:
        """Data-parallel and context-parallel ranks: they sum gradients and share the optimizer."""
        return span(self.layout.tensor, self.layout.context * self.replicas, self.machine.ranks_per_node)

    @property
    def pipeline(self) -> Span:
        return span(self.world_size // self.layout.pipeline, self.layout.pipeline, self.machine.ranks_per_node)


def pipeline_bubble(stages: int, micros: int, chunks: int = 1) -> float:
    """Idle time over ideal time: (p - 1) / (m v) (Narayanan et al., 2104.04473, sections 2.2.1 and 2.2.2)."""
    return (stages - 1) / (micros * chunks)


def passes(run: Run, micros: MicroBatches, backward: bool) -> Cost:
    """All micro-batches of one batch of a replica through all stages: forward, or forward and backward."""
    shape, layout, machine = run.shape, run.layout, run.machine
    model = run.work.config.model
    tokens = micros.tokens / layout.context
    recompute = backward and model.recompute_granularity == "full"
    rate, overhead = machine.forward_flops, machine.forward_layer_s
    if backward:
        rate, overhead = machine.train_flops, machine.train_layer_s
    weight = (4 if recompute else 3) if backward else 1  # a backward pass is two forward ones
    layer = weight * tokens * shape.mean_flops(micros.context) / (layout.tensor * rate)
    head = (3 if backward else 1) * micros.sampled / layout.context * shape.head_flops() / (layout.tensor * rate)
    stage = run.crowding * shape.layers_per_stage * (layer + overhead)
    message = tokens * shape.arch.hf.hidden_size * run.work.element
    reductions = 2 * ((3 if recompute else 2) if backward else 1)  # after attention and feed-forward (1909.08053)
    sent = shape.layers_per_stage * reductions * run.network.all_reduce(message, run.tensor)
    if layout.pipeline > 1:
        share = message / layout.tensor if layout.sequence else message
        sent += (2 if backward else 1) * shape.chunks * run.network.send(share, run.pipeline)
    last = run.crowding * head  # of the last stage alone: the others wait for it
    bubble = pipeline_bubble(layout.pipeline, micros.count, shape.chunks)
    return Cost(micros.count * (stage + last), micros.count * sent, bubble * micros.count * (stage + sent))


def update(run: Run) -> Cost:
    """One optimizer step: passes, gradients summed over data-parallel ranks, Adam, weights gathered."""
    model, layout, network = run.work.config.model, run.layout, run.network
    micros = run.work.micros(run.replicas)
    own = max(run.shape.numel(0), run.shape.numel(layout.pipeline - 1))
    group = run.gradients
    if model.use_distributed_optimizer:
        sent = network.scatter_or_gather(4 * own, group) + network.scatter_or_gather(run.work.element * own, group)
        updated = own / group.ranks
    else:
        sent, updated = network.all_reduce(4 * own, group), own
    if layout.pipeline > 1 and run.shape.arch.tied:  # the embedding's gradient, of the first and the last stage
        embedding = run.shape.arch.padded_vocab_size * run.shape.arch.hf.hidden_size / layout.tensor
        ends = run.pipeline
        sent += network.all_reduce(4 * embedding, Span(2, 2 if ends.nodes == 1 else 1))
    # Adam reads gradient, moments and weight and writes all but the gradient; gradients are zeroed and scaled before.
    moved = (4 + 8 + 4 + 8 + 4) * updated + 3 * 4 * own
    return passes(run, micros, backward=True) + Cost(run.crowding * moved / run.machine.memory_bytes_per_s, sent)


def logprobs(run: Run) -> Cost:
    """Of all rollouts of a step, forward only."""
    return passes(run, run.work.micros(run.replicas, forward=True), backward=False)


def reference(run: Run) -> Cost:
    """The policy's weights go to the host, the reference's come, and the policy's again."""
    own = run.work.element * max(run.shape.numel(0), run.shape.numel(run.layout.pipeline - 1))
    return logprobs(run) + Cost(run.crowding * 3 * own / run.machine.host_bytes_per_s)

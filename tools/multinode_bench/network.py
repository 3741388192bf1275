"""Seconds of collectives over groups of ranks, from the latency and inverse bandwidth of a link.

An all-reduce of n ranks costs 2 log2(n) alpha + 2 (n-1)/n beta × bytes: Rabenseifner's algorithm (Thakur, Rabenseifner
and Gropp, IJHPCA 19, 2005, section 4.4), which has the latency of NCCL's trees and the bandwidth of its rings.
"""

from __future__ import annotations

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Link:
    """alpha: seconds a message; beta: seconds a byte that a rank sends."""

    alpha: float
    beta: float


@dataclasses.dataclass(frozen=True)
class Span:
    """A group of ranks: so many, so many of them on each node it reaches."""

    ranks: int
    per_node: int

    @property
    def nodes(self) -> int:
        return self.ranks // self.per_node


def span(stride: int, ranks: int, ranks_per_node: int) -> Span:
    """Of ranks 0, stride, 2 stride, …: megatron-core's groups (order tensor, context, data, pipeline)."""
    per_node = max(1, min(ranks, ranks_per_node // stride))
    while ranks % per_node:
        per_node -= 1
    return Span(ranks, per_node)


def all_reduce_columns(ranks: int) -> tuple[float, float]:
    """What alpha, and beta × bytes, are multiplied with in an all-reduce."""
    return 2.0 * math.log2(ranks), 2.0 * (ranks - 1) / ranks


@dataclasses.dataclass(frozen=True)
class Network:
    """Links by class: between the ranks of a node, and between nodes (None: unknown, one node only)."""

    intra: Link
    inter: Link | None
    intra_p2p: Link
    inter_p2p: Link | None

    def all_reduce(self, size: float, group: Span) -> float:
        """Seconds for `size` bytes on every rank: within nodes, between them, within nodes (a share each)."""
        inside = _flat(self.intra, group.per_node, size)
        if group.nodes == 1:
            return inside
        return inside + _flat(_known(self.inter), group.nodes, size / group.per_node)

    def scatter_or_gather(self, size: float, group: Span) -> float:
        """A reduce-scatter or an all-gather of `size` bytes in all: half of an all-reduce."""
        return self.all_reduce(size, group) / 2

    def broadcast(self, size: float, group: Span) -> float:
        """Pipelined round the group: each rank sends everything once."""
        if group.ranks == 1:
            return 0.0
        link = self.intra if group.nodes == 1 else _known(self.inter)
        return math.log2(group.ranks) * link.alpha + size * link.beta

    def send(self, size: float, group: Span) -> float:
        """From a rank to the next of its group, the slowest pair."""
        link = self.intra_p2p if group.nodes == 1 else _known(self.inter_p2p)
        return link.alpha + size * link.beta


def _flat(link: Link, ranks: int, size: float) -> float:
    latency, share = all_reduce_columns(ranks)
    return latency * link.alpha + share * size * link.beta


def _known(link: Link | None) -> Link:
    if link is None:
        raise ValueError(
            "the constants have no links between nodes (links.inter): measure on several nodes, or simulate at most "
            "ranks_per_node ranks"
        )
    return link

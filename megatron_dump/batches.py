"""Who generates and who trains which rollouts: a step's rollouts over its updates and the data-parallel ranks."""

from __future__ import annotations

import dataclasses
import heapq

import numpy as np

from megatron_dump import grpo
from megatron_dump.types import Draw, Outcomes


def split(n: int, updates: int, ranks: int) -> list[list[np.ndarray]]:
    """[updates][ranks] int64 positions out of 0..n-1, contiguous, in order, in sizes that differ by at most one.

    The rollouts of an update do not depend on how many ranks there are. Groups may be cut: advantages are computed
    over all ranks' rewards, and a completion does not depend on where it is sampled.
    """
    return [np.array_split(part, ranks) for part in np.array_split(np.arange(n, dtype=np.int64), updates)]


def share_of_draw(draw: Draw, updates: int, ranks: int, rank: int) -> list[tuple[int, int, int]]:
    """(place in the draw, first sample, number of samples) of each group, or part of one, that `rank` generates.

    Ordered by update, as `split` deals out the rollouts in (group, sample) order.
    """
    place = np.repeat(np.arange(len(draw.rollouts)), draw.rollouts)
    sample = np.arange(len(place)) - np.repeat(np.cumsum(draw.rollouts) - draw.rollouts, draw.rollouts)
    runs = []
    for update in split(len(place), updates, ranks):
        mine = update[rank]
        starts = np.flatnonzero(np.diff(place[mine], prepend=-1))
        lengths = np.diff(starts, append=len(mine))
        runs += [(int(place[mine[s]]), int(sample[mine[s]]), int(n)) for s, n in zip(starts, lengths, strict=True)]
    return runs


def balanced(costs: np.ndarray, ranks: int) -> list[np.ndarray]:
    """[ranks] int64 positions into `costs`, ascending in each: every position once, sums about equal.

    The largest first, each to the rank that has least so far (Graham, "Bounds on multiprocessing timing anomalies",
    1969: the largest sum is at most 4/3 of the least possible, and sums differ by at most the largest cost).
    """
    heap = [(0, rank) for rank in range(ranks)]  # ties go to the lowest rank: the same everywhere
    owner = np.empty(len(costs), np.int64)
    for position in np.argsort(-costs, kind="stable"):
        total, rank = heapq.heappop(heap)
        owner[position] = rank
        heapq.heappush(heap, (total + int(costs[position]), rank))
    return [np.flatnonzero(owner == rank) for rank in range(ranks)]


@dataclasses.dataclass(frozen=True)
class UpdateShare:
    """What one rank trains on in one optimizer step."""

    rows: np.ndarray  # int64 [n], positions in the step's Outcomes
    advantages: np.ndarray  # float64 [n]
    weights: np.ndarray  # float64 [n], of grpo.loss_weights; 0: the row counts nowhere
    global_tokens: float  # that count, over all ranks
    n_rows: int  # of the rank that has most: the others fill up


def update_shares(
    outcomes: Outcomes,
    rejected: np.ndarray,
    updates: int,
    ranks: int,
    rank: int,
    loss_agg_mode: str,
    max_length: int,
    prompt_lengths: np.ndarray | None = None,
) -> list[UpdateShare]:
    """One rank's share of every update, from all groups but the `rejected` (ids), dealt out in global order.

    loss_agg_mode and max_length as in grpo.loss_weights.

    Rollouts without a finite reward keep their row, which counts nowhere; updates without any other are left out.
    With `prompt_lengths`, int64 [N] tokens beside outcomes.lengths, an update's rollouts go to the ranks by their
    tokens instead, without those that count nowhere; which rollouts an update has is the same.
    """
    taken = np.flatnonzero(~np.isin(outcomes.group_ids, rejected))
    _, group, sizes = np.unique(outcomes.group_ids[outcomes.kept], return_inverse=True, return_counts=True)
    group_size = np.zeros(len(outcomes.kept), np.int64)
    group_size[outcomes.kept] = sizes[group]
    shares = []
    for parts in split(len(taken), updates, ranks):
        everyone = taken[np.concatenate(parts)]
        everyone = everyone[outcomes.kept[everyone]]
        if not len(everyone):
            continue
        groups, lengths = outcomes.group_ids[everyone], outcomes.lengths[everyone]
        weights = np.zeros(len(outcomes.kept))
        weights[everyone] = grpo.loss_weights(loss_agg_mode, groups, lengths, group_size[everyone], max_length)
        dealt = [taken[part] for part in parts]
        if prompt_lengths is not None:
            dealt = [everyone[part] for part in balanced(prompt_lengths[everyone] + lengths, ranks)]
        rows = dealt[rank]
        advantages = np.where(outcomes.kept, outcomes.advantages, 0.0)[rows]
        shares.append(UpdateShare(rows, advantages, weights[rows], float(lengths.sum()), max(map(len, dealt))))
    return shares

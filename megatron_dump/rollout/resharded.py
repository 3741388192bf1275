"""Generation with the ranks of a model replica as data parallel, on whole copies of the policy."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist

from megatron_dump.actor.whole import WholePolicy
from megatron_dump.gather import gather_completions
from megatron_dump.rollout import Request
from megatron_dump.rollout.megatron import MegatronGenerator
from megatron_dump.types import Completion


class ReshardedGenerator:
    """Deals requests out to the replica's ranks and gives every rank all completions.

    `generator` works on `policy`, this rank's whole copy.
    """

    def __init__(self, generator: MegatronGenerator, policy: WholePolicy) -> None:
        self.generator, self.policy = generator, policy
        self.group = policy.parallel.replica_group

    def generate(self, step: int, requests: Sequence[Request]) -> list[Completion]:
        self.policy.refresh()
        rank, size = dist.get_rank(self.group), dist.get_world_size(self.group)
        mine = self.generator.generate(step, requests[rank::size]) if requests[rank::size] else []
        everything = gather_completions(mine, self.group, self.policy.parallel.device)
        found = {(c.group_id, c.sample): c for c in everything}
        return [self.generator.with_text(found[r.group_id, sample]) for r in requests for sample in r.samples]

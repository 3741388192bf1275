"""Generation with the ranks of a model replica as data parallel, on copies of the policy that are less split."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_dump.actor.whole import WholePolicy
from megatron_dump.gather import gather_completions
from megatron_dump.rollout import Request
from megatron_dump.rollout.megatron import MegatronGenerator
from megatron_dump.types import Completion


class ReshardedGenerator:
    """Deals requests out to the replica's ranks and gives every rank all completions.

    `generator` works on `policy`, the copy that this rank has, or shares with its tensor ranks.
    """

    def __init__(self, generator: MegatronGenerator, policy: WholePolicy) -> None:
        self.generator, self.policy = generator, policy
        self.notice = ""  # which split of the policy this is, and why: for people
        self.group = policy.actor.parallel.replica_group

    def greedy(self) -> ReshardedGenerator:
        """One that takes the likeliest token, on the same copy."""
        return ReshardedGenerator(self.generator.greedy(), self.policy)

    def generate(self, step: int, requests: Sequence[Request]) -> list[Completion]:
        self.policy.refresh()
        part, parts = self.policy.unit
        mine = self.generator.generate(step, requests[part::parts])
        own = mine if self.policy.parallel.tensor_rank == 0 else []  # tensor ranks that share a copy have the same
        everything = gather_completions(own, self.group, self.policy.parallel.device)
        found = {(c.group_id, c.sample): c for c in everything}
        return [self.generator.with_text(found[r.group_id, sample]) for r in requests for sample in r.samples]

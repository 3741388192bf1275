"""Generation with the ranks of a model replica as data parallel, on whole copies of the policy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist

from megatron_dump.actor.whole import WholePolicy
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
        limit = self.generator.options.max_length
        most = max(sum(r.n for r in requests[i::size]) for i in range(size))
        table = np.zeros((most, 1 + 2 * limit))  # a row a completion: length, tokens, log-probabilities
        for row, completion in zip(table, mine, strict=False):
            length = len(completion.token_ids)
            row[0], row[1 : 1 + length] = length, completion.token_ids
            row[1 + limit : 1 + limit + length] = completion.logprobs
        own = torch.from_numpy(table).to(self.policy.parallel.device)
        tables = [torch.empty_like(own) for _ in range(size)]
        dist.all_gather(tables, own, group=self.group)
        rows = {i: iter(t.cpu().numpy()) for i, t in enumerate(tables)}
        return [
            self._completion(request, sample, next(rows[i % size]), limit)
            for i, request in enumerate(requests)
            for sample in range(request.n)
        ]

    def _completion(self, request: Request, sample: int, row: np.ndarray, limit: int) -> Completion:
        length = int(row[0])
        return self.generator.completion(
            request,
            sample,
            row[1 : 1 + length].astype(np.int64),
            row[1 + limit : 1 + limit + length].astype(np.float32),
        )

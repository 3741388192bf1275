"""Engines that all replicas share: their requests come together on rank 0, which drives them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from megatron_dump.distributed import Replica, all_gather_array
from megatron_dump.rollout import AsyncGenerator, Pending, Request
from megatron_dump.types import Completion, Prompt


class SharedGenerator:
    """A Generator and AsyncGenerator; all ranks of the run call it alike, with their replica's requests or none.

    generator: gets the requests of all replicas, on every rank, and gives every rank all completions (an
    EngineGenerator whose replica is the whole run, with an engine on rank 0 and a `decode` that need not do anything).
    """

    def __init__(self, generator: AsyncGenerator, replica: Replica, with_text: Callable[[Completion], Completion]):
        self.generator, self.replica, self.with_text = generator, replica, with_text

    def generate(self, step: int, requests: Sequence[Request]) -> list[Completion]:
        return self.submit(step, requests).result()

    def submit(self, step: int, requests: Sequence[Request]) -> SharedPending:
        everything = gather_requests(requests if self.replica.is_lead else (), self.replica)
        return SharedPending(self.generator.submit(step, everything), requests, self.with_text)


class SharedPending:
    """This replica's part of what is on its way."""

    def __init__(
        self, pending: Pending, requests: Sequence[Request], with_text: Callable[[Completion], Completion]
    ) -> None:
        self._pending, self._requests, self._with_text = pending, requests, with_text

    def result(self) -> list[Completion]:
        found = {(c.group_id, c.sample): c for c in self._pending.result()}
        return [self._with_text(found[r.group_id, sample]) for r in self._requests for sample in r.samples]


def gather_requests(local: Sequence[Request], replica: Replica) -> list[Request]:
    """Every rank's requests, sorted by (group_id, first), the same on every rank. A collective of all ranks.

    Of a prompt only its index and tokens travel: what an engine needs.
    """
    heads = np.array([(r.group_id, r.n, r.first, r.prompt.index, len(r.prompt.token_ids)) for r in local], np.int64)
    heads = heads.reshape(-1, 5)
    tokens = np.concatenate([np.empty(0, np.int64), *(r.prompt.token_ids for r in local)]).astype(np.int64)
    sizes = all_gather_array(np.array([len(heads), len(tokens)]), None, replica.device)  # [ranks, 2]
    parts = []
    for array, counts in ((heads, sizes[:, 0]), (tokens, sizes[:, 1])):
        padded = np.zeros((max(1, int(counts.max())), *array.shape[1:]), np.int64)
        padded[: len(array)] = array
        gathered = all_gather_array(padded, None, replica.device)
        parts.append(np.concatenate([part[:n] for part, n in zip(gathered, counts, strict=True)]))
    heads, tokens = parts
    ends = np.cumsum(heads[:, 4])
    requests = [
        Request(group_id, Prompt(index, "", tokens[end - length : end], ""), n, first)
        for (group_id, n, first, index, length), end in zip(heads.tolist(), ends.tolist(), strict=True)
    ]
    return sorted(requests, key=lambda r: (r.group_id, r.first))

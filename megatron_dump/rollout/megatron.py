"""Generation on the actor's own weights: prompts prefilled once a group, rows refilled as completions end."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from megatron_dump.actor.incremental import incremental_forward
from megatron_dump.actor.kv_cache import KVCache
from megatron_dump.actor.policy import Policy
from megatron_dump.actor.whole import WholePolicy
from megatron_dump.rollout import Request
from megatron_dump.rollout.decoding import Decoding
from megatron_dump.rollout.sampling import SamplingOptions
from megatron_dump.types import Completion


class MegatronGenerator:
    """A Generator that needs no weight synchronisation: it is the policy.

    At most `max_rows` completions are decoded together (more, if a single group is larger); `decode` turns token ids
    into text; `on_progress` is given how many of a call's completions are done on this rank, and of how many.
    """

    def __init__(
        self,
        policy: Policy | WholePolicy,
        options: SamplingOptions,
        seed: int,
        max_rows: int,
        decode: Callable[[list[int]], str],
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self.policy, self.options, self.seed, self.max_rows, self.decode = policy, options, seed, max_rows, decode
        self.on_progress = on_progress
        self.device = policy.parallel.device
        self.notice = ""  # which split of the policy this is, and why: for people
        self.cache_bytes = 0  # what keys and values took on this rank in the last generation, at most

    def generate(self, step: int, requests: Sequence[Request]) -> list[Completion]:
        """As the Generator's. Where experts are split, a collective of all ranks, requests or not."""
        policy, requests = self.policy, [r for r in requests if r.n]
        total = sum(r.n for r in requests)
        n_rows = min(total, max(self.max_rows, *(r.n for r in requests), 1)) if requests else 0
        longest = max((len(r.prompt.token_ids) for r in requests), default=1)
        cache = KVCache(n_rows, self.options.max_length, longest, self.device)
        with incremental_forward(policy.module, policy.parallel, policy.arch.vocab_size, cache) as model:
            decoding = Decoding(model, self.options, self.seed, step, requests)
            while model.work(decoding.unfinished):
                if decoding.unfinished:
                    decoding.advance()
                    self.on_progress(len(decoding.results), total)
                else:
                    model.idle()
        self.cache_bytes = cache.peak_bytes
        return [
            self._completion(request, sample, *decoding.results[i, sample])
            for i, request in enumerate(requests)
            for sample in request.samples
        ]

    def greedy(self) -> MegatronGenerator:
        """One that takes the likeliest token, on the same weights."""
        options = dataclasses.replace(self.options, use_greedy=True)
        return MegatronGenerator(self.policy, options, self.seed, self.max_rows, self.decode, self.on_progress)

    def _completion(self, request: Request, sample: int, ids: np.ndarray, logprobs: np.ndarray) -> Completion:
        finished = bool(ids[-1] in self.options.stop_ids)
        version = self.policy.version
        return self.with_text(Completion(request.group_id, sample, ids, logprobs, finished, version))

    def with_text(self, completion: Completion) -> Completion:
        """The completion, decoded."""
        ids = completion.token_ids[: len(completion.token_ids) - completion.finished]
        return dataclasses.replace(completion, text=self.decode(ids.tolist()))

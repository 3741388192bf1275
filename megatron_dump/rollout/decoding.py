"""Continuous batching: which prompt is prefilled when, which row continues which completion."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_dump.actor.incremental import IncrementalForward
from megatron_dump.rollout import Request
from megatron_dump.rollout.sampling import SamplingOptions, pick_tokens, uniforms

REFILL_AT = 0.125  # groups are prefilled together, when this share of the rows is free for them
COMPACT_AT = 0.8  # with no group left to begin, free rows are dropped in bulk, below this share of taken ones
PREFILL_TOKENS = 8192  # of the prompts in one pass, if they are several


class Decoding:
    """The completions of a list of requests in the making; ranks that decode the same rows decide alike.

    Every `advance` is one forward pass. `results` are those that are done: by the request's place in the list and the
    sample, the tokens int64 [T] and their log-probabilities float32 [T].
    """

    def __init__(
        self, model: IncrementalForward, options: SamplingOptions, seed: int, step: int, requests: Sequence[Request]
    ) -> None:
        self.model, self.cache, self.options = model, model.cache, options
        self.seed, self.step, self.requests = seed, step, requests
        self.results: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}
        self._begun = 0  # requests, in their order
        n, limit = len(self.cache.slots), options.max_length
        self._owners: list[tuple[int, int]] = [(0, 0)] * n  # whose a row is: request, sample
        self._taken = np.zeros(n, bool)
        self._made = np.zeros(n, np.int64)  # tokens of its completion so far
        self._uniform = np.zeros((n, limit))
        self._ids = np.zeros((n, limit), np.int64)
        self._logprobs = np.zeros((n, limit), np.float32)
        self._newest = torch.zeros(n, dtype=torch.int64, device=self.cache.device)  # the last token of each row

    @property
    def unfinished(self) -> bool:
        return self._begun < len(self.requests) or bool(self._taken.any())

    def advance(self) -> None:
        """Prefill the next groups if there is room for them, else append a token to every row."""
        groups = self._next_groups()
        if groups:
            self._prefill(groups)
        else:
            self._decode()

    def _next_groups(self) -> range:
        """The requests to begin now."""
        first, free = self._begun, self.cache.free
        if first == len(self.requests):
            return range(0)
        remaining = sum(r.n for r in self.requests[first:])
        if free < min(REFILL_AT * len(self._taken), remaining):
            return range(0)
        last, tokens = first, 0
        for request in self.requests[first:]:
            free, tokens = free - request.n, tokens + len(request.prompt.token_ids)
            if free < 0 or (last > first and tokens > PREFILL_TOKENS):
                break
            last += 1
        return range(first, last)

    def _prefill(self, groups: range) -> None:
        self._begun = groups.stop
        requests = [self.requests[i] for i in groups]
        prompts = [r.prompt.token_ids for r in requests]
        rows_of = self.cache.admit([len(p) for p in prompts], [r.n for r in requests])
        for i, rows in zip(groups, rows_of, strict=True):
            request = self.requests[i]
            for row, sample in zip(rows, request.samples, strict=True):
                self._owners[row] = (i, sample)
                self._uniform[row] = uniforms(self.seed, self.step, request.group_id, sample, self.options.max_length)
        rows = np.concatenate(rows_of)
        self._taken[rows], self._made[rows] = True, 0
        logits = self.model.prefill(prompts, self.cache.slots[[mine[0] for mine in rows_of]])
        if logits is not None:
            of_rows = np.repeat(np.arange(len(requests)), [r.n for r in requests])
            logits = logits[torch.from_numpy(of_rows).to(logits.device)]
        self._sample(logits, rows)

    def _decode(self) -> None:
        taken = int(self._taken.sum())
        if self._begun == len(self.requests) and taken < COMPACT_AT * len(self._taken):
            self._drop_free_rows()
        self._sample(self.model.decode(self._newest), np.arange(len(self._taken)))

    def _drop_free_rows(self) -> None:
        rows = self.cache.compact()
        self._owners = [self._owners[row] for row in rows]
        self._newest = self._newest[torch.from_numpy(rows).to(self._newest.device)]
        for name in ("_taken", "_made", "_uniform", "_ids", "_logprobs"):
            setattr(self, name, getattr(self, name)[rows])

    def _sample(self, logits: Tensor | None, rows: np.ndarray) -> None:
        """Give `rows` (those that are free, for nothing) their next tokens, from logits [len(rows), V]."""
        device, made = self._newest.device, self._made[rows]
        picked = torch.zeros(2, len(rows), dtype=torch.float64, device=device)
        if logits is not None:
            uniform = torch.from_numpy(self._uniform[rows, np.minimum(made, self.options.max_length - 1)]).to(device)
            short = made < self.options.min_length
            too_short = torch.from_numpy(short).to(device) if short.any() else None
            picked = torch.stack([x.double() for x in pick_tokens(logits, uniform, self.options, too_short)])
        picked = self.model.share(picked)
        self._newest[torch.from_numpy(rows).to(device)] = picked[0].long()
        tokens, logprobs = picked.cpu().numpy()
        real = self._taken[rows]
        rows, made, tokens, logprobs = rows[real], made[real], tokens[real], logprobs[real]
        self._ids[rows, made], self._logprobs[rows, made] = tokens, logprobs
        self._made[rows] += 1
        done = rows[np.isin(tokens, self.options.stop_ids) | (made + 1 == self.options.max_length)]
        for row in done:
            length = self._made[row]
            self.results[self._owners[row]] = (self._ids[row, :length].copy(), self._logprobs[row, :length].copy())
        self._taken[done] = False
        self.cache.release(done)

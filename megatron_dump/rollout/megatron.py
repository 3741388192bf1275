"""Generation on the actor's own weights: prompts prefilled once a group, finished rows leave the batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_dump.actor.actor import MegatronGPTGRPOActor
from megatron_dump.actor.incremental import IncrementalForward, incremental_forward
from megatron_dump.actor.whole import WholePolicy
from megatron_dump.rollout import Request
from megatron_dump.rollout.sampling import SamplingOptions, pick_tokens, uniforms
from megatron_dump.types import Completion

_COMPACT_AT = 0.8  # rows leave the batch in bulk, when fewer than this share of them are unfinished


class MegatronGenerator:
    """A Generator that needs no weight synchronisation: it is the policy.

    `max_rows` completions are decoded together; `decode` turns token ids into text.
    """

    def __init__(
        self,
        policy: MegatronGPTGRPOActor | WholePolicy,
        options: SamplingOptions,
        seed: int,
        max_rows: int,
        decode: Callable[[list[int]], str],
    ) -> None:
        self.policy, self.options, self.seed, self.max_rows, self.decode = policy, options, seed, max_rows, decode
        self.device = policy.parallel.device

    def generate(self, step: int, requests: Sequence[Request]) -> list[Completion]:
        completions = []
        for batch in _batches(requests, self.max_rows):
            completions += self._generate(step, batch)
        return completions

    def _generate(self, step: int, requests: Sequence[Request]) -> list[Completion]:
        prompts, start = _left_pad([r.prompt.token_ids for r in requests])
        owners = [(i, sample) for i, r in enumerate(requests) for sample in r.samples]
        n, limit = len(owners), self.options.max_length
        uniform = torch.from_numpy(
            np.stack([uniforms(self.seed, step, requests[i].group_id, sample, limit) for i, sample in owners])
        ).to(self.device)
        start, prompts = torch.from_numpy(start).to(self.device), torch.from_numpy(prompts).to(self.device)
        policy, capacity = self.policy, prompts.size(1) + limit
        with incremental_forward(policy.module, policy.parallel, policy.arch.vocab_size, start, capacity) as model:
            logits = model.forward(prompts)
            rows = torch.tensor([i for i, _ in owners], device=self.device)
            model.select(rows)
            tokens, logprobs = self._decode_loop(model, logits[rows] if logits is not None else None, n, uniform)
        lengths = (tokens >= 0).sum(1)
        return [
            self._completion(requests[i], sample, tokens[row, : lengths[row]], logprobs[row, : lengths[row]])
            for row, (i, sample) in enumerate(owners)
        ]

    def _decode_loop(
        self, model: IncrementalForward, logits: Tensor | None, n: int, uniform: Tensor
    ) -> tuple[np.ndarray, np.ndarray]:
        """Sampled tokens int64 [N, max_length] (-1 behind the end) and their log-probabilities."""
        limit = self.options.max_length
        tokens = torch.full((n, limit), -1, dtype=torch.int64, device=self.device)
        logprobs = torch.zeros(n, limit, dtype=torch.float32, device=self.device)
        stops = torch.tensor(self.options.stop_ids, device=self.device)
        active = torch.arange(n, device=self.device)  # row of the batch -> completion
        running = torch.ones(n, dtype=torch.bool, device=self.device)  # by row of the batch
        for t in range(limit):
            picked = torch.zeros(2, len(active), dtype=torch.float64, device=self.device)
            if logits is not None:
                picked = torch.stack([x.double() for x in pick_tokens(logits, uniform[active, t], self.options)])
            new_tokens, new_logprobs = model.share(picked)
            new_tokens = new_tokens.long()
            tokens[active[running], t] = new_tokens[running]
            logprobs[active[running], t] = new_logprobs[running].float()
            running &= ~torch.isin(new_tokens, stops)
            n_running = int(running.sum())
            if n_running == 0 or t == limit - 1:
                break
            if n_running < _COMPACT_AT * len(active):
                keep = running.nonzero()[:, 0]
                active, new_tokens, running = active[keep], new_tokens[keep], running[keep]
                model.select(keep)
            logits = model.forward(new_tokens[:, None])
        return tokens.cpu().numpy(), logprobs.cpu().numpy()

    def _completion(self, request: Request, sample: int, ids: np.ndarray, logprobs: np.ndarray) -> Completion:
        finished = bool(ids[-1] in self.options.stop_ids)
        version = self.policy.version
        return self.with_text(Completion(request.group_id, sample, ids, logprobs, finished, version))

    def with_text(self, completion: Completion) -> Completion:
        """The completion, decoded."""
        ids = completion.token_ids[: len(completion.token_ids) - completion.finished]
        return dataclasses.replace(completion, text=self.decode(ids.tolist()))


def _batches(requests: Sequence[Request], max_rows: int) -> Iterator[list[Request]]:
    """Whole groups, at most `max_rows` completions together (a larger group comes alone)."""
    batch, rows = [], 0
    for request in requests:
        if batch and rows + request.n > max_rows:
            yield batch
            batch, rows = [], 0
        batch.append(request)
        rows += request.n
    if batch:
        yield batch


def _left_pad(prompts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """int64 [B, T] with the prompts at the right end, and where each begins, int64 [B]."""
    width = max(len(p) for p in prompts)
    padded = np.zeros((len(prompts), width), np.int64)
    for row, prompt in zip(padded, prompts, strict=True):
        row[width - len(prompt) :] = prompt
    return padded, np.array([width - len(p) for p in prompts])

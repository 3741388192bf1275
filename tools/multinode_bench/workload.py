"""What a GRPO step has to do: how many rollouts, how long, cut into which micro-batches."""

from __future__ import annotations

import dataclasses
import math

from megatron_dump.config import Config


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Tokens; means over a step's rollouts, and the longest response."""

    prompt: float
    response: float
    longest: float


@dataclasses.dataclass(frozen=True)
class Workload:
    """The rollouts of a step."""

    prompts: int
    samples: int  # of each prompt
    lengths: Lengths
    config: Config

    @property
    def rollouts(self) -> int:
        return self.prompts * self.samples

    @property
    def tokens(self) -> float:
        """Of prompts and responses, a prompt with each of its rollouts, as in perf/throughput."""
        return self.rollouts * (self.lengths.prompt + self.lengths.response)

    @property
    def updates(self) -> int:
        return max(1, round(self.rollouts / self.config.model.global_batch_size))

    @property
    def element(self) -> int:
        """Bytes of a weight or an activation."""
        return 2 if self.config.trainer.precision == "bf16" else 4

    def micros(self, replicas: int, forward: bool = False) -> MicroBatches:
        """One update of one replica (of `replicas`), or all of a step's for log-probabilities."""
        model = self.config.model
        rollouts = self.rollouts / (1 if forward else self.updates) / replicas
        packed = model.share_prompts
        row = self.lengths.prompt + (self.lengths.response if model.dynamic_batching.enabled else self.lengths.longest)
        if model.dynamic_batching.enabled:
            budget = model.dynamic_batching.train_mb_tokens
            if forward:
                budget = model.dynamic_batching.logprob_mb_tokens or budget
            alone = self.lengths.prompt / self.samples + self.lengths.response if packed else row
            size = max(1.0, min(rollouts, budget / alone))
        else:
            size = model.micro_batch_size
            if forward:
                size = model.grpo.forward_micro_batch_size or size
            size = min(rollouts, size)
        count = math.ceil(rollouts / size - 1e-9)
        size = rollouts / count
        if packed:
            prompts = max(1.0, size / self.samples) * self.lengths.prompt
            responses = size * self.lengths.response
            seen = prompts * self.lengths.prompt / 2
            seen += responses * (self.lengths.prompt + self.lengths.response / 2)
            return MicroBatches(count, prompts + responses, responses, seen / (prompts + responses))
        return MicroBatches(count, size * row, size * self.lengths.response, row / 2)


@dataclasses.dataclass(frozen=True)
class MicroBatches:
    """`count` alike: tokens that the layers compute, those with a log-probability, tokens that a token sees."""

    count: int
    tokens: float
    sampled: float
    context: float

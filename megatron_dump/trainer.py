"""GRPOTrainer.fit(): the loop. Every rank runs it; torchrun or srun starts them."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from megatron_dump import evaluate, grpo
from megatron_dump.config import GRPOConfig
from megatron_dump.curriculum.curriculum import Curriculum
from megatron_dump.curriculum.sampler import MegatronCurriculumBatchSampler
from megatron_dump.data import PromptDataset
from megatron_dump.distributed import Replica, agree, broadcast_array, fail_together, gather_outcomes
from megatron_dump.monitor import Monitor
from megatron_dump.rollout import Generator, Request
from megatron_dump.scoring import Scorer, local_outcomes, step_metrics
from megatron_dump.types import Completion, Draw, Outcomes, Prompt, TrainBatch


class Actor(Protocol):
    """The policy that is trained."""

    version: int

    def make_batch(self, prompts: Sequence[np.ndarray], completions: Sequence[Completion], advantages: np.ndarray,
                   global_tokens: float) -> TrainBatch: ...  # fmt: skip

    def compute_logprobs(self, batch: TrainBatch, reference: bool = False) -> np.ndarray | None: ...

    def train_step(self, batch: TrainBatch) -> dict[str, float]: ...


class Store(Protocol):
    """Where checkpoints are kept."""

    def latest(self) -> int | None: ...

    def save(self, step: int, state: dict[str, Any]) -> Any: ...

    def state(self, step: int) -> dict[str, Any]: ...

    def load(self, step: int) -> dict[str, Any]: ...


@dataclasses.dataclass
class GRPOTrainer:
    """Ties the parts together; they are built in examples/train_gpt_grpo.py."""

    config: GRPOConfig
    settings: dict[str, Any]  # what must not change over a resume: config.lasting
    groups_per_update: int  # prompts of one optimizer step, all ranks together
    max_length: int  # tokens of a completion at most
    use_reference: bool
    owns_curriculum: bool  # rank 0: draws and learns; the others hold a copy that only knows the sources
    actor: Actor
    generator: Generator
    validator: Generator  # samples from the policy whatever `generator` is
    dataset: PromptDataset
    validation: PromptDataset | None
    scorer: Scorer
    curriculum: Curriculum
    sampler: MegatronCurriculumBatchSampler
    replica: Replica
    checkpoints: Store
    monitor: Monitor
    step: int = 0  # steps done

    def fit(self) -> None:
        """Train up to `trainer.grpo.max_steps`."""
        if self.step == 0 and self.config.run_validation_step_0:
            self.validate()
        while self.step < self.config.max_steps:
            watch = Stopwatch()
            with watch("step"):
                with watch("draw"):
                    draw = self.sampler.next_draw()
                    requests = self.requests(draw)
                with watch("gen"):
                    completions = self.generator.generate(draw.step, requests)
                with watch("reward"), fail_together("reward", device=self.replica.device):
                    scores = self.scorer.score(completions, {r.group_id: r.prompt for r in requests})
                with watch("adv"):
                    advantages = self.advantages(completions, [s.reward for s in scores])
                    local = local_outcomes(
                        draw.step, completions, draw.source_ids[[c.group_id for c in completions]], scores, advantages
                    )
                    outcomes = self.observe(local, completions)
                metrics = self.train(watch, requests, completions, advantages, outcomes)
            self.step += 1
            self.log(watch, metrics, outcomes, requests)
            self.monitor.log_draw(self.step, draw)
            self.monitor.log_samples(self.step, _samples(requests, completions, scores))
            if _due(self.step, self.config.val_check_interval, self.config.max_steps):
                self.validate()
            if _due(self.step, self.config.save_interval, self.config.max_steps):
                self.save()

    def requests(self, draw: Draw) -> list[Request]:
        """This replica's share of the draw."""
        return [
            Request(int(i), self.dataset[int(draw.prompt_ids[i])], int(draw.rollouts[i]))
            for i in self.sampler.share(draw)
        ]

    def advantages(self, completions: Sequence[Completion], rewards: Sequence[float]) -> np.ndarray:
        """float64 [N]; groups never cross ranks, so each rank does its own."""
        groups = torch.tensor([c.group_id for c in completions])
        return grpo.group_advantages(torch.tensor(rewards, dtype=torch.float64), groups).numpy()

    def observe(self, local: Outcomes, completions: Sequence[Completion]) -> Outcomes:
        """Teach rank 0's curriculum with all ranks' outcomes; every rank receives the new weights."""
        samples = np.array([c.sample for c in completions], np.int64)
        outcomes = gather_outcomes(local, samples, self.replica.group, self.replica.device)
        own = None
        with fail_together("curriculum.observe", device=self.replica.device):
            if self.owns_curriculum:
                self.curriculum.observe(outcomes)
                own = self.curriculum.weights
        n_sources = len(self.curriculum.sources)
        weights = broadcast_array(own, (n_sources,), np.float64, device=self.replica.device)
        agree("curriculum weights", hashlib.sha256(weights.tobytes()).hexdigest(), device=self.replica.device)
        return outcomes

    def train(
        self,
        watch: Stopwatch,
        requests: Sequence[Request],
        completions: Sequence[Completion],
        advantages: np.ndarray,
        outcomes: Outcomes,
    ) -> dict[str, float]:
        """One optimizer step for each block of `groups_per_update` prompts; metrics are means over them (or maxima)."""
        prompts = {r.group_id: r.prompt.token_ids for r in requests}
        block_of = np.array([c.group_id // self.groups_per_update for c in completions])
        batches = []
        for block in range(int(outcomes.group_ids.max()) // self.groups_per_update + 1):
            rows = np.flatnonzero(block_of == block)
            tokens = outcomes.lengths[outcomes.group_ids // self.groups_per_update == block].sum()
            mine = [completions[i] for i in rows.tolist()]
            batches.append(
                self.actor.make_batch([prompts[c.group_id] for c in mine], mine, advantages[rows], float(tokens))
            )
        with watch("old_log_prob"):
            if len(batches) > 1:  # with a single update the old policy is the current one
                for batch in batches:
                    batch.old_logprobs = self.actor.compute_logprobs(batch)
        with watch("ref"):
            if self.use_reference:
                for batch in batches:
                    batch.ref_logprobs = self.actor.compute_logprobs(batch, reference=True)
        with watch("update_actor"):
            updates = [self.actor.train_step(batch) for batch in batches]
        return {k: float((np.max if k.endswith("_max") else np.mean)([u[k] for u in updates])) for k in updates[0]}

    def log(self, watch: Stopwatch, metrics: dict[str, float], outcomes: Outcomes, requests: Sequence[Request]) -> None:
        watch.seconds["sync"] = 0.0  # the generator shares the actor's weights
        timing = {f"timing_s/{phase}": seconds for phase, seconds in watch.seconds.items()}
        prompt_tokens = sum(len(r.prompt.token_ids) * r.n for r in requests) * self.replica.size  # shares are alike
        throughput = (outcomes.lengths.sum() + prompt_tokens) / watch.seconds["step"]
        self.monitor.log_step(self.step, {
            **step_metrics(outcomes, self.curriculum.sources, self.max_length),
            **metrics,
            **(self.curriculum.metrics() if self.owns_curriculum else {}),
            **timing,
            "perf/throughput": float(throughput),
            "perf/generated_tokens": float(outcomes.lengths.sum()),
        })  # fmt: skip

    def validate(self) -> None:
        if self.validation is not None:
            n = self.config.val_samples_per_prompt
            result = evaluate.validate(self.validator, self.validation, self.scorer, n, self.replica)
            self.monitor.log_validation(self.step, result.metrics, result.pass_rates)

    def save(self) -> None:
        """A checkpoint of everything that decides how the run goes on."""
        self.checkpoints.save(self.step, {
            "curriculum": self.curriculum.state_dict() if self.owns_curriculum else None,
            "consumed_samples": self.sampler.consumed_samples,
            "settings": self.settings,
        })  # fmt: skip

    def resume(self, allowed: bool = True) -> bool:
        """Continue from the latest checkpoint, if there is one.

        ValueError if the run would silently differ, or if there is one and continuing is not `allowed`.
        """
        latest = self.checkpoints.latest()
        if latest is not None and not allowed:
            raise ValueError(
                f"exp_manager.resume_if_exists=false, but exp_manager.explicit_log_dir holds a checkpoint of "
                f"step {latest}: choose another folder, or set it to true"
            )
        if latest is None:
            self.monitor.start_over()
            return False
        state = self.checkpoints.state(latest)
        _refuse_changes(state["settings"], self.settings)
        self.curriculum.load_state_dict(state["curriculum"])
        agree("curriculum state", self.curriculum.digest(), device=self.replica.device)
        self.checkpoints.load(latest)
        self.sampler.consumed_samples = state["consumed_samples"]
        self.step = latest
        self.monitor.truncate_after(latest)
        return True


class Stopwatch:
    """Seconds by phase: `with watch("gen"): …`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start


def _refuse_changes(saved: dict[str, Any], here: dict[str, Any]) -> None:
    for key in sorted(saved.keys() | here.keys()):
        if saved.get(key) != here.get(key):
            raise ValueError(
                f"{key}: the checkpoint has {saved.get(key)!r}, this run {here.get(key)!r}; set it back, or choose "
                "another exp_manager.explicit_log_dir"
            )


def _due(step: int, interval: int, last: int) -> bool:
    """Every `interval` steps and at the end; never for 0."""
    return interval > 0 and (step % interval == 0 or step == last)


def _samples(
    requests: Sequence[Request], completions: Sequence[Completion], scores: Sequence[Any]
) -> list[dict[str, Any]]:
    """The first completion of the first group of each source in this share."""
    prompts: dict[int, Prompt] = {r.group_id: r.prompt for r in requests}
    first: dict[str, dict[str, Any]] = {}
    for completion, score in zip(completions, scores, strict=True):
        prompt = prompts[completion.group_id]
        first.setdefault(prompt.source, {
            "source": prompt.source, "prompt": prompt.text, "completion": completion.text,
            "reward": score.reward, "correct": score.correct, "reason": score.reason,
        })  # fmt: skip
    return list(first.values())

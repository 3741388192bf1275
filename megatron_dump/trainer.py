"""GRPOTrainer.fit(): the loop. Every rank runs it; torchrun or srun starts them."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_dump import evaluate, events
from megatron_dump.batches import UpdateShare, update_shares
from megatron_dump.collect import Begun, Collector, Rollouts, sample_rows
from megatron_dump.config import GRPOConfig, refuse_changes
from megatron_dump.course import Course
from megatron_dump.curriculum.curriculum import Curriculum
from megatron_dump.data import PromptDataset
from megatron_dump.distributed import Replica, agree, all_gather_array, broadcast_array, fail_together
from megatron_dump.gather import gather_completions
from megatron_dump.kl_reward import KLInReward
from megatron_dump.monitor import Monitor
from megatron_dump.protocols import Actor, Closing, Engines
from megatron_dump.rollout import Generator
from megatron_dump.rollout_metrics import count_loops, rollout_metrics
from megatron_dump.scoring import step_metrics
from megatron_dump.stopping import Outcome
from megatron_dump.stopwatch import Stopwatch
from megatron_dump.types import Outcomes, TrainBatch


@dataclasses.dataclass
class GRPOTrainer:
    """Ties the parts together; they are built in examples/train_gpt_grpo.py."""

    config: GRPOConfig
    settings: dict[str, Any]  # what must not change over a resume: config.lasting
    updates: int  # optimizer steps of a training step
    max_length: int  # tokens of a completion at most
    loss_agg_mode: str
    use_reference: bool
    owns_curriculum: bool  # rank 0: draws and learns; the others hold a copy that only knows the sources
    actor: Actor
    engines: Engines
    collector: Collector
    validator: Generator  # samples from the policy whatever the collector's generator is
    dataset: PromptDataset
    validation: PromptDataset | None
    curriculum: Curriculum
    replica: Replica
    course: Course
    monitor: Monitor
    balance_tokens: bool = False  # an update's rollouts go to data-parallel ranks by their tokens, not in order
    step: int = 0  # steps done
    ahead: collections.deque[Begun] = dataclasses.field(default_factory=collections.deque)  # rounds out, oldest first
    alarms: events.AlarmWatch = dataclasses.field(default_factory=events.AlarmWatch)
    reward_kl: KLInReward | None = None  # None: the KL, if any, is in the loss
    notice: str = ""  # for people, at the start: what generates
    cluster: Closing | None = None  # that engines or reward workers run on

    def fit(self) -> Outcome:
        """Train up to `trainer.grpo.max_steps` (or max_generated_tokens), or until asked to stop."""
        self.monitor.log_events(events.notices(self.step, [self.actor.memory_report(), *filter(None, [self.notice])]))
        self.engines.push(self.actor.version)
        # What a resumed run had drawn and not yet learned from: no prompt is lost, none comes twice.
        self.ahead.extend(self.collector.begin(Stopwatch(), draw) for draw in self.curriculum.outstanding())
        if self.step == 0 and self.config.run_validation_step_0:
            self.validate()
        while self.course.goes_on(self.step, self.state):
            watch = Stopwatch()
            with watch("step"):
                with self.actor.generating():
                    rollouts = self.collect(watch)
                if not self.ahead:
                    self.engines.rest()
                with watch("adv"):
                    self.observe(rollouts.outcomes)
                metrics = self.train(watch, rollouts)
                with watch("sync"):
                    self.engines.push(self.actor.version)
            self.step += 1
            self.log(watch, metrics, rollouts)
            if self.course.due(self.step, self.config.val_check_interval):
                self.validate()
            self.course.step_done(self.step, self.state)
        return self.course.end(self.step)

    def close(self) -> None:
        """End every process and output of the run. No collective."""
        for part in (self.monitor, self.collector.scorer, self.engines, *filter(None, [self.cluster])):
            part.close()

    def collect(self, watch: Stopwatch) -> Rollouts:
        """Draw until `max_staleness` steps are out besides this one; this one's rollouts, scored.

        Groups that the filter rejects are replaced.
        """
        tokens, sampler = 0, self.collector.sampler
        while sampler.step < min(self.step + 1 + self.config.max_staleness, self.config.max_steps):
            with watch("draw"):
                draw = sampler.next_draw()
            begun = self.collector.begin(watch, draw)
            if draw.train:
                self.ahead.append(begun)
                continue
            rollouts = self.collector.finish(watch, begun)
            self.observe(rollouts.outcomes)  # pre-rollouts teach the curriculum alone
            self.monitor.log_events(events.dropped(self.step + 1, rollouts.outcomes, self.curriculum.sources))
            tokens += int(rollouts.outcomes.lengths.sum())
        rollouts = self.collector.finish(watch, self.ahead.popleft())
        return self.collector.refill(watch, dataclasses.replace(rollouts, tokens_before=tokens))

    def observe(self, outcomes: Outcomes) -> None:
        """Teach rank 0's curriculum with all ranks' outcomes; every rank receives the new weights."""
        own = None
        with fail_together("curriculum.observe", device=self.replica.device):
            if self.owns_curriculum:
                self.curriculum.observe(outcomes)
                own = self.curriculum.weights
        n_sources = len(self.curriculum.sources)
        weights = broadcast_array(own, (n_sources,), np.float64, device=self.replica.device)
        agree("curriculum weights", hashlib.sha256(weights.tobytes()).hexdigest(), device=self.replica.device)

    def train(self, watch: Stopwatch, rollouts: Rollouts) -> dict[str, float]:
        """The optimizer steps of a training step; metrics are means over them (or maxima). None of it: no metrics."""
        shares = self.shares(rollouts)
        batches, metrics = self.batches(rollouts, shares), {}
        with watch("old_log_prob"):
            if len(batches) > 1 or self.reward_kl:  # with a single update the old policy is the current one
                for batch in batches:
                    batch.old_logprobs = self.actor.compute_logprobs(batch)
        with watch("ref"):
            if self.use_reference:
                for batch in batches:
                    batch.ref_logprobs = self.actor.compute_logprobs(batch, reference=True)
        with watch("adv"):
            if self.reward_kl and batches:
                metrics = self.reward_kl.apply(rollouts.outcomes, shares, batches, self.replica)
        with watch("update_actor"):
            updates = [self.actor.train_step(batch) for batch in batches]
        keys = updates[0] if updates else ()
        return metrics | {k: float((np.max if k.endswith("_max") else np.mean)([u[k] for u in updates])) for k in keys}

    def shares(self, rollouts: Rollouts) -> list[UpdateShare]:
        """What this rank trains on, update by update."""
        outcomes, prompt_lengths = rollouts.outcomes, None
        if self.balance_tokens:
            prompt_lengths = np.array([len(self.dataset[int(i)].token_ids) for i in outcomes.prompt_ids])
        return update_shares(
            outcomes,
            rollouts.rejected,
            self.updates,
            self.replica.size,
            self.replica.rank,
            self.loss_agg_mode,
            self.max_length,
            prompt_lengths,
        )

    def batches(self, rollouts: Rollouts, shares: Sequence[UpdateShare]) -> list[TrainBatch]:
        """Those, padded: a collective where rollouts do not train where they were generated."""
        outcomes, replica = rollouts.outcomes, self.replica
        completions = rollouts.completions
        if len(rollouts.rejected) or (self.balance_tokens and replica.size > 1):  # dealt out anew
            completions = gather_completions(completions, replica.group, replica.device)
        found = {(c.group_id, c.sample): c for c in completions}
        batches = []
        for share in shares:
            keys = zip(outcomes.group_ids[share.rows].tolist(), outcomes.samples[share.rows].tolist(), strict=True)
            prompts = [self.dataset[int(i)].token_ids for i in outcomes.prompt_ids[share.rows]]
            mine = [found[key] for key in keys]
            batches.append(
                self.actor.make_batch(prompts, mine, share.advantages, share.global_tokens, share.weights, share.n_rows)
            )
        return batches

    def log(self, watch: Stopwatch, metrics: dict[str, float], rollouts: Rollouts) -> None:
        outcomes, sources, faults = rollouts.outcomes, self.curriculum.sources, self.collector.scorer.take_faults()
        counts = count_loops(rollouts.completions)
        loops = all_gather_array(counts, self.replica.group, self.replica.device).sum(axis=0)
        prompt_tokens = sum(len(self.dataset[int(i)].token_ids) for i in outcomes.prompt_ids)
        generated_tokens = int(outcomes.lengths.sum()) + rollouts.tokens_before
        self.course.generated_tokens += generated_tokens
        metrics = {
            **step_metrics(outcomes, sources, self.max_length),
            **metrics,
            **{
                f"train/{s}/reward_{kind}": float(n)
                for s, counts in faults.items()
                for kind, n in zip(("timeouts", "crashes"), counts, strict=True)
            },
            **(self.curriculum.metrics() if self.owns_curriculum else {}),
            **self.actor.memory_usage(),
            **{f"timing_s/{phase}": seconds for phase, seconds in watch.seconds.items()},
            **rollout_metrics(loops, float(outcomes.lengths.sum()), watch.seconds["gen"], self.replica.world_size),
            "perf/throughput": float((outcomes.lengths.sum() + prompt_tokens) / watch.seconds["step"]),
            "perf/generated_tokens": float(generated_tokens),
        }
        self.monitor.log_step(self.step, metrics)
        self.course.measured(self.step, metrics)
        self.monitor.log_samples(self.step, sample_rows(rollouts))
        asked = self.config.num_prompts_per_grpo_step * self.config.samples_per_prompt
        self.monitor.log_events(
            [
                *events.dropped(self.step, outcomes, sources),
                *events.reward_faults(self.step, faults),
                *events.short_batch(self.step, outcomes, sources, asked, rollouts.rejected, rollouts.refills),
                *self.alarms.changes(self.step, self.curriculum.alarms() if self.owns_curriculum else {}),
            ]
        )

    def validate(self) -> None:
        if self.validation is not None:
            n = self.config.val_samples_per_prompt
            with self.actor.generating():
                result = evaluate.validate(self.validator, self.validation, self.collector.scorer, n, self.replica)
            self.monitor.log_validation(self.step, result.metrics, result.pass_rates)
            self.course.measured(self.step, evaluate.summary(result.metrics), validation=True)

    def state(self) -> dict[str, Any]:
        """What decides how the run goes on, besides the actor's: for a checkpoint."""
        return {
            "curriculum": self.curriculum.state_dict() if self.owns_curriculum else None,
            "settings": self.settings,
        }

    def resume(self, allowed: bool = True) -> bool:
        """Continue from the latest checkpoint, if there is one.

        ValueError if the run would silently differ, or if there is one and continuing is not `allowed`.
        """
        checkpoints = self.course.checkpoints
        latest = checkpoints.latest()
        if latest is not None and not allowed:
            raise ValueError(
                f"exp_manager.resume_if_exists=false, but exp_manager.explicit_log_dir holds a checkpoint of "
                f"step {latest}: choose another folder, or set it to true"
            )
        if latest is None:
            self.monitor.start_over()
            if self.owns_curriculum:
                self.curriculum.on_event = self.monitor.log_curriculum
                self.monitor.log_curriculum({"step": 0, "event": "header", **self.curriculum.header()})
            return False
        state = checkpoints.state(latest)
        may_change = self.config.curriculum.resume_changed == "allow"
        notes = refuse_changes(state["settings"], self.settings, may_change)
        notes += self.curriculum.load_state_dict(state["curriculum"], allow_changes=may_change)
        agree("curriculum state", self.curriculum.digest(), device=self.replica.device)
        checkpoints.load(latest)
        self.collector.sampler.consumed_samples = self.curriculum.step * self.config.num_prompts_per_grpo_step
        self.step = self.course.resume(latest, state)
        self.monitor.truncate_after(latest)
        self.monitor.log_events(events.notices(latest, notes))
        self.alarms.changes(latest, self.curriculum.alarms())  # those that stand were told before
        if self.owns_curriculum:
            self.curriculum.on_event = self.monitor.log_curriculum
            if notes:
                changed = {"curriculum": self.curriculum.state_dict(), **self.curriculum.header()}
                self.monitor.log_curriculum({"step": latest + 1, "event": "changed", **changed})
        return True

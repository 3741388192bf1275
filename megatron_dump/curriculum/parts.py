"""What a curriculum is made of: policies, estimators and guards, built from its configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from megatron_dump.curriculum import state as states
from megatron_dump.curriculum.budget import Budget, make_budget
from megatron_dump.curriculum.estimators import PassRateEstimator
from megatron_dump.curriculum.filters import Filter, make_filter
from megatron_dump.curriculum.guards import Alarm, Audit
from megatron_dump.curriculum.pass_rates import PromptPassRates
from megatron_dump.curriculum.promises import check_rollouts, check_rows
from megatron_dump.curriculum.prompts import PROMPTS, PromptPolicy, make_prompt_policy
from megatron_dump.curriculum.rows import SourceRows
from megatron_dump.curriculum.sources import SourcePolicy, SourceSetting, make_source_policy
from megatron_dump.types import Outcomes


@dataclasses.dataclass(frozen=True)
class Parts:
    """The parts of one curriculum; their own states change, which parts they are does not."""

    source_policy: SourcePolicy
    prompt_policy: PromptPolicy
    budget: Budget
    filter: Filter
    audit: Audit
    alarm: Alarm
    source_pass_rate: PassRateEstimator
    pass_rates: PromptPassRates | None  # None: neither the prompt policy nor the budget asks for them
    of_row: np.ndarray  # int32 [R], every row's source

    def choose(
        self, step: int, first_group: int, slots: np.ndarray, exclude: np.ndarray, total: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Sources of a round's slots, int64 [P] -> rows and group sizes, int64 [P] each; the sizes sum to `total`.

        exclude: rows that earlier rounds of the step train on.
        """
        prompt_ids = self.prompt_policy.draw(step, first_group, slots, exclude)
        check_rows(self.prompt_policy, prompt_ids, slots, self.of_row)
        rates = self.pass_rates.mean(prompt_ids) if self.pass_rates and self.budget.uses_pass_rates else None
        rollouts = self.budget.allot(rates, total)
        check_rollouts(self.budget, rollouts, len(slots), total)
        return prompt_ids, rollouts

    def observe(self, outcomes: Outcomes) -> None:
        """Whole groups of one step; see Curriculum.observe."""
        finite = np.isfinite(outcomes.rewards)
        self.source_policy.observe(outcomes)
        self.source_pass_rate.observe(outcomes.source_ids, outcomes.correct, finite, outcomes.step)
        if self.pass_rates is not None:
            self.pass_rates.observe(outcomes)
        self.alarm.observe(outcomes)

    def metrics(self) -> dict[str, np.ndarray]:
        """Name -> float64 [K], after what has been observed."""
        learned = self.source_policy.metrics()
        learned.pop("n_dropped", None)  # over the whole run; the log has each step's own
        alarm = self.alarm.raised().astype(np.float64)
        return {**learned, "pass_rate": self.source_pass_rate.mean(), "alarm": alarm}

    def stateful(self) -> dict[str, Any]:
        """Name -> what has a state of arrays."""
        parts = {
            "source_policy": self.source_policy,
            "source_pass_rate": self.source_pass_rate,
            "audit": self.audit,
            "alarm": self.alarm,
            "prompt_policy": self.prompt_policy,
        }
        return parts if self.pass_rates is None else {**parts, "pass_rates": self.pass_rates}

    def state_dict(self) -> dict[str, Any]:
        """JSON-serialisable; every float survives JSON exactly."""
        return {name: states.pack(part.state_dict()) for name, part in self.stateful().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, part in self.stateful().items():
            part.load_state_dict(states.unpack(state[name]))


def make_parts(
    config: Mapping[str, Any],
    rows: SourceRows,
    prompts_per_step: int,
    samples_per_prompt: int,
    seed: int,
    max_steps: int | None,
) -> Parts:
    """The parts that `config` (of blocks.describe_blocks) names. ValueError for options that cannot be used."""
    n_sources = len(rows.names)
    setting = SourceSetting(tuple(rows.names), tuple(rows.sizes.tolist()), max_steps)
    source_policy = make_source_policy(config["sources"], setting)
    budget = make_budget(config["budget"], samples_per_prompt)
    needs_pass_rates = PROMPTS.resolve(config["prompts"])[0].uses_pass_rates or budget.uses_pass_rates
    pass_rates = PromptPassRates(rows, **config["pass_rates"])  # also where unused: checks its options
    pass_rates = pass_rates if needs_pass_rates else None
    return Parts(
        source_policy=source_policy,
        prompt_policy=make_prompt_policy(config["prompts"], rows, seed, pass_rates),
        budget=budget,
        filter=make_filter(config["filter"]),
        audit=Audit(n_sources, prompts_per_step, **config["audit"]),
        alarm=Alarm(n_sources, **config["alarm"]),
        source_pass_rate=PassRateEstimator(n_sources),
        pass_rates=pass_rates,
        of_row=rows.of_row,
    )

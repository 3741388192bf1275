"""The curriculum: sources x prompts x budget behind draw, observe, state_dict and metrics."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megatron_dump.curriculum.budget import BUDGETS, make_budget
from megatron_dump.curriculum.estimators import PassRateEstimator
from megatron_dump.curriculum.prompts import PROMPT_POLICIES, make_prompt_policy
from megatron_dump.curriculum.registry import ROOT, describe
from megatron_dump.curriculum.sources import SOURCE_POLICIES, make_source_policy
from megatron_dump.types import Draw, Outcomes

STATE_VERSION = 1


class Curriculum:
    """Draws each step's prompts and learns from their outcomes: draw(0), observe, draw(1), observe, ...

    One process owns it (rank 0) and the draws are broadcast. A draw is a function of (seed, step, outcomes observed):
    there is no generator state, and nothing depends on how many ranks train. Only `observe` teaches it, and only with
    the outcomes of the draw that is out: validation has no way in.
    """

    def __init__(
        self,
        source_names_of_rows: Sequence[str],
        prompts_per_step: int,
        samples_per_prompt: int,
        seed: int,
        config: Mapping[str, Any],
        fingerprint: str,
    ):
        """source_names_of_rows: the source of every row of the data set; fingerprint: identifies its contents;
        config: `trainer.grpo.curriculum`, with the blocks sources, prompts and budget, each with a `name`.

        Raises ValueError for an empty data set, counts below 1, and unknown names or options.
        """
        _require_positive("num_prompts_per_grpo_step", prompts_per_step)
        _require_positive("samples_per_prompt", samples_per_prompt)
        if len(source_names_of_rows) == 0:
            raise ValueError("the data set has no rows: there is nothing to draw from")
        self.sources: list[str] = sorted(set(source_names_of_rows))  # sorted: a set's order depends on the hash seed
        self.prompts_per_step, self.seed, self.n_rows = prompts_per_step, seed, len(source_names_of_rows)
        blocks = {section: _block(config, section) for section in ("sources", "prompts", "budget")}
        names = np.asarray(source_names_of_rows)
        rows = [np.flatnonzero(names == source) for source in self.sources]
        self._source_policy = make_source_policy(blocks["sources"], [len(r) for r in rows])
        self._prompt_policy = make_prompt_policy(blocks["prompts"], self.sources, rows, seed)
        self._budget = make_budget(blocks["budget"], samples_per_prompt)
        self._pass_rate = PassRateEstimator(len(self.sources))
        self._identity = {
            "version": STATE_VERSION,
            "sources": self.sources,
            "fingerprint": fingerprint,
            "seed": seed,
            "prompts_per_step": prompts_per_step,
            "source_policy": describe("sources", SOURCE_POLICIES, blocks["sources"]),
            "prompt_policy": describe("prompts", PROMPT_POLICIES, blocks["prompts"]),
            "budget": describe("budget", BUDGETS, blocks["budget"]),
        }
        self.step = 0  # the next step to draw
        self._out: Draw | None = None  # drawn, its outcomes not yet observed
        self._last: dict[str, float] = {}  # metrics of the last observed step

    @property
    def weights(self) -> np.ndarray:
        """float64 [K]: the source distribution the next draw will use, given what has been observed so far."""
        return self._source_policy.weights(self.step)

    def draw(self, step: int) -> Draw:
        """The prompts of `step`; RuntimeError out of order, or before the outcomes of the step before were observed."""
        if self._out is not None:
            raise RuntimeError(
                f"draw({step}) before the outcomes of step {self._out.step} were observed: its weights would be stale"
            )
        if step != self.step:
            raise RuntimeError(f"draw({step}) out of order: the next step of this curriculum is {self.step}")
        weights = self.weights
        consumed = step * self.prompts_per_step
        source_ids = self._source_policy.slots(step, consumed, self.prompts_per_step, self.seed)
        prompt_ids = self._prompt_policy.draw(source_ids)
        self._out = Draw(step, prompt_ids, source_ids, self._budget.allot(prompt_ids), weights)
        self.step = step + 1
        return self._out

    def observe(self, outcomes: Outcomes) -> None:
        """Learn from the rollouts of the draw that is out; every rollout, those of filtered groups too.

        Raises RuntimeError for another step's outcomes (or none being out), ValueError if they do not fit the draw.
        """
        if self._out is None or outcomes.step != self._out.step:
            expected = "no draw is out" if self._out is None else f"the draw that is out is of step {self._out.step}"
            raise RuntimeError(f"observe got outcomes of step {outcomes.step}, but {expected}")
        groups = outcomes.group_ids
        if groups.size and (groups.min() < 0 or groups.max() >= self.prompts_per_step):
            raise ValueError(f"group_ids of step {outcomes.step} are not all in 0..{self.prompts_per_step - 1}")
        if not np.array_equal(outcomes.source_ids, self._out.source_ids[groups]):
            raise ValueError(f"source_ids of the outcomes of step {outcomes.step} are not those of its draw")
        self._source_policy.observe(outcomes)
        self._pass_rate.observe(outcomes.source_ids, outcomes.correct)
        self._last = self._step_metrics(self._out, outcomes)
        self._out = None

    def _step_metrics(self, draw: Draw, outcomes: Outcomes) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for k, source in enumerate(self.sources):
            groups = [outcomes.rewards[outcomes.group_ids == g] for g in np.flatnonzero(draw.source_ids == k)]
            groups = [rewards for rewards in groups if rewards.size]
            metrics[f"curriculum/{source}/weight"] = float(draw.weights[k])
            metrics[f"curriculum/{source}/n_prompts"] = float(np.sum(draw.source_ids == k))
            metrics[f"curriculum/{source}/quota"] = float(draw.rollouts[draw.source_ids == k].sum())
            metrics[f"curriculum/{source}/n_rollouts"] = float(np.sum(outcomes.source_ids == k))
            if groups:  # no value where nothing was drawn; a group with a NaN reward is not a constant one
                constant = [bool(np.all(rewards == rewards[0])) for rewards in groups]
                metrics[f"curriculum/{source}/frac_zero_std"] = float(np.mean(constant))
        return metrics

    def metrics(self) -> dict[str, float]:
        """`curriculum/<source>/<name>`, for the log of the step observed last.

        weight                             of that step: the one its draw was made WITH
        n_prompts, quota, n_rollouts       of that step: prompts drawn, rollouts allotted, rollouts observed
        frac_zero_std                      of that step: share of groups whose rewards are all alike
        pass_rate                                     posterior mean after it
        ucb, mean_abs_adv, bonus, n_dropped           after it, of policies that have them: what makes the next weights
        """
        metrics = dict(self._last)
        per_source = {"pass_rate": self._pass_rate.mean(), **self._source_policy.metrics()}
        for name, values in per_source.items():
            metrics.update({f"curriculum/{s}/{name}": float(v) for s, v in zip(self.sources, values, strict=True)})
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """JSON-serialisable; every float survives JSON exactly. RuntimeError between a draw and its outcomes."""
        if self._out is not None:
            raise RuntimeError(f"state_dict between draw and observe of step {self._out.step} would lose its outcomes")
        return {
            **self._identity,
            "step": self.step,
            "source_state": self._source_policy.state_dict(),
            "prompt_state": self._prompt_policy.state_dict(),
            "pass_rate_state": self._pass_rate.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue a run. ValueError if it would differ from the saved one: other sources, data, seed or policies."""
        for key, here in self._identity.items():
            if state.get(key) != here:
                raise ValueError(
                    f"curriculum {key} differs: the checkpoint has {state.get(key)!r}, this run {here!r}; set it "
                    "back, or choose another exp_manager.explicit_log_dir"
                )
        self.step, self._out, self._last = int(state["step"]), None, {}
        self._source_policy.load_state_dict(state["source_state"])
        self._prompt_policy.load_state_dict(state["prompt_state"])
        self._pass_rate.load_state_dict(state["pass_rate_state"])

    def digest(self) -> str:
        """SHA-256 (hex) of the state: equal digests mean equal draws from here on."""
        return hashlib.sha256(json.dumps(self.state_dict(), sort_keys=True).encode()).hexdigest()


def _block(config: Mapping[str, Any], section: str) -> Mapping[str, Any]:
    block = config.get(section)
    if not isinstance(block, Mapping) or "name" not in block:
        raise ValueError(f"{ROOT}.{section}: {block!r} must be a block with a name, as in {{name: ...}}")
    return block


def _require_positive(key: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"trainer.grpo.{key}: {value!r} must be at least 1")

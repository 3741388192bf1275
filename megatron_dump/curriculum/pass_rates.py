"""What the curriculum believes about every single prompt: how often the policy solves it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from megatron_dump.curriculum.registry import ROOT, check_number
from megatron_dump.curriculum.rows import SourceRows
from megatron_dump.types import Outcomes

_NEVER = np.iinfo(np.int64).min
_REMEMBERED = 64  # calls whose changed rows `changes` can still name


class PromptPassRates:
    """Beta posterior of each prompt's pass rate, over R rows of K sources.

    A step's evidence: alpha <- discount * alpha + (1 - discount) * alpha0 + successes, beta likewise with failures
    (MoPPS, arXiv 2507.04632, with its lambda = `discount`). discount = 1 with the flat prior is CurES's (arXiv
    2510.01037, Eq. 22-24). The prior Beta(alpha0, beta0) is worth `prior_strength` rollouts; its mean is

    source  the source's own posterior mean (a discounted Beta posterior over all its rollouts, from Beta(1, 1)), as it
            was before the call: no rollout counts twice in one update. Rows never observed follow it from step to step.
    flat    1/2; with strength 2 it is the uniform distribution

    Evidence is discounted once per step that brings any, however many calls deliver it; groups of one row add up.
    Outcomes of age a count discount**a, and those of a step before the row's latest come too late to discount it.
    Rollouts without a finite reward are not evidence.
    """

    def __init__(self, rows: SourceRows, *, discount: float = 0.5, prior: str = "source", prior_strength: float = 2.0):
        check_number("pass_rates.discount", discount, 0, 1)
        check_number("pass_rates.prior_strength", prior_strength, 1e-3)
        if prior not in ("source", "flat"):
            raise ValueError(f"{ROOT}.pass_rates.prior: {prior!r} is unknown; known: flat, source")
        self._discount, self._from_source, self._strength = discount, prior == "source", prior_strength
        self._of_row = rows.of_row
        self.visited = np.zeros(len(rows), bool)  # [R]: has evidence of its own
        self._counts = np.zeros((len(rows), 2))  # float64 [R, 2]: alpha, beta; meaningful where visited
        self._steps = np.full(len(rows), _NEVER)  # int64 [R]: the latest step with evidence
        self._source_counts = np.ones((len(rows.names), 2))  # float64 [K, 2]
        self._source_steps = np.full(len(rows.names), _NEVER)
        self._revision, self._log = 0, []  # `_log`: the rows changed by the latest calls, the newest last

    def observe(self, outcomes: Outcomes) -> None:
        """Learn from whole groups of one step; any part of it, in any order."""
        used = np.isfinite(outcomes.rewards)
        runs, successes, failures = _sum_runs(
            outcomes.prompt_ids[used], outcomes.correct[used], self._discount ** outcomes.ages[used].astype(np.float64)
        )
        if runs.size == 0:
            return
        rows, group = np.unique(runs, return_inverse=True)
        evidence = np.stack([np.bincount(group, successes), np.bincount(group, failures)], axis=1)
        sources = self._of_row[rows]
        prior = self._prior()[sources]
        old = np.where(self.visited[rows, None], self._counts[rows], prior)
        later = outcomes.step > self._steps[rows]
        self._counts[rows] = self._decayed(old, prior, later) + evidence
        self._steps[rows[later]] = outcomes.step
        self.visited[rows] = True
        self._observe_sources(sources, evidence, outcomes.step)
        self._note(rows)

    def _observe_sources(self, sources: np.ndarray, evidence: np.ndarray, step: int) -> None:
        n_sources = len(self._source_counts)
        added = np.stack([np.bincount(sources, evidence[:, i], n_sources) for i in range(2)], axis=1)
        later = (np.bincount(sources, minlength=n_sources) > 0) & (step > self._source_steps)
        self._source_counts = self._decayed(self._source_counts, np.ones(2), later) + added
        self._source_steps[later] = step

    def _decayed(self, counts: np.ndarray, prior: np.ndarray, where: np.ndarray) -> np.ndarray:
        return np.where(where[:, None], self._discount * counts + (1.0 - self._discount) * prior, counts)

    def source_mean(self) -> np.ndarray:
        """float64 [K]: posterior mean of each source's pass rate, in (0, 1)."""
        return self._source_counts[:, 0] / self._source_counts.sum(axis=1)

    def prior_mean(self) -> np.ndarray:
        """float64 [K]: what is believed of a source's rows that were never observed."""
        return self.source_mean() if self._from_source else np.full(len(self._source_counts), 0.5)

    def _prior(self) -> np.ndarray:
        """float64 [K, 2]: alpha0, beta0."""
        mean = self.prior_mean()
        return self._strength * np.stack([mean, 1.0 - mean], axis=1)

    def alpha_beta(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int64 [n] rows -> float64 [n], float64 [n]: their posteriors' parameters."""
        counts = self._prior().take(self._of_row.take(rows), axis=0)
        own = np.flatnonzero(self.visited.take(rows))
        counts[own] = self._counts.take(rows[own], axis=0)
        return counts[:, 0], counts[:, 1]

    def mean(self, rows: np.ndarray) -> np.ndarray:
        """int64 [n] rows -> float64 [n]: their posterior means (CurES, Eq. 24), in (0, 1)."""
        alpha, beta = self.alpha_beta(rows)
        return alpha / (alpha + beta)

    def reset(self) -> None:
        """Forget what is known of single prompts, as CurES does at each iteration; the sources' means stay."""
        rows = np.flatnonzero(self.visited)
        self.visited[rows], self._steps[rows], self._counts[rows] = False, _NEVER, 0.0
        self._note(rows)

    def changes(self, since: int) -> tuple[np.ndarray | None, int]:
        """The rows (int64) whose own evidence has changed since revision `since`, and the revision of now.

        None instead of rows: any may have. Start with since = -1. Priors change besides, with `prior_mean`.
        """
        missed = self._revision - since
        if since < 0 or missed > len(self._log):
            return None, self._revision
        return np.concatenate([np.empty(0, np.int64), *self._log[len(self._log) - missed :]]), self._revision

    def _note(self, rows: np.ndarray) -> None:
        self._revision += 1
        self._log = [*self._log[-_REMEMBERED + 1 :], rows]

    def state_dict(self) -> dict[str, np.ndarray]:
        """Sparse: V visited rows, with their counts [V, 2] and steps [V]; and the sources' [K, 2], [K]."""
        rows = np.flatnonzero(self.visited)
        return {
            "rows": rows,
            "counts": self._counts[rows],
            "steps": self._steps[rows],
            "source_counts": self._source_counts.copy(),
            "source_steps": self._source_steps.copy(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict` (or the lists it becomes in JSON), alike to the last bit."""
        rows = np.asarray(state["rows"], np.int64)
        self.visited[:], self._steps[:], self._counts[:] = False, _NEVER, 0.0
        self.visited[rows], self._steps[rows] = True, np.asarray(state["steps"], np.int64)
        self._counts[rows] = np.asarray(state["counts"], np.float64).reshape(-1, 2)
        self._source_counts = np.array(state["source_counts"], np.float64)
        self._source_steps = np.array(state["source_steps"], np.int64)
        self._revision, self._log = self._revision + 1, []


def _sum_runs(rows: np.ndarray, correct: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rollouts [N] -> one entry per run of equal rows (a group's rollouts come together): row, successes, failures."""
    starts = np.flatnonzero(np.diff(rows, prepend=-1))
    if starts.size == 0:
        return rows, weights, weights
    successes = np.add.reduceat(np.where(correct, weights, 0.0), starts)
    failures = np.add.reduceat(np.where(correct, 0.0, weights), starts)
    return rows[starts], successes, failures

"""Two guards of a learnability bandit: it must keep looking, and not mistake a broken verifier for a hard task."""

from __future__ import annotations

import numpy as np

from megatron_dump.curriculum import streams
from megatron_dump.curriculum.registry import check_number
from megatron_dump.curriculum.rows import ranks_within
from megatron_dump.types import Outcomes

_ALMOST_NONE = 0.05  # share of right answers below which a source counts as having none


class Audit:
    """At least `prompts` prompts of every source in every window of `every` steps (0: no audit).

    Windows are the steps [i * every, (i + 1) * every). What the policy's own draws leave missing is spread evenly over
    the rest of the window, in slots that the policy had given to sources which have their minimum already.
    """

    def __init__(self, n_sources: int, prompts_per_step: int, *, every: int = 0, prompts: int = 1):
        """ValueError for a minimum that a window's slots cannot hold."""
        check_number("audit.every", every, 0, whole=True)
        check_number("audit.prompts", prompts, 1, whole=True)
        if every and n_sources * prompts > every * prompts_per_step:
            raise ValueError(
                f"trainer.grpo.curriculum.audit.every: {every} steps of {prompts_per_step} prompts cannot hold "
                f"{prompts} of each of {n_sources} sources; set it to {-(-n_sources * prompts // prompts_per_step)} "
                "or more"
            )
        self._every, self._prompts = every, prompts
        self._seen = np.zeros(n_sources, np.int64)  # slots in this window

    def apply(self, step: int, source_ids: np.ndarray, seed: int) -> np.ndarray:
        """int64 [P] sources of the slots of `step` -> the same with some slots given to neglected sources."""
        if not self._every:
            return source_ids
        position = step % self._every
        if position == 0:
            self._seen[:] = 0
        n_sources = len(self._seen)
        need = np.maximum(self._prompts - self._seen, 0)  # before this step
        counts = np.bincount(source_ids, minlength=n_sources)
        missing = np.maximum(need - counts, 0)
        n_forced = -(-int(missing.sum()) // (self._every - position))
        if n_forced:
            spare = _beyond(source_ids, need, seed, step)[:n_forced]
            wanted = np.repeat(np.arange(n_sources), missing)
            wanted = wanted[streams.permutation(len(wanted), seed, "audit", step)]
            source_ids = source_ids.copy()
            source_ids[spare] = wanted[: len(spare)]
        self._seen += np.bincount(source_ids, minlength=n_sources)
        return source_ids

    def state_dict(self) -> dict[str, np.ndarray]:
        return {"seen": self._seen.copy()}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        self._seen = state["seen"].astype(np.int64)


def _beyond(source_ids: np.ndarray, need: np.ndarray, seed: int, step: int) -> np.ndarray:
    """int64: slots beyond the first `need` [K] of their source, in random order."""
    order = streams.permutation(len(source_ids), seed, "audit slots", step)
    shuffled = source_ids[order]
    return order[ranks_within(shuffled) >= need[shuffled]]


class Alarm:
    """Tells "too hard" from "broken": hardly a right answer, and most answers not even readable.

    A source that scores 0 looks as dull to a bandit as one that is solved, and is starved. What counts are about the
    last `after` rollouts of a source (older ones fade out), once there are so many: fewer than 5 % right, and more than
    the share `format_failure` unreadable.
    """

    def __init__(self, n_sources: int, *, format_failure: float = 0.5, after: int = 64):
        check_number("alarm.format_failure", format_failure, 0, 1)
        check_number("alarm.after", after, 1, whole=True)
        self._threshold, self._after = format_failure, after
        self._counts = np.zeros((n_sources, 4))  # float64: rollouts, right, unreadable, cut at the limit; faded

    def observe(self, outcomes: Outcomes) -> None:
        n_sources = len(self._counts)
        unreadable = ~outcomes.well_formed | ~np.isfinite(outcomes.rewards)
        every = np.ones(len(unreadable), bool)
        columns = (every, outcomes.correct & ~unreadable, unreadable, unreadable & ~outcomes.finished)
        new = [np.bincount(outcomes.source_ids[column], minlength=n_sources) for column in columns]
        self._counts += np.stack(new, axis=1)
        self._counts *= np.minimum(1.0, self._after / np.maximum(self._counts[:, :1], 1.0))

    def raised(self) -> np.ndarray:
        """bool [K]."""
        n, right, unreadable, _ = self._counts.T
        return (n > self._after - 0.5) & (right < _ALMOST_NONE * n) & (unreadable > self._threshold * n)

    def message(self, source: int) -> str:
        """What is wrong, and where to look."""
        n, right, unreadable, cut = self._counts[source].tolist()
        where = "verifier or prompt format broken?"
        if 2 * cut > unreadable:
            where = "model.grpo.length_params.max_length too small?"
        shares = f"{right / n:.0%} right, {unreadable / n:.0%} unreadable ({cut / n:.0%} cut at the limit)"
        return f"of about the last {n:.0f} rollouts {shares}: {where}"

    def state_dict(self) -> dict[str, np.ndarray]:
        return {"counts": self._counts.copy()}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        self._counts = state["counts"].astype(np.float64)

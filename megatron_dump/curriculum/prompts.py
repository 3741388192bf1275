"""Which prompts inside the chosen source: the protocol, the policies by name, and the one that needs no learning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from megatron_dump.curriculum.cures import Cures
from megatron_dump.curriculum.pass_rates import PromptPassRates
from megatron_dump.curriculum.passes import Passes
from megatron_dump.curriculum.registry import Named
from megatron_dump.curriculum.rows import SourceRows
from megatron_dump.curriculum.thompson import Thompson


class PromptPolicy(Protocol):
    """Turns the sources of a round's slots into rows of the data set. P slots.

    Made as Policy(rows, seed, pass_rates, **options). A draw is a function of the seed, of what was drawn and of what
    was observed; which rows of a source are drawn does not depend on the other sources.
    """

    uses_pass_rates: bool  # of the class: whether it must be given pass rates, which the caller keeps up to date

    def draw(self, step: int, first_group: int, source_ids: np.ndarray, exclude: np.ndarray) -> np.ndarray:
        """int64 [P] sources of the slots -> int64 [P] rows. Advances the state.

        exclude: int64, the rows that earlier rounds of this step drew to be trained on (not its pre-rollouts). They do
        not come again unless the source has no others left.
        """
        ...

    def available(self, step: int) -> np.ndarray:
        """int64 [K]: how many different rows of each source there are to draw from at `step`."""
        ...

    def pre_rollouts(self, step: int) -> tuple[np.ndarray, int] | None:
        """Rows (int64) to be rolled out n times each before the training round of `step`, and n; None: none (any more).

        The first call for a set of pre-rollouts may forget what was known of prompts; further calls, also after a
        resume, return the same until `prepared` is called.
        """
        ...

    def prepared(self, step: int) -> None:
        """The outcomes of `pre_rollouts(step)` have been observed; `draw` comes next."""
        ...

    def state_dict(self) -> dict[str, np.ndarray]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict` (or the lists it becomes in JSON), alike to the last bit."""
        ...


class Epoch:
    """Every row of a source once per epoch, in an order of its own (passes.Passes), whatever was learned."""

    uses_pass_rates = False

    def __init__(self, rows: SourceRows, seed: int, pass_rates: PromptPassRates | None = None):
        self._passes, self._sizes = Passes(rows, seed), rows.sizes
        self._step = -1  # of the latest draw

    def draw(self, step: int, first_group: int, source_ids: np.ndarray, exclude: np.ndarray) -> np.ndarray:
        """As PromptPolicy.draw. A row of `exclude` that comes up is skipped: its turn in this epoch is over.

        Passes keep the rounds of a step apart by themselves, unless another step was drawn between them.
        """
        continued, self._step = step == self._step, step
        rows = self._passes.take(source_ids, continued)
        again = np.flatnonzero(np.isin(rows, exclude))
        while again.size:
            ids = source_ids[again]
            again = again[self._passes.taken[ids] < self._sizes[ids]]  # else every row of the source has come up
            rows[again] = self._passes.take(source_ids[again], continued=True)
            again = again[np.isin(rows[again], exclude)]
        return rows

    def available(self, step: int) -> np.ndarray:
        return self._sizes

    def pre_rollouts(self, step: int) -> tuple[np.ndarray, int] | None:
        return None

    def prepared(self, step: int) -> None:
        pass

    def state_dict(self) -> dict[str, np.ndarray]:
        return {"step": np.array([self._step]), **self._passes.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._step = int(state["step"][0])
        self._passes.load_state_dict(state)


PROMPTS = Named("prompts", {"epoch": Epoch, "cures": Cures, "thompson": Thompson}, PromptPolicy)


def make_prompt_policy(
    config: Mapping[str, Any], rows: SourceRows, seed: int, pass_rates: PromptPassRates | None
) -> PromptPolicy:
    """The policy that `trainer.grpo.curriculum.prompts` describes; ValueError for an unknown name or option.

    pass_rates: may be None where the policy's class says that it does not use them.
    """
    return PROMPTS.make(config, rows, seed, pass_rates)

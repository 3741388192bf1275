"""What one step has drawn and what of it has come back."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from megatron_dump.types import Draw, Outcomes, groups_of, pack_places

_ARRAYS = ("prompt_ids", "source_ids", "rollouts")


@dataclasses.dataclass
class Ledger:
    """The rounds of one step. Group ids run over all of them: 0 .. n_groups - 1."""

    step: int
    draws: list[Draw] = dataclasses.field(default_factory=list)
    refills: int = 0
    observed: np.ndarray = dataclasses.field(default_factory=lambda: np.empty(0, bool))  # bool [n_groups]
    outcomes: list[Outcomes] = dataclasses.field(default_factory=list)  # of the training round and its refills

    @property
    def n_groups(self) -> int:
        return len(self.observed)

    @property
    def prompt_ids(self) -> np.ndarray:
        """int64 [n_groups]."""
        return self._column("prompt_ids")

    @property
    def source_ids(self) -> np.ndarray:
        """int64 [n_groups]."""
        return self._column("source_ids")

    @property
    def rollouts(self) -> np.ndarray:
        """int64 [n_groups]: group sizes."""
        return self._column("rollouts")

    @property
    def training(self) -> list[Draw]:
        """The training round and its refills; empty before it is drawn."""
        return [draw for draw in self.draws if draw.train]

    @property
    def trained_on(self) -> np.ndarray:
        """int64: the rows of the training round and its refills."""
        return np.concatenate([np.empty(0, np.int64), *(draw.prompt_ids for draw in self.training)])

    @property
    def is_complete(self) -> bool:
        """The training round was drawn and the outcomes of every round have come."""
        return bool(self.training) and bool(self.observed.all())

    def add(self, draw: Draw) -> None:
        """ValueError for groups too large or too many; said here, their rollouts are not yet paid for."""
        pack_places(draw.group_ids, draw.rollouts - 1)
        self.draws.append(draw)
        self.observed = np.concatenate([self.observed, np.zeros(len(draw.prompt_ids), bool)])

    def check_and_mark(self, outcomes: Outcomes) -> None:
        """Outcomes must be of groups that are out, once, with the prompts and sources of their draw. ValueError."""
        groups, step = outcomes.group_ids, outcomes.step
        if outcomes.ages.size and outcomes.ages.min() < 0:
            raise ValueError(f"ages of the outcomes of step {step} are below 0: they are from the future")
        if groups.size and (groups.min() < 0 or groups.max() >= self.n_groups):
            raise ValueError(f"group_ids of step {step} are not all in 0..{self.n_groups - 1}")
        for name in ("source_ids", "prompt_ids"):
            if not np.array_equal(getattr(outcomes, name), getattr(self, name)[groups]):
                raise ValueError(f"{name} of the outcomes of step {step} are not those of its draw")
        places = pack_places(groups, outcomes.samples)
        if not np.all(places[1:] > places[:-1]):  # not in global order, or not each once
            places = np.unique(places)
        starts = np.flatnonzero(np.diff(groups_of(places), prepend=-1))
        present, counts = groups_of(places[starts]), np.diff(starts, append=len(places))
        if len(places) != len(groups):
            raise ValueError(f"a sample of a group of step {step} comes twice in its outcomes")
        if (cut := counts != self.rollouts[present]).any():
            group, n, asked = int(present[cut][0]), int(counts[cut][0]), int(self.rollouts[present[cut][0]])
            raise ValueError(
                f"group {group} of step {step} has {n} rollouts, its draw asked for {asked}: outcomes come in whole "
                "groups (reward NaN for a rollout that was lost)"
            )
        if self.observed[present].any():
            again = int(present[self.observed[present]][0])
            raise ValueError(f"group {again} of step {step} was observed already: its outcomes would count twice")
        self.observed[present] = True
        if any(draw.train and draw.first_group <= present[-1] for draw in self.draws if present.size):
            self.outcomes.append(outcomes)

    def state_dict(self) -> dict[str, Any]:
        draws = [
            {
                **{name: getattr(draw, name).tolist() for name in (*_ARRAYS, "weights")},
                "first_group": draw.first_group,
                "train": draw.train,
            }
            for draw in self.draws
        ]
        return {"step": self.step, "draws": draws, "refills": self.refills, "observed": self.observed.tolist()}

    @staticmethod
    def from_state(state: dict[str, Any]) -> Ledger:
        ledger = Ledger(step=int(state["step"]), refills=int(state["refills"]))
        for entry in state["draws"]:
            arrays = {name: np.array(entry[name], np.int64) for name in _ARRAYS}
            weights = np.array(entry["weights"], np.float64)
            ledger.add(
                Draw(ledger.step, **arrays, weights=weights, first_group=entry["first_group"], train=entry["train"])
            )
        ledger.observed = np.array(state["observed"], bool)
        return ledger

    def _column(self, name: str) -> np.ndarray:
        return np.concatenate([np.empty(0, np.int64), *(getattr(draw, name) for draw in self.draws)])

"""What flows through the loop. Numpy only: every layer, and every host framework, can import this module.

Suffixes in shapes: P prompts of a step, G rollouts of a group, N rollouts of a step, T tokens, K sources.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One row of the data set, tokenised."""

    index: int  # row in the data set: the prompt's identity everywhere
    source: str  # the distribution it belongs to (the data set's `source_key` column)
    token_ids: np.ndarray  # int64 [T], chat template applied
    ground_truth: str  # what the reward function needs to judge a completion
    text: str = ""  # the user's words, for reports


@dataclasses.dataclass(frozen=True)
class Draw:
    """One round of prompts of a step; the same on every rank.

    A step has one training round; pre-rollouts may come before it and refills of rejected groups after it. Group ids
    number the step's prompts over all its rounds: this round's are first_group .. first_group + P - 1.
    """

    step: int
    prompt_ids: np.ndarray  # int64 [P], rows of the data set
    source_ids: np.ndarray  # int64 [P], indices into the sorted source names
    rollouts: np.ndarray  # int64 [P], group size of each prompt
    weights: np.ndarray  # float64 [K], the source distribution this draw was made from; sums to 1
    first_group: int = 0
    train: bool = True  # False: pre-rollouts, which teach the curriculum alone

    @property
    def group_ids(self) -> np.ndarray:
        """int64 [P]."""
        return self.first_group + np.arange(len(self.prompt_ids), dtype=np.int64)


@dataclasses.dataclass
class Completion:
    """One rollout: a sampled answer to a prompt."""

    group_id: int  # position of its prompt in the Draw
    sample: int  # 0..G-1 inside its group
    token_ids: np.ndarray  # int64 [T], sampled tokens, the stop token included
    logprobs: np.ndarray  # float32 [T], log-probability of each token under the sampling distribution
    finished: bool  # ended by a stop token (False: cut at the length limit)
    policy_version: int  # the number of optimizer steps the generating weights had seen
    text: str = ""  # decoded answer without the stop token


@dataclasses.dataclass(frozen=True)
class Score:
    """A reward function's verdict on one completion."""

    reward: float
    correct: bool  # the answer is right
    well_formed: bool  # the answer could be read at all: tells "hard" from "broken verifier or format"
    reason: str = ""  # one word or sentence, for reports
    components: Mapping[str, float] = dataclasses.field(default_factory=dict, hash=False)  # what the reward is made of
    # What it answers, written so that equal answers are equal texts: a vote of maj@k. None: unreadable, or not told.
    answer: str | None = None


@dataclasses.dataclass(frozen=True)
class Outcomes:
    """What rollouts of one step earned, in global order (by group id, then sample): the curriculum's feedback.

    Whole groups, but not necessarily all of the step's: with asynchronous generation the others may come later.
    """

    step: int  # of the draw that asked for them
    group_ids: np.ndarray  # int64 [N], as in the step's Draws
    samples: np.ndarray  # int64 [N], 0..G-1 inside the group
    prompt_ids: np.ndarray  # int64 [N], rows of the data set
    source_ids: np.ndarray  # int64 [N]
    rewards: np.ndarray  # float64 [N]; NaN or infinite: the rollout could not be judged, nothing learns from it
    advantages: np.ndarray  # float64 [N]; NaN where the reward is not finite
    correct: np.ndarray  # bool [N]
    well_formed: np.ndarray  # bool [N]
    lengths: np.ndarray  # int64 [N], completion tokens
    finished: np.ndarray  # bool [N]
    kept: np.ndarray  # bool [N], trained on: neither rejected by the filter nor without a finite reward
    ages: np.ndarray  # int64 [N], training steps between the generating weights and those of now; 0 when synchronous

    @staticmethod
    def of(step: int, **columns: Any) -> Outcomes:
        """From a sequence for every column, copied into an array of the column's type."""
        return Outcomes(step, **{name: np.array(columns[name], kind) for name, kind in OUTCOME_COLUMNS.items()})

    @staticmethod
    def joined(parts: Sequence[Outcomes]) -> Outcomes:
        """The rollouts of several rounds of one step, in the order of `parts`."""
        columns = {name: np.concatenate([getattr(part, name) for part in parts]) for name in OUTCOME_COLUMNS}
        return Outcomes(parts[0].step, **columns)

    def take(self, rows: np.ndarray) -> Outcomes:
        """Some of the rollouts. rows: positions, or a mask bool [N]."""
        return Outcomes(self.step, **{name: getattr(self, name)[rows] for name in OUTCOME_COLUMNS})


# The columns of Outcomes in the order of its fields, and what each holds. This order is that of the log's JSON, of the
# table that ranks gather and of the digest that they compare.
OUTCOME_COLUMNS: dict[str, type[np.generic]] = {
    "group_ids": np.int64,
    "samples": np.int64,
    "prompt_ids": np.int64,
    "source_ids": np.int64,
    "rewards": np.float64,
    "advantages": np.float64,
    "correct": np.bool_,
    "well_formed": np.bool_,
    "lengths": np.int64,
    "finished": np.bool_,
    "kept": np.bool_,
    "ages": np.int64,
}

_GROUP_BITS, _SAMPLE_BITS = 20, 12  # 32 bits together; checkpoints hold packed places, so these stay as they are


def pack_places(group_ids: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """int64 [N] below 2^32: each rollout's place in its step, ordered by group id, then sample.

    A step has at most 2^20 groups, a group at most 2^12 = 4096 rollouts. ValueError beyond: two rollouts must not
    share a place.
    """
    for name, values, bits in (("group id", group_ids, _GROUP_BITS), ("sample", samples, _SAMPLE_BITS)):
        if values.size and not 0 <= values.min() <= values.max() < 1 << bits:
            raise ValueError(f"{name}s from {values.min()} to {values.max()}: they must be in 0..{(1 << bits) - 1}")
    return group_ids << _SAMPLE_BITS | samples


def groups_of(places: np.ndarray) -> np.ndarray:
    """int64 [N]: the group ids that `pack_places` was given."""
    return places >> _SAMPLE_BITS


@dataclasses.dataclass
class TrainBatch:
    """One rank's rollouts of one optimizer step, right-padded to a common length.

    Row order is the rank's share of the global mini-batch; the loss is normalised by `global_tokens`, so it does not
    depend on how rows were split over ranks or micro-batches. Rows whose mask is 0 everywhere fill the batch up.
    """

    tokens: np.ndarray  # int64 [N, T], prompt then completion
    loss_mask: np.ndarray  # float32 [N, T], 1 where tokens[:, t] was sampled by the policy
    advantages: np.ndarray  # float32 [N]
    rollout_logprobs: np.ndarray  # float32 [N, T], as the generator reported them; 0 outside the mask
    global_tokens: float  # sum of loss_mask over all data-parallel ranks
    old_logprobs: np.ndarray | None = (
        None  # float32 [N, T], policy before the step's first update; None: the current one
    )
    ref_logprobs: np.ndarray | None = None  # float32 [N, T], reference policy; None: no KL term
    weights: np.ndarray | None = None  # float32 [N], what a row's tokens count in the loss; None: 1 each

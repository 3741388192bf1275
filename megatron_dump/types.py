"""What flows through the loop. Numpy only: every layer, and every host framework, can import this module.

Suffixes in shapes: P prompts of a step, G rollouts of a group, N rollouts of a step, T tokens, K sources.
"""

from __future__ import annotations

import dataclasses

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
    """What one step trains on; the same on every rank. Positions 0..P-1 are the step's group ids."""

    step: int
    prompt_ids: np.ndarray  # int64 [P], rows of the data set
    source_ids: np.ndarray  # int64 [P], indices into the sorted source names
    rollouts: np.ndarray  # int64 [P], group size of each prompt
    weights: np.ndarray  # float64 [K], the source distribution this draw was made from; sums to 1


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


@dataclasses.dataclass(frozen=True)
class Outcomes:
    """What a step's rollouts earned, in global order (sorted by group_ids, then sample): the curriculum's feedback."""

    step: int
    group_ids: np.ndarray  # int64 [N], positions in the Draw
    source_ids: np.ndarray  # int64 [N]
    rewards: np.ndarray  # float64 [N]
    advantages: np.ndarray  # float64 [N], as trained on
    correct: np.ndarray  # bool [N]
    well_formed: np.ndarray  # bool [N]
    lengths: np.ndarray  # int64 [N], completion tokens
    finished: np.ndarray  # bool [N]


@dataclasses.dataclass
class TrainBatch:
    """One rank's rollouts of one optimizer step, right-padded to a common length.

    Row order is the rank's share of the global mini-batch; the loss is normalised by `global_tokens`, so it does not
    depend on how rows were split over ranks or micro-batches.
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

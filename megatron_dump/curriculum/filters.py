"""Which groups are worth training on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from megatron_dump.curriculum.registry import Named, check_number
from megatron_dump.types import Outcomes


class Filter(Protocol):
    """Made as Filter(**options); it has no state."""

    # Rounds of fresh prompts that may replace rejected groups in one step. A user's own class has it before it is made.
    max_refills: int

    def rejected(self, outcomes: Outcomes) -> np.ndarray:
        """int64, sorted: ids of the groups that are not to be trained on."""
        ...


class Everything:
    """No filter."""

    max_refills = 0

    def rejected(self, outcomes: Outcomes) -> np.ndarray:
        return np.empty(0, np.int64)


class ZeroVariance:
    """Rejects groups whose finite rewards are all alike: their advantages are 0 (DAPO's dynamic sampling, 2503.14476).

    Each rejected group is replaced by a prompt of its own source, so the mixture stays what the curriculum asked for
    (the ratio-preserving refill of MT-GRPO, 2602.05547), in at most `max_refills` rounds; then the step trains on the
    smaller batch. `max_refills: 0` filters without refill.
    """

    def __init__(self, *, max_refills: int = 2):
        check_number("filter.max_refills", max_refills, 0, whole=True)
        self.max_refills = max_refills

    def rejected(self, outcomes: Outcomes) -> np.ndarray:
        ids, constant = constant_groups(outcomes)
        return ids[constant]


def constant_groups(outcomes: Outcomes) -> tuple[np.ndarray, np.ndarray]:
    """(ids int64 [G], constant bool [G]): all groups, and whether their finite rewards are all alike (or fewer than 2).

    Infinite and missing (NaN) rewards are nobody's baseline: they are left out.
    """
    ids, index = np.unique(outcomes.group_ids, return_inverse=True)
    lowest, highest = np.full(len(ids), np.inf), np.full(len(ids), -np.inf)
    finite = np.isfinite(outcomes.rewards)
    np.minimum.at(lowest, index[finite], outcomes.rewards[finite])
    np.maximum.at(highest, index[finite], outcomes.rewards[finite])
    return ids.astype(np.int64), ~(highest > lowest)


FILTERS = Named("filter", {"none": Everything, "zero_variance": ZeroVariance}, Filter)


def make_filter(config: Mapping[str, Any]) -> Filter:
    """The filter that `trainer.grpo.curriculum.filter` describes; ValueError for an unknown name or option."""
    return FILTERS.make(config)

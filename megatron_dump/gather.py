"""Rollouts of all ranks on every rank: outcomes over the data-parallel group, completions over a replica's.

Collectives over `group`, as those of distributed.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist

from megatron_dump.distributed import all_gather_array
from megatron_dump.types import OUTCOME_COLUMNS, Completion, Outcomes


def gather_outcomes(
    local: Outcomes, group: dist.ProcessGroup | None = None, device: torch.device | str = "cpu"
) -> Outcomes:
    """Every rank's rollouts as one Outcomes, sorted by (group_id, sample), the same on every rank of the group.

    local: this rank's rollouts in any order, possibly none. Integers travel as float64, exact below 2**53. Raises
    ValueError on every rank if ranks are at different steps or a (group_id, sample) comes twice, as it does when
    `group` is not the data-parallel one.
    """
    columns = [np.asarray(getattr(local, name), np.float64) for name in OUTCOME_COLUMNS]
    table = np.stack(columns, axis=1)  # [N_local, 12]
    sizes = all_gather_array(np.array([len(table), local.step]), group, device)  # [ranks, 2]
    if np.any(sizes[:, 1] != sizes[0, 1]):
        raise ValueError(f"gather_outcomes: the ranks are at different steps: {sizes[:, 1].tolist()}")
    rows = gather_rows(table, sizes[:, 0], group, device)
    rows = rows[np.lexsort((rows[:, 1], rows[:, 0]))]  # the last key, group_id, sorts first
    repeated = np.all(rows[1:, :2] == rows[:-1, :2], axis=1)
    if repeated.any():
        group_id, sample = rows[1:][repeated][0, :2].astype(int)
        raise ValueError(f"gather_outcomes: sample {sample} of group {group_id} came from two ranks")
    return Outcomes.of(local.step, **dict(zip(OUTCOME_COLUMNS, rows.T, strict=True)))


def gather_rows(
    own: np.ndarray, sizes: np.ndarray, group: dist.ProcessGroup | None = None, device: torch.device | str = "cpu"
) -> np.ndarray:
    """Every rank's rows, in the order of ranks; sizes: int64 [ranks], how many each has. One collective."""
    padded = np.zeros((max(1, int(sizes.max())), *own.shape[1:]), own.dtype)  # some backends refuse empty tensors
    padded[: len(own)] = own
    gathered = all_gather_array(padded, group, device)  # [ranks, N_max, …]
    return np.concatenate([part[:n] for part, n in zip(gathered, sizes, strict=True)])


def digest(outcomes: Outcomes) -> str:
    """SHA-256 (hex) of the step and of every column, bit for bit."""
    whole = hashlib.sha256(np.int64(outcomes.step).tobytes())
    for name in OUTCOME_COLUMNS:
        whole.update(getattr(outcomes, name).tobytes())
    return whole.hexdigest()


def gather_completions(
    local: Sequence[Completion], group: dist.ProcessGroup | None = None, device: torch.device | str = "cpu"
) -> list[Completion]:
    """Every rank's completions, sorted by (group_id, sample), the same on every rank; their texts stay behind.

    Four collectives whatever the number of completions, 12 bytes a token, padded to the largest share.
    """
    heads = np.array([(c.group_id, c.sample, c.finished, c.policy_version, len(c.token_ids)) for c in local], np.int64)
    heads = heads.reshape(-1, 5)
    tokens = np.concatenate([np.empty(0, np.int64), *(c.token_ids for c in local)]).astype(np.int64)
    logprobs = np.concatenate([np.empty(0, np.float32), *(c.logprobs for c in local)]).astype(np.float32)
    sizes = all_gather_array(np.array([len(heads), len(tokens)]), group, device)  # [ranks, 2]
    heads = gather_rows(heads, sizes[:, 0], group, device)
    tokens, logprobs = (gather_rows(array, sizes[:, 1], group, device) for array in (tokens, logprobs))
    ends = np.cumsum(heads[:, 4])
    completions = [
        Completion(g, sample, tokens[end - length : end], logprobs[end - length : end], bool(finished), version)
        for (g, sample, finished, version, length), end in zip(heads.tolist(), ends.tolist(), strict=True)
    ]
    return sorted(completions, key=lambda c: (c.group_id, c.sample))

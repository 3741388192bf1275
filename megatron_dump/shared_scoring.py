"""Judging by one rank for all: where the judges are not beside the ranks (rewards/ray_workers.py)."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch

from megatron_dump.distributed import Replica, all_gather_array, broadcast_array, fail_together
from megatron_dump.rewards.workers import Faults, Job
from megatron_dump.scoring import ALONE
from megatron_dump.types import Completion, Prompt, Score


class Judges(Protocol):
    """rewards.workers.RewardPool, or rewards.ray_workers.RayRewardPool."""

    def score_all(self, jobs: Sequence[Job]) -> tuple[list[Score], dict[str, Faults]]: ...

    def close(self) -> None: ...


class SharedScorer:
    """As scoring.Scorer, but rank 0 of the run judges all replicas' completions: it alone talks to the judges."""

    def __init__(self, judges: Judges | None, sources: Sequence[str], replica: Replica = ALONE) -> None:
        """judges: rank 0's, None on the other ranks."""
        self.judges, self.sources, self.replica = judges, list(sources), replica
        self._faults = np.zeros((len(self.sources), 2), np.int64)  # time-outs, crashes

    def score(self, what: str, completions: Sequence[Completion], prompts: Mapping[int, Prompt]) -> list[Score]:
        """One Score a completion, `prompts` by group id. A collective; RuntimeError on every rank if one fails.

        Reasons and components stay on rank 0.
        """
        device, mine = self.replica.device, b""
        with fail_together(what, device=device):
            if self.replica.is_lead:
                rows = [
                    (self.sources.index((p := prompts[c.group_id]).source), c.text, p.ground_truth) for c in completions
                ]
                mine = zlib.compress(json.dumps(rows).encode())
        everything = [json.loads(zlib.decompress(part)) if part else [] for part in _gather_bytes(mine, device)]
        replicas = all_gather_array(np.array(self.replica.rank if self.replica.is_lead else -1), None, device)
        ranges = np.cumsum([0, *map(len, everything)])
        scores: list[Score] = []
        table = None
        with fail_together(what, device=device):
            if self.judges is not None:
                jobs = [Job(self.sources[k], text, truth) for rows in everything for k, text, truth in rows]
                scores, faults = self.judges.score_all(jobs)
                self._faults += [(faults[s].timeouts, faults[s].crashes) for s in self.sources]
                table = np.array([(s.reward, s.correct, s.well_formed) for s in scores], np.float64).reshape(-1, 3)
        table = broadcast_array(table, (int(ranges[-1]), 3), np.float64, device=device)
        lead = int(np.flatnonzero(replicas == self.replica.rank)[0])
        own = slice(ranges[lead], ranges[lead + 1])
        return scores[own] or [Score(float(r), bool(right), bool(read)) for r, right, read in table[own]]

    def take_faults(self) -> dict[str, tuple[int, int]]:
        """Source -> (time-outs, crashes) of all replicas since the last call, where there were any. A collective."""
        total = all_gather_array(self._faults, None, self.replica.device).sum(axis=0)
        self._faults[:] = 0
        return {s: (int(t), int(c)) for s, (t, c) in zip(self.sources, total, strict=True) if t or c}

    def close(self) -> None:
        """End the judges."""
        if self.judges is not None:
            self.judges.close()


def _gather_bytes(mine: bytes, device: torch.device | str) -> list[bytes]:
    """Every rank's, in their order."""
    sizes = all_gather_array(np.array(len(mine)), None, device)
    padded = np.zeros(max(1, int(sizes.max())), np.uint8)
    padded[: len(mine)] = np.frombuffer(mine, np.uint8)
    return [row[:n].tobytes() for row, n in zip(all_gather_array(padded, None, device), sizes, strict=True)]

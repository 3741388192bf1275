"""A round of rollouts on replicas of several ranks: all hold the same outcomes, or all fail with one line."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_dump.collect import Collector
from megatron_dump.curriculum import Curriculum, MegatronCurriculumBatchSampler
from megatron_dump.data import PromptDataset
from megatron_dump.distributed import DrawBroadcast, Replica
from megatron_dump.gather import digest
from megatron_dump.rollout import Request
from megatron_dump.scoring import Scorer
from megatron_dump.types import Completion, Score
from tests.distributed.launch import run_ranks
from tests.unit.curricula import config
from tests.unit.guessing import Guesser, crashing, verdict
from tests.unit.test_data import encode, row, write

CHANCES = {"easy": 0.7, "hard": 0.1}
Change = Callable[[list[Completion]], list[Completion]]


class Astray(Guesser):
    """Generates something else than its peers in the replica do."""

    def __init__(self, chances: dict[str, float], change: Change):
        super().__init__(chances)
        self.change = change

    def generate(self, step: int, requests: Sequence[Request]) -> list[Completion]:
        return self.change(super().generate(step, requests))


def last(**fields) -> Change:
    """The last completion with other fields."""
    return lambda completions: [*completions[:-1], dataclasses.replace(completions[-1], **fields)]


CHANGES: dict[str, Change] = {
    "unfinished": last(finished=False),
    "of an older policy": last(policy_version=1),
    "another length": last(token_ids=np.zeros(1, np.int64)),
    "another order": lambda completions: completions[::-1],  # its scores come in the first rank's
}


def collector(path: str, change: Change | None = None, judge: Callable[[str, str], Score] = verdict) -> Collector:
    """Of one of four ranks, two replicas of two; rank 3 goes astray if there is a `change`."""
    rank = dist.get_rank()
    data_groups, replicas = ([dist.new_group(ranks) for ranks in grid] for grid in (((0, 2), (1, 3)), ((0, 1), (2, 3))))
    replica = Replica(rank // 2, 2, data_groups[rank % 2], torch.device("cpu"), replicas[rank // 2])
    data = PromptDataset(path, encode=encode)
    blocks = {"filter": {"name": "zero_variance", "max_refills": 2}}
    curriculum = Curriculum(data.source_of_rows, 8, 4, 7, config("uniform", blocks=blocks), data.fingerprint)
    broadcast = DrawBroadcast(n_prompts=8, n_sources=2)
    sampler = MegatronCurriculumBatchSampler(len(data), 0, 1, 8, 0, 1, curriculum=curriculum, broadcast=broadcast)
    scorer = Scorer({"*": f"{judge.__module__}:{judge.__name__}"}, data.sources, replica)
    generator = Astray(CHANCES, change) if change and rank == 3 else Guesser(CHANCES)
    return Collector(generator, scorer, data, sampler, curriculum.filter, replica, 1, True, lambda c: c.policy_version)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    rows = [row(f"{source} {i}", source=source) for i in range(40) for source in CHANCES]
    return write(tmp_path_factory.mktemp("data") / "train.parquet", *rows)


def watch(phase: str) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


@pytest.mark.parametrize("judge", [verdict, crashing])  # the latter: rewards NaN
def test_every_rank_holds_the_same_outcomes_round_by_round(data, judge):
    def step():
        one = collector(data, judge=judge)
        rollouts = one.refill(watch, one.finish(watch, one.begin(watch, one.sampler.next_draw())))
        one.scorer.close()
        return digest(rollouts.outcomes), rollouts.refills, len(rollouts.outcomes.rewards)

    told = run_ranks(step, 4)
    assert told == [told[0]] * 4 and told[0][1] > 0 and told[0][2] > 32


@pytest.mark.parametrize("change", CHANGES)
def test_a_rank_with_other_outcomes_fails_every_rank(data, change):
    """Rank 3's rollouts reach rank 1 as well, its data-parallel peer; ranks 0 and 2 hold rank 2's."""

    def roll_out():
        one = collector(data, CHANGES[change])
        try:
            one.refill(watch, one.finish(watch, one.begin(watch, one.sampler.next_draw())))
        except RuntimeError as error:
            return str(error)
        finally:
            one.scorer.close()

    lines = run_ranks(roll_out, 4)
    assert lines == [lines[0]] * 4
    first, other = lines[0].split(" has ")[1][:12], lines[0].split("ranks 1 (")[1][:12]
    assert first != other
    assert lines[0] == f"ranks disagree on outcomes: rank 0 has {first}, not so ranks 1 ({other}), 3 ({other})"

"""One rank acts for all: what every replica gets is what it would have got by itself."""

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_dump.distributed import Replica
from megatron_dump.rewards.workers import RewardPool
from megatron_dump.rollout import Request
from megatron_dump.rollout.shared import SharedGenerator, gather_requests
from megatron_dump.scoring import Scorer
from megatron_dump.shared_scoring import SharedScorer
from megatron_dump.types import Completion, Prompt
from tests.distributed.launch import RankFailed, run_ranks
from tests.unit.toy_engine import complete

OBEY = {"*": "tests.unit.faulty_rewards:obey"}
SOURCES = ["a", "b"]


def replica_of(rank, size, world):
    """Ranks 0 .. size - 1 are the first replica, and so on."""
    groups = [dist.new_group(range(first, first + size)) for first in range(0, world, size)]
    peers = [dist.new_group(range(i, world, size)) for i in range(size)]
    return Replica(rank // size, world // size, peers[rank % size], torch.device("cpu"), groups[rank // size])


def share_of(replica, groups):
    return [g for g in range(groups) if g % replica.size == replica.rank]


def prompt_of(group_id):
    return Prompt(100 + group_id, SOURCES[group_id % 2], np.arange(group_id % 5, dtype=np.int64), f"truth {group_id}")


@pytest.mark.parametrize(("world", "size"), [(1, 1), (2, 2), (4, 2), (3, 1)])
@pytest.mark.parametrize("groups", [0, 1, 7])
def test_shared_scores_are_each_replicas_own(world, size, groups):
    def main():
        replica = replica_of(dist.get_rank(), size, world)
        mine = share_of(replica, groups)
        texts = {g: [f"{g}.{i} näme \ud800" for i in range(2)] + (["exit 1"] if g == 3 else []) for g in mine}
        rows = [(g, i, text) for g in mine for i, text in enumerate(texts[g])]
        completions = [Completion(g, i, np.zeros(1, np.int64), np.zeros(1, np.float32), True, 0, t) for g, i, t in rows]
        prompts = {g: prompt_of(g) for g in mine}
        judges = RewardPool(OBEY, SOURCES, workers=1) if dist.get_rank() == 0 else None
        found = []
        for scorer in (SharedScorer(judges, SOURCES, replica), Scorer(OBEY, SOURCES, replica, workers=1)):
            for _ in range(2):
                scores = scorer.score("reward", completions, prompts)
            found.append([(s.reward if math.isfinite(s.reward) else None, s.correct, s.well_formed) for s in scores])
            found.append(scorer.take_faults())
            assert scorer.take_faults() == {}
            scorer.close()
        return found

    results = run_ranks(main, world)
    for shared, _, own, _ in results:
        assert shared == own
    assert results[0][1] == results[0][3] == ({"b": (0, 2)} if groups > 3 else {})
    assert sum(len(r[0]) for r in results[::size]) == 2 * groups + (groups > 3)


def test_a_failure_of_the_judges_is_told_to_all():
    def main():
        replica = replica_of(dist.get_rank(), 1, 2)
        judges = RewardPool(OBEY, SOURCES) if dist.get_rank() == 0 else None
        scorer = SharedScorer(judges, SOURCES, replica)
        completions = [Completion(0, 0, np.zeros(1, np.int64), np.zeros(1, np.float32), True, 0, "truth is out")]
        with pytest.raises(RuntimeError, match="reward: rank 0 failed: GroundTruthError: a row of a: is out"):
            scorer.score("reward", completions if dist.get_rank() == 1 else [], {0: prompt_of(0)})
        return True

    assert run_ranks(main, 2) == [True, True]


class Everywhere:
    """Generates on every rank what the others generate too, at once."""

    def submit(self, step, requests):
        self.seen = [(r.group_id, r.first, r.n, r.prompt.index) for r in requests]
        self.made = [
            Completion(r.group_id, s, *complete(r.prompt.token_ids, 1000 * r.group_id + s, step), step)
            for r in requests
            for s in r.samples
        ]
        return self

    def result(self):
        return self.made


@pytest.mark.parametrize(("world", "size"), [(1, 1), (2, 2), (4, 2), (3, 1)])
@pytest.mark.parametrize("groups", [0, 1, 7])
def test_shared_engines_see_every_request_once_and_each_replica_gets_its_own(world, size, groups):
    def main():
        replica = replica_of(dist.get_rank(), size, world)
        inner = Everywhere()
        generator = SharedGenerator(inner, replica, lambda c: c)
        requests = [Request(g, prompt_of(g), g % 3, first=g % 2) for g in share_of(replica, groups)[::-1]]
        got = generator.generate(5, requests)
        own = Everywhere().submit(5, requests).result()
        assert [(c.group_id, c.sample, c.token_ids.tolist()) for c in got] == [
            (c.group_id, c.sample, c.token_ids.tolist()) for c in own
        ]
        return inner.seen

    for seen in run_ranks(main, world):
        assert seen == [(g, g % 2, g % 3, 100 + g) for g in range(groups)]


def test_prompts_travel_whole():
    def main():
        rank = dist.get_rank()
        tokens = np.array([2**40 + rank, -1, 0][: rank + 1])
        (first, second) = gather_requests(
            [Request(9 - rank, Prompt(rank, "s", tokens, "t"), 2, first=3)], replica_of(rank, 1, 2)
        )
        assert (first.group_id, second.group_id) == (8, 9)
        return first.prompt.token_ids.tolist(), second.prompt.token_ids.tolist(), [*first.samples]

    assert run_ranks(main, 2) == [([2**40 + 1, -1], [2**40], [3, 4])] * 2


def test_a_rank_that_fails_is_named():
    def main():
        scorer = SharedScorer(None, SOURCES, replica_of(dist.get_rank(), 1, 2))
        scorer.score("reward", [Completion(5, 0, np.zeros(1, np.int64), np.zeros(1, np.float32), True, 0)], {})

    with pytest.raises(RankFailed, match="reward: rank 0 failed: KeyError: 5"):
        run_ranks(main, 2)

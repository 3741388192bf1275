"""Judging in Ray actors: the same verdicts as beside the ranks, whatever is lost."""

from __future__ import annotations

import os
import signal

import psutil
import pytest

from megatron_dump.rewards import GroundTruthError
from megatron_dump.rewards.ray_workers import RayRewardPool
from megatron_dump.rewards.workers import Faults, Job, RewardPool
from tests.vllm.waiting import wait_for

pytestmark = pytest.mark.vllm

OBEY = {"*": "tests.unit.faulty_rewards:obey"}


@pytest.fixture(scope="module")
def judges(cluster):
    options = {"workers": 1, "timeout_s": 1.0, "on_timeout": -9.0, "on_crash": -7.0, "memory_gb": 1.0}
    pool = RayRewardPool(cluster, OBEY, ["a", "b"], actors=2, **options)
    yield pool, options
    pool.close()


def test_rewards_on_ray_are_those_of_processes(judges):
    shared, options = judges
    texts = [f"{i / 7} näme \ud800 {i}" for i in range(200)]
    texts[20:20] = ["segfault", "sleep 600", "raise words", "exit 3"]
    jobs = [Job("ab"[i % 2], text, "t" * (i % 5)) for i, text in enumerate(texts)]
    with RewardPool(OBEY, ["a", "b"], **options) as beside:
        assert shared.score_all(jobs) == beside.score_all(jobs)
    assert shared.score_all([]) == ([], {"a": Faults(), "b": Faults()})
    with pytest.raises(GroundTruthError, match="a row of b: is out"):
        shared.score_all([Job("a", "1", ""), Job("b", "truth is out", "")])
    assert [s.reward for s in shared.score_all([Job("a", "3", "")])[0]] == [3.0]


def test_a_lost_reward_actor_loses_no_answer(judges):
    shared, _ = judges
    victims = [p for p in psutil.process_iter(["cmdline"]) if "_RewardActor" in " ".join(p.info["cmdline"] or [])]
    assert len(victims) == 2
    children = victims[0].children(recursive=True)
    assert children
    os.kill(victims[0].pid, signal.SIGKILL)
    jobs = [Job("a", str(i), "") for i in range(50)]
    scores, faults = shared.score_all(jobs)
    assert [s.reward for s in scores] == list(map(float, range(50)))
    assert faults["a"] == Faults()
    wait_for(lambda: not any(child.is_running() for child in children))


def test_rewards_that_cannot_be_used(cluster):
    with pytest.raises(ValueError, match="colour: no such option"):
        RayRewardPool(cluster, {"*": {"name": "kk", "colour": 1}}, ["a"], actors=1, workers=1)
    with pytest.raises(ValueError, match="workers: 0 keeps no time limit"):
        RayRewardPool(cluster, OBEY, ["a"], actors=1, workers=0)
    with pytest.raises(ValueError, match="ray_actors: 0 must be"):
        RayRewardPool(cluster, OBEY, ["a"], actors=0, workers=1)

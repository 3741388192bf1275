"""Engine pools of toy engines, and what a single engine would say."""

import time
from concurrent.futures import Future

import numpy as np

from megatron_dump.rollout.engine import EngineOutput, EngineRequest
from tests.unit.toy_engine import complete

QUICK = {"call_timeout_s": 20.0, "start_timeout_s": 20.0, "health_interval_s": 0.05, "min_chunk_tokens": 1}


def requests_of(n, seed=0, largest=6):
    rng = np.random.default_rng(seed)
    return [
        EngineRequest(rng.integers(0, 50, rng.integers(1, 9)), tuple(map(int, rng.integers(0, 2**63, k))))
        for k in rng.integers(0, largest + 1, n)
    ]


def plain(answers):
    return [[(o.token_ids.tolist(), o.logprobs.tolist(), o.finished, o.policy_version) for o in row] for row in answers]


def expected(requests, version=0):
    """What a single engine says, computed here."""
    rows = [[(*complete(r.prompt, seed, version), version) for seed in r.seeds] for r in requests]
    return [[(ids.tolist(), logprobs.tolist(), done, v) for ids, logprobs, done, v in row] for row in rows]


def wait_for(condition, within_s=10.0):
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def began(handle):
    """(prompt, seed) of every completion that the engine was asked for."""
    return [(tuple(prompt), seed) for _, _, group in handle.served() for prompt, seeds in group for seed in seeds]


class Stubborn:
    """Answers what it was asked before its restart long after it: an engine on another node can."""

    def __init__(self):
        self.asked, self.restarted = [], 0

    def generate(self, requests):
        self.asked.append((requests, Future()))
        return self.asked[-1][1]

    def answer(self, i, version=0):
        requests, future = self.asked[i]
        future.set_result([[EngineOutput(*complete(r.prompt, s, version), version) for s in r.seeds] for r in requests])

    def alive(self):
        return True

    def restart(self):
        self.restarted += 1

    def close(self): ...

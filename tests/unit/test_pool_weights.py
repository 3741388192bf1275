"""Which engines of a pool have weights, and that none serves without."""

import os
import signal
import time
from concurrent.futures import Future

import pytest

from megatron_dump.engine_options import PoolOptions
from megatron_dump.rollout.crew import PoolFailed
from megatron_dump.rollout.engine import EngineDied
from megatron_dump.rollout.pool import EnginePool
from tests.unit.pools import QUICK, Stubborn, expected, plain, requests_of, wait_for


def test_a_restarted_engine_does_not_serve_before_it_has_weights(make_pool):
    pool, (first, second) = make_pool(2)
    pool.load_weights(1, {"n": 1}).result(5)
    requests = requests_of(40)
    os.kill(first.pids[0], signal.SIGKILL)
    assert plain(pool.generate(requests).result(10)) == expected(requests, 1)
    wait_for(lambda: len(first.pids) == 2)
    time.sleep(0.1)
    assert plain(pool.generate(requests).result(10)) == expected(requests, 1)
    assert not [row for row in first.served() if row[0] == first.pids[1]]  # up, but bare
    pool.load_weights(2, {"n": 2}).result(5)
    assert plain(pool.generate(requests).result(10)) == expected(requests, 2)
    assert {row[1] for row in first.served() if row[0] == first.pids[1]} == {2}
    assert first.loads == second.loads == [(1, {"n": 1}), (2, {"n": 2})]


def test_reload_gives_weights_before_it_serves(make_pool):
    reloads, versions = [], []

    def reload(handle):
        reloads.append(handle)
        handle.load_weights(versions[-1], {"reload": True}).result(5)

    pool, (only,) = make_pool(1, reload=reload)
    for version in (1, 2):
        versions.append(version)
        pool.load_weights(version, {}).result(5)
    (only.folder / "slow").write_text("0.02")
    requests = requests_of(20)
    future = pool.generate(requests)
    wait_for(only.served)
    os.kill(only.pids[0], signal.SIGKILL)
    assert plain(future.result(10)) == expected(requests, 2)
    assert reloads == [only] and only.loads[-1] == (2, {"reload": True})


@pytest.mark.parametrize("noticed", ["before it is asked", "while it is asked"])
def test_a_failing_reload_is_a_failing_start(make_pool, noticed):
    def reload(handle):
        raise ConnectionError("nobody there")

    pool, (only,) = make_pool(1, reload=reload, max_restarts=1)
    pool.load_weights(1, {}).result(5)
    os.kill(only.pids[0], signal.SIGKILL)
    if noticed == "before it is asked":
        os.waitid(os.P_PID, only.pids[0], os.WEXITED | os.WNOWAIT)
    with pytest.raises(PoolFailed, match="engine 0 was lost 2 times, with max_restarts=1; the last time: nobody there"):
        pool.generate(requests_of(3)).result(10)


def test_weights_come_after_earlier_calls_and_before_later_ones(make_pool):
    pool, _ = make_pool(3, delay_s=0.005)
    requests = requests_of(30)
    futures = []
    for version in range(4):
        futures.append(pool.load_weights(version, {}))
        futures.append(pool.generate(requests))
        futures.append(pool.generate(requests[::-1]))
    for version in range(4):
        assert plain(futures[3 * version + 1].result(10)) == expected(requests, version)
        assert plain(futures[3 * version + 2].result(10)) == expected(requests[::-1], version)


def test_an_engine_lost_while_it_loads_fails_the_load(make_pool):
    pool, (first, _) = make_pool(2)
    (first.folder / "slow").write_text("5")
    future = pool.load_weights(1, {})
    wait_for(lambda: (1, {}) in first.loads)
    os.kill(first.pids[0], signal.SIGKILL)
    with pytest.raises(EngineDied, match="load_weights: engine 0: exit code -9"):
        future.result(5)
    (first.folder / "slow").unlink()
    pool.restart()
    pool.load_weights(1, {}).result(5)
    assert plain(pool.generate(requests_of(9)).result(5)) == expected(requests_of(9), 1)


def test_restart_ends_loads_that_nobody_sends(make_pool):
    pool, (first, second) = make_pool(2)
    (first.folder / "slow").write_text("60")  # as if it waited for a sender that failed
    begun, later = pool.load_weights(1, {}), pool.load_weights(2, {})
    wait_for(lambda: first.loads and second.loads)
    time.sleep(0.2)  # it has looked at its orders, and waits
    (first.folder / "slow").unlink()
    pool.restart()
    for lost in (begun, later):
        with pytest.raises(EngineDied, match="load_weights: called off by a restart"):
            lost.result(1)
    assert pool.restarts == {"engine 0": 1, "engine 1": 0}
    pool.load_weights(3, {}).result(5)
    assert plain(pool.generate(requests_of(9)).result(5)) == expected(requests_of(9), 3)


def test_engines_that_die_asleep_are_restarted_when_woken(make_pool):
    pool, (first, _) = make_pool(2)
    pool.load_weights(1, {}).result(5)
    assert pool.alive()
    pool.sleep().result(5)
    assert pool.alive()  # it wants waking, not restarting
    with pytest.raises(EngineDied, match="no engine has weights"):
        pool.generate(requests_of(3)).result(5)
    os.kill(first.pids[0], signal.SIGKILL)
    time.sleep(0.3)
    assert len(first.pids) == 1
    pool.wake().result(5)
    assert len(first.pids) == 2
    pool.load_weights(2, {}).result(5)
    assert plain(pool.generate(requests_of(9)).result(5)) == expected(requests_of(9), 2)


class Listening(Stubborn):
    """Loads weights once all engines of a stream are there."""

    def __init__(self, stream):
        super().__init__()
        self.stream, self.up, self.version = stream, True, 0

    def generate(self, requests):
        future = super().generate(requests)
        self.answer(-1, self.version)
        return future

    def load_weights(self, version, link):
        self.stream.append((self, version, link, Future()))
        return self.stream[-1][-1]

    def alive(self):
        return self.up

    def restart(self):
        super().restart()
        self.up = True


def test_weights_come_by_a_stream_to_each_engine():
    stream = []

    def push(engines, version):
        """As weight_sync does it: a link for each engine, and nobody gets anything before all listen."""
        for engine in engines:
            if not engine.alive():
                engine.restart()
        asked = [engine.load_weights(version, {"receiver": i}) for i, engine in enumerate(engines)]
        wait_for(lambda: len(stream) == len(engines))
        assert sorted(link["receiver"] for _, _, link, _ in stream) == [*range(len(engines))]
        for handle, _, _, future in stream:
            handle.version = version
            future.set_result(None)
        stream.clear()
        return [future.result(5) for future in asked]

    requests = requests_of(20)
    handles = [Listening(stream) for _ in range(3)]
    with EnginePool(handles, PoolOptions(**{**QUICK, "max_restarts": 1}), expected_tokens=6) as pool:
        engines = pool.engines
        assert [engine.name for engine in engines] == ["engine 0", "engine 1", "engine 2"]
        for version in (1, 2):
            push(engines, version)
            assert plain(pool.generate(requests).result(5)) == expected(requests, version)
        handles[1].up = False
        wait_for(lambda: handles[1].restarted)
        assert not engines[1].alive()  # up again, but bare
        given = len(handles[1].asked)
        assert plain(pool.generate(requests).result(5)) == expected(requests, 2)
        assert len(handles[1].asked) == given
        push([engines[1]], 2)
        assert [engine.alive() for engine in engines] == [True] * 3
        assert plain(pool.generate(requests).result(5)) == expected(requests, 2)
        assert len(handles[1].asked) > given
        engines[0].load_weights(3, {})
        wait_for(lambda: stream)
        assert [engine.alive() for engine in engines] == [False] * 3  # the others' weights are old now
        engines[0].restart()  # its sender gave up
        assert handles[0].restarted == 1
        stream.clear()
        push(engines, 3)
        assert plain(pool.generate(requests).result(5)) == expected(requests, 3)
        assert pool.restarts == {"engine 0": 1, "engine 1": 1, "engine 2": 0}

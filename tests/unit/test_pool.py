"""An engine pool over real processes: one answer to every request, the same as a single engine's, and never a hang."""

import os
import signal
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dump.rollout.crew import PoolFailed
from megatron_dump.rollout.engine import EngineDied, EngineOutput, EngineRefused, EngineRequest
from megatron_dump.rollout.pool import EnginePool
from megatron_dump.rollout.pool_options import PoolOptions
from tests.unit.toy_engine import ToyHandle, complete

QUICK = {"call_timeout_s": 20.0, "start_timeout_s": 20.0, "health_interval_s": 0.05, "min_chunk_tokens": 1}


@pytest.fixture
def make(tmp_path):
    """A pool of toy engines, and at the end a look that none of their processes is left."""
    pools, handles = [], []

    def pool_of(n, delay_s=0.0, reload=None, **options):
        mine = [ToyHandle(tmp_path / f"{len(pools)}.{i}", delay_s, i) for i in range(n)]
        handles.extend(mine)
        pools.append(EnginePool(mine, PoolOptions(**{**QUICK, **options}), expected_tokens=6, reload=reload))
        return pools[-1], mine

    yield pool_of
    for pool in pools:
        pool.close()
    assert not [pid for handle in handles for pid in handle.pids if Path(f"/proc/{pid}").exists()]
    assert not [t.name for t in threading.enumerate() if t.name.startswith("engine ")]


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


@pytest.mark.parametrize("engines", [1, 2, 3, 4])
def test_any_number_of_engines_answers_as_one(make, engines):
    pool, handles = make(engines, delay_s=0.002)
    batches = [requests_of(n, seed) for seed, n in enumerate([40, 1, 0, 17])]
    futures = [pool.generate(batch) for batch in batches]  # all under way at once
    for batch, future in zip(batches, futures, strict=True):
        assert plain(future.result(20)) == expected(batch)
    computed = [pair for handle in handles for pair in began(handle)]
    asked = [(tuple(r.prompt.tolist()), seed) for batch in batches for r in batch for seed in r.seeds]
    assert sorted(computed) == sorted(asked)  # nothing was computed twice
    assert pool.restarts == {f"engine {i}": 0 for i in range(engines)}


@pytest.mark.parametrize("engines", [1, 2, 4])
@given(data=st.data())
@settings(max_examples=4, deadline=None)
def test_delays_and_deaths_change_nothing(tmp_path_factory, engines, data):
    requests = requests_of(data.draw(st.integers(0, 30)), data.draw(st.integers(0, 99)), data.draw(st.integers(1, 20)))
    kills = data.draw(st.lists(st.tuples(st.integers(0, engines - 1), st.floats(0, 0.05)), max_size=3))
    folder = tmp_path_factory.mktemp("toys")
    handles = [ToyHandle(folder / str(i), 0.003, i) for i in range(engines)]
    options = PoolOptions(**{**QUICK, "max_restarts": 6, "min_chunk_tokens": data.draw(st.integers(0, 100))})
    with EnginePool(handles, options, expected_tokens=data.draw(st.floats(1, 100))) as pool:
        future = pool.generate(requests)
        for engine, after_s in kills:
            time.sleep(after_s)
            handles[engine].process.kill()
        assert plain(future.result(30)) == expected(requests)
        assert plain(pool.generate(requests).result(30)) == expected(requests)


def test_a_killed_engine_loses_and_repeats_nothing(make):
    pool, (first, second, third) = make(3)
    for handle in (first, second, third):
        (handle.folder / "slow").write_text("0.02")
    requests = requests_of(60, largest=4)
    future = pool.generate(requests)
    wait_for(lambda: len(first.served()) >= 2)
    os.kill(first.pids[0], signal.SIGKILL)
    assert plain(future.result(20)) == expected(requests)
    assert pool.restarts == {"engine 0": 1, "engine 1": 0, "engine 2": 0}
    wait_for(lambda: len(first.pids) == 2)
    # what only the dead one had begun and not answered was computed again, by others; nobody else repeated anything
    by_others = began(second) + began(third)
    assert len(by_others) == len(set(by_others))
    assert plain(pool.generate(requests).result(20)) == expected(requests)


def test_a_hung_engine_is_given_up_and_its_late_answer_dropped(make):
    pool, (hung, _) = make(2, call_timeout_s=1.0)
    requests = requests_of(30)
    os.kill(hung.pids[0], signal.SIGSTOP)
    begin = time.monotonic()
    future = pool.generate(requests)
    assert plain(future.result(10)) == expected(requests)
    assert 0.9 < time.monotonic() - begin < 5
    wait_for(lambda: len(hung.pids) == 2)
    assert pool.restarts == {"engine 0": 1, "engine 1": 0}
    assert plain(pool.generate(requests).result(10)) == expected(requests)


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


def test_answers_of_an_earlier_life_are_dropped():
    handle = Stubborn()
    requests = requests_of(3)
    with EnginePool([handle], PoolOptions(call_timeout_s=0.3), expected_tokens=6) as pool:
        future = pool.generate(requests)
        wait_for(lambda: handle.restarted == 1 and len(handle.asked) == 2)
        handle.answer(0, version=7)  # too late, and wrong
        time.sleep(0.05)
        assert not future.done()
        handle.answer(1)
        assert plain(future.result(5)) == expected(requests)


def test_an_engine_that_dies_at_every_start_is_one_clear_error(make):
    pool, (ill, _) = make(2, max_restarts=2)
    (ill.folder / "stillborn").touch()
    os.kill(ill.pids[0], signal.SIGKILL)
    wait_for(lambda: pool._dispatcher.failure)
    words = (
        f"engine 0 was lost 3 times, with max_restarts=2; the last time: exit code 3, last words "
        f"'I was never meant to be'; log: {ill.folder / 'log'}"
    )
    for call in (lambda: pool.generate(requests_of(3)), lambda: pool.load_weights(1, {}), pool.sleep, pool.wake):
        with pytest.raises(PoolFailed, match="lost 3 times") as caught:
            call().result(5)
        assert str(caught.value) == words
    with pytest.raises(PoolFailed):
        pool.restart()
    assert not pool.alive()
    assert len(ill.pids) == 3


def test_a_request_that_kills_every_engine_ends(make):
    pool, handles = make(2, max_restarts=1)
    poison = EngineRequest(np.array([-1]), (1,))  # no seed sequence takes a negative number
    with pytest.raises(PoolFailed, match=r"engine \d was lost 2 times, .* last words 'ValueError: .*log"):
        pool.generate([*requests_of(5), poison]).result(20)
    assert sum(len(h.pids) for h in handles) <= 4


def test_all_dead_at_once(make):
    pool, handles = make(3)
    for handle in handles:
        (handle.folder / "slow").write_text("0.05")
    requests = requests_of(30)
    future = pool.generate(requests)
    wait_for(lambda: all(h.served() for h in handles))
    for handle in handles:
        os.kill(handle.pids[0], signal.SIGKILL)
    assert plain(future.result(20)) == expected(requests)  # they need no weights yet, so they go on as they began


def test_all_dead_at_once_without_weights_is_told_and_mended(make):
    pool, handles = make(2)
    pool.load_weights(5, {"shm": "a"}).result(5)
    for handle in handles:
        (handle.folder / "slow").write_text("0.05")
    requests = requests_of(30)
    future = pool.generate(requests)
    wait_for(lambda: all(h.served() for h in handles))
    for handle in handles:
        os.kill(handle.pids[0], signal.SIGKILL)
    with pytest.raises(EngineDied, match="no engine has weights, load them again .*exit code -9"):
        future.result(10)
    with pytest.raises(EngineDied):
        pool.generate(requests).result(10)
    pool.restart()
    pool.load_weights(5, {"shm": "b"}).result(5)
    assert plain(pool.generate(requests).result(10)) == expected(requests, 5)


def test_a_restarted_engine_does_not_serve_before_it_has_weights(make):
    pool, (first, second) = make(2)
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


def test_reload_gives_weights_before_it_serves(make):
    reloads, versions = [], []

    def reload(handle):
        reloads.append(handle)
        handle.load_weights(versions[-1], {"reload": True}).result(5)

    pool, (only,) = make(1, reload=reload)
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


def test_a_failing_reload_is_a_failing_start(make):
    def reload(handle):
        raise ConnectionError("nobody there")

    pool, (only,) = make(1, reload=reload, max_restarts=1)
    pool.load_weights(1, {}).result(5)
    os.kill(only.pids[0], signal.SIGKILL)
    with pytest.raises(PoolFailed, match="engine 0 was lost 2 times, with max_restarts=1; the last time: nobody there"):
        pool.generate(requests_of(3)).result(10)


def test_weights_come_after_earlier_calls_and_before_later_ones(make):
    pool, _ = make(3, delay_s=0.005)
    requests = requests_of(30)
    futures = []
    for version in range(4):
        futures.append(pool.load_weights(version, {}))
        futures.append(pool.generate(requests))
        futures.append(pool.generate(requests[::-1]))
    for version in range(4):
        assert plain(futures[3 * version + 1].result(10)) == expected(requests, version)
        assert plain(futures[3 * version + 2].result(10)) == expected(requests[::-1], version)


def test_an_engine_lost_while_it_loads_fails_the_load(make):
    pool, (first, _) = make(2)
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


def test_restart_ends_loads_that_nobody_sends(make):
    pool, (first, second) = make(2)
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


def test_engines_that_die_asleep_are_restarted_when_woken(make):
    pool, (first, _) = make(2)
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


def test_an_engine_that_refuses_to_start_is_not_asked_again():
    class Refusing(Stubborn):
        def alive(self):
            return False

        def restart(self):
            super().restart()
            raise EngineRefused("max_model_len=0: too small")

    handle = Refusing()
    with EnginePool([handle], PoolOptions(**QUICK), expected_tokens=6) as pool:
        with pytest.raises(PoolFailed, match="engine 0 cannot be restarted: max_model_len=0: too small"):
            pool.generate([EngineRequest(np.arange(3), (1,))]).result(5)
        assert handle.restarted == 1


def test_a_start_that_never_ends_is_an_error():
    class Slow(Stubborn):
        ended = threading.Event()

        def alive(self):
            return False

        def restart(self):
            assert self.ended.wait(20)

        def close(self):
            self.ended.set()

    pool = EnginePool([Slow()], PoolOptions(**{**QUICK, "start_timeout_s": 0.5}), expected_tokens=6)
    with pytest.raises(PoolFailed, match=r"engine 0 was not up after 0.5 s"):
        pool.generate([EngineRequest(np.arange(3), (1,))]).result(5)
    pool.close()


def test_a_call_that_the_engine_refuses_fails_alone():
    class Picky(Stubborn):
        def generate(self, requests):
            if any(len(r.prompt) > 5 for r in requests):
                raise ValueError("prompt of 6 tokens: at most 5")
            future = super().generate(requests)
            self.answer(-1)
            return future

    short, long = EngineRequest(np.arange(3), (1, 2)), EngineRequest(np.arange(6), (3,))
    with EnginePool([Picky()], PoolOptions(**QUICK), expected_tokens=6) as pool:
        with pytest.raises(ValueError, match="at most 5"):
            pool.generate([short, long]).result(5)
        assert plain(pool.generate([short]).result(5)) == expected([short])
        assert pool.restarts == {"engine 0": 0}


def test_nonsense_is_a_fault_of_the_engine():
    class Forgetful(Stubborn):
        def generate(self, requests):
            future = super().generate(requests)
            self.asked[-1] = (requests if self.restarted else requests[:-1], future)
            self.answer(-1)
            return future

    with EnginePool([Forgetful()], PoolOptions(**QUICK), expected_tokens=6) as pool:
        assert plain(pool.generate(requests_of(5)).result(5)) == expected(requests_of(5))
        assert pool.restarts == {"engine 0": 1}


def test_close_answers_everybody_and_takes_no_more(make):
    pool, handles = make(2)
    for handle in handles:
        (handle.folder / "slow").write_text("60")
    futures = [pool.generate(requests_of(5)), pool.load_weights(1, {})]
    wait_for(lambda: all(h.served() for h in handles))
    pool.close()
    pool.close()
    futures += [pool.generate(requests_of(1)), pool.sleep()]
    for future in futures:
        with pytest.raises(EngineDied, match="the engine pool is closed"):
            future.result(1)
    assert not any(h.alive() for h in handles)


@pytest.mark.parametrize(
    ("key", "value"),
    [("max_restarts", -1), ("call_timeout_s", 0), ("start_timeout_s", "1"), ("min_chunk_tokens", True)],
)
def test_options_are_checked(key, value):
    with pytest.raises(ValueError, match=f"^{key}: {value!r} must be a number"):
        PoolOptions(**{key: value})

"""An engine pool over real processes: one answer to every request, the same as a single engine's, and never a hang."""

import os
import signal
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dump.engine_options import PoolOptions
from megatron_dump.rollout.crew import PoolFailed
from megatron_dump.rollout.engine import EngineDied, EngineRefused, EngineRequest
from megatron_dump.rollout.pool import EnginePool
from tests.unit.pools import QUICK, Stubborn, began, expected, plain, requests_of, wait_for
from tests.unit.toy_engine import ToyHandle


@pytest.mark.parametrize("engines", [1, 2, 3, 4])
def test_any_number_of_engines_answers_as_one(make_pool, engines):
    pool, handles = make_pool(engines, delay_s=0.002)
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


def test_a_killed_engine_loses_and_repeats_nothing(make_pool):
    pool, (first, second, third) = make_pool(3)
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


def test_a_hung_engine_is_given_up_and_its_late_answer_dropped(make_pool):
    pool, (hung, _) = make_pool(2, call_timeout_s=1.0)
    requests = requests_of(30)
    os.kill(hung.pids[0], signal.SIGSTOP)
    begin = time.monotonic()
    future = pool.generate(requests)
    assert plain(future.result(10)) == expected(requests)
    assert 0.9 < time.monotonic() - begin < 5
    wait_for(lambda: len(hung.pids) == 2)
    assert pool.restarts == {"engine 0": 1, "engine 1": 0}
    assert plain(pool.generate(requests).result(10)) == expected(requests)


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


def test_an_engine_that_dies_at_every_start_is_one_clear_error(make_pool):
    pool, (ill, _) = make_pool(2, max_restarts=2)
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


def test_a_request_that_kills_every_engine_ends(make_pool):
    pool, handles = make_pool(2, max_restarts=1)
    poison = EngineRequest(np.array([-1]), (1,))  # no seed sequence takes a negative number
    with pytest.raises(PoolFailed, match=r"engine \d was lost 2 times, .* last words 'ValueError: .*log"):
        pool.generate([*requests_of(5), poison]).result(20)
    assert sum(len(h.pids) for h in handles) <= 4


def killed_at_work(pool, handles, requests):
    """What becomes of requests whose engines are all killed once each has begun."""
    for handle in handles:
        (handle.folder / "slow").write_text("0.05")
    future = pool.generate(requests)
    wait_for(lambda: all(h.served() for h in handles))
    for handle in handles:
        os.kill(handle.pids[0], signal.SIGKILL)
    return future


def test_all_dead_at_once(make_pool):
    pool, handles = make_pool(3)
    requests = requests_of(30)
    future = killed_at_work(pool, handles, requests)
    assert plain(future.result(20)) == expected(requests)  # they need no weights yet, so they go on as they began


def test_all_dead_at_once_without_weights_is_told_and_mended(make_pool):
    pool, handles = make_pool(2)
    pool.load_weights(5, {"shm": "a"}).result(5)
    requests = requests_of(30)
    future = killed_at_work(pool, handles, requests)
    with pytest.raises(EngineDied, match="no engine has weights, load them again .*exit code -9"):
        future.result(10)
    with pytest.raises(EngineDied):
        pool.generate(requests).result(10)
    pool.restart()
    pool.load_weights(5, {"shm": "b"}).result(5)
    assert plain(pool.generate(requests).result(10)) == expected(requests, 5)


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


def test_close_answers_everybody_and_takes_no_more(make_pool):
    pool, handles = make_pool(2)
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
    with pytest.raises(ValueError, match=rf"inference_backend\.pool\.{key}={value}: must be a number"):
        PoolOptions(**{key: value})

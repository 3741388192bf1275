"""An engine's process: answers in order, deaths, time-outs, refusals, and what is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest

from megatron_dump.rollout import frames
from megatron_dump.rollout.engine import EngineDied, EngineOutput, EngineRefused, EngineRequest
from megatron_dump.rollout.engine_process import EngineProcess
from tests.unit.scripted_engine import DIE, HANG, RAISE, REFUSE, SLOW, ScriptedEngine

FACTORY = "tests.unit.scripted_engine:ScriptedEngine"
REPO = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


@pytest.fixture
def start(tmp_path):
    """EngineProcess with options for it; closed after the test."""
    handles = []

    def begin(factory=FACTORY, options=None, **settings):
        handles.append(EngineProcess(factory, options or {}, tmp_path / "engine.log", **settings))
        return handles[-1]

    yield begin
    for handle in handles:
        handle.close()


def request(first=1, seeds=(1, 2)) -> EngineRequest:
    return EngineRequest(np.array([first, 3, 4]), tuple(seeds))


def same(ours, theirs) -> bool:
    def plain(groups):
        return [[(o.token_ids.tolist(), o.logprobs.tolist(), o.finished, o.policy_version) for o in g] for g in groups]

    return plain(ours) == plain(theirs)


def gone(pid: int, within_s: float = 5.0) -> bool:
    deadline = time.monotonic() + within_s
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def test_answers_are_the_engines_and_come_in_order(start):
    handle, here = start(), ScriptedEngine()
    asked = [[request(i, range(i % 4)) for i in range(1, 1 + n)] for n in (3, 0, 1, 40)]
    futures = [handle.generate(requests) for requests in asked]
    ended = []
    for i, future in enumerate(futures):
        future.add_done_callback(lambda _, i=i: ended.append(i))
    for requests, future in zip(asked, futures, strict=True):
        assert same(future.result(30), here.generate(requests))
    handle.wake().result(5)
    assert ended == [0, 1, 2, 3]
    assert handle.alive()


def test_seeds_of_63_bits_and_empty_answers_survive_the_wire():
    requests = [EngineRequest(np.arange(5), (2**63 - 1, 0)), EngineRequest(np.empty(0, np.int64), ())]
    back = frames.unpack_requests(frames.pack_requests(requests))
    assert [(r.prompt.tolist(), r.seeds) for r in back] == [(r.prompt.tolist(), r.seeds) for r in requests]
    outputs = [[EngineOutput(np.empty(0, np.int64), np.empty(0, np.float32), True, 7)], []]
    assert same(frames.unpack_outputs(frames.pack_outputs(outputs)), outputs)


def test_a_death_fails_every_call_at_once_with_the_last_words(start):
    handle = start()
    handle.ping().result(30)
    began = time.monotonic()
    lost = [
        handle.generate([request()]),
        handle.generate([request(SLOW)]),
        handle.generate([request(DIE)]),
        handle.ping(),
    ]
    assert len(lost[0].result(5)[0]) == 2
    assert len(lost[1].result(5)[0]) == 2
    for future in lost[2:]:
        with pytest.raises(EngineDied, match=r"exit code 3; its last words: .*these are my last words"):
            future.result(5)
    assert time.monotonic() - began < 5
    assert not handle.alive()
    with pytest.raises(EngineDied, match="exit code 3"):
        handle.generate([request()]).result(1)
    handle.restart()
    assert handle.alive() and same(handle.generate([request()]).result(5), ScriptedEngine().generate([request()]))


def test_a_killed_engine_is_seen_while_it_works(start):
    handle = start()
    handle.ping().result(30)
    future = handle.generate([request(HANG)])
    os.kill(handle.pid, signal.SIGKILL)
    with pytest.raises(EngineDied, match="killed by SIGKILL"):
        future.result(5)


@pytest.mark.parametrize("stop", [False, True])
def test_a_hang_ends_at_the_time_limit(start, stop):
    handle = start(timeout_s=1.0)
    handle.ping().result(30)
    if stop:
        os.kill(handle.pid, signal.SIGSTOP)
    with pytest.raises(EngineDied, match="gave no answer after 1 s"):
        handle.generate([request(HANG)]).result(5)
    assert gone(handle.pid)


def test_a_full_connection_of_a_stopped_engine_is_no_hang(start):
    handle = start(timeout_s=1.0)
    handle.ping().result(30)
    os.kill(handle.pid, signal.SIGSTOP)
    with pytest.raises(EngineDied, match=r"after 1 s|took no call for 1 s"):
        handle.generate([EngineRequest(np.ones(2_000_000, np.int64), (1,))]).result(5)


def test_an_error_ends_the_engine_and_a_refusal_does_not(start):
    handle = start()
    with pytest.raises(EngineRefused, match="told to refuse"):
        handle.generate([request(REFUSE)]).result(30)
    assert handle.alive() and len(handle.generate([request()]).result(5)) == 1
    with pytest.raises(EngineDied, match=r"RuntimeError: told to raise \(log: .*engine.log\)"):
        handle.generate([request(RAISE)]).result(5)
    assert not handle.alive()


@pytest.mark.parametrize(
    ("factory", "options", "error", "message"),
    [
        (FACTORY, {"start": "refuse"}, EngineRefused, "start=refuse: not one of well"),
        (FACTORY, {"start": "die"}, EngineDied, "exit code 3; its last words: .*these are my last words"),
        (FACTORY, {"start": "hang"}, EngineDied, "was not up after 4 s"),
        (FACTORY, {"surprise": 1}, EngineDied, "unexpected keyword argument 'surprise'"),
        ("tests.nowhere:Engine", {}, EngineDied, "No module named 'tests.nowhere'"),
    ],
)
def test_a_start_that_fails_says_why(start, factory, options, error, message):
    handle = start(factory, options, start_timeout_s=4.0)
    with pytest.raises(error, match=message):
        handle.ping().result(30)
    assert not handle.alive()


def test_a_program_that_is_not_there_says_so(start):
    with pytest.raises(EngineDied, match=r"FileNotFoundError.*no/python"):
        start(python="/no/python").ping().result(5)


@pytest.mark.parametrize("end", ["close", "busy", "die"])
def test_no_process_is_left(start, end):
    handle = start(options={"child": True})
    handle.ping().result(30)
    pids = [handle.pid, *(child.pid for child in psutil.Process(handle.pid).children())]
    assert len(pids) == 2
    if end == "busy":
        future = handle.generate([request(HANG)])
    if end == "die":
        os.kill(handle.pid, signal.SIGKILL)
    else:
        handle.close()
    if end == "busy":
        with pytest.raises(EngineDied, match="it is closed"):
            future.result(1)
    assert all(gone(pid) for pid in pids)


@pytest.mark.parametrize("blow", ["SIGKILL", "SIGTERM", "exit", "fork"])
def test_no_process_outlives_its_parent(tmp_path, blow):
    """However the parent ends, and while the engine works."""
    program = (
        "import numpy as np, time, psutil, os\n"
        "from megatron_dump.rollout.engine import EngineRequest\n"
        "from megatron_dump.rollout.engine_process import EngineProcess\n"
        f"h = EngineProcess('{FACTORY}', dict(child=True), {str(tmp_path / 'log')!r})\n"
        "h.ping().result()\n"
        "print(h.pid, psutil.Process(h.pid).children()[0].pid, flush=True)\n"
        f"h.generate([EngineRequest(np.array([{HANG}]), (1,))])\n"
        "if os.environ['BLOW'] == 'fork' and os.fork() == 0: time.sleep(8); os._exit(0)\n"  # holds the connection
        "time.sleep(0.2 if os.environ['BLOW'] == 'exit' else 1000)\n"
    )
    env = {**os.environ, "PYTHONPATH": REPO, "BLOW": blow}
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=REPO, env=env
    ) as parent:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        if blow != "exit":
            time.sleep(0.2)
            parent.send_signal(getattr(signal, blow, signal.SIGKILL))
        parent.wait(10)
    assert len(pids) == 2 and all(gone(pid) for pid in pids)

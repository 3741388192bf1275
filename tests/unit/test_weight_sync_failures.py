"""Ends of an engine or a sender in the middle of the weights."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import time

import pytest

from megatron_dump.weight_sync import receive
from tests.engine_processes import Mishap, assert_equal
from tests.unit.weight_syncs import TRANSPORTS, made_engines, some_tensors, sync_with

REPO = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture
def engines():
    yield from made_engines()


@pytest.mark.parametrize("kind", ["error", "death", "leaves", "hangs"])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_an_engine_that_fails_is_restarted_and_gets_the_weights(engines, tmp_path, transport, kind):
    tensors, other = some_tensors(), engines()
    engine = engines(lambda: Mishap(kind, tmp_path))
    timeout_s = 2.0 if kind == "hangs" else 20.0
    sync = sync_with(tensors, [other, engine], transport=transport, bucket_mb=2**-5, timeout_s=timeout_s)
    sync.push(1)
    assert engine.starts == 2
    assert other.starts == (1 if transport == "shared_memory" else 2)  # a broadcast fails as a whole
    for handle in (other, engine):
        assert_equal(handle.call("result").result(10), 1, tensors)
    tensors["layer.2"].mul_(2)
    sync.push(2)
    assert_equal(engine.call("result").result(10), 2, tensors)
    assert engine.starts == 2


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("error", "cannot load this"),
        ("death", "EngineDied"),
        ("leaves", "did not load all"),
    ],
)
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_second_failure_is_an_error(engines, tmp_path, transport, kind, message):
    engine = engines(lambda: Mishap(kind, tmp_path, times=2))
    sync = sync_with(some_tensors(), [engine], transport=transport, bucket_mb=2**-5)
    with pytest.raises(RuntimeError, match=f"version 4 failed twice: rank 0: engine 0: .*({message})"):
        sync.push(4)
    engine.restart()
    sync.push(4)  # the third life is sound
    assert engine.call("result").result(10)[0] == 4


SENDER = """
import os, signal, sys, torch
sys.path.insert(0, {repo!r})
from concurrent.futures import Future
from megatron_dump.weight_sync import WeightSync, WeightSyncOptions
from tests.unit.weight_syncs import Whole, some_tensors
import json

class Handle:
    def load_weights(self, version, link):
        print(json.dumps(link), flush=True)
        return Future()
    def alive(self): return True

class Dying(Whole):
    def read(self, index):
        if index == 4:
            if {how!r} == "death":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError("the weights cannot be read")
        return super().read(index)

sync = WeightSync(Dying(some_tensors()), [Handle()],
                  WeightSyncOptions(transport={transport!r}, bucket_mb=2**-5, timeout_s={timeout}))
sync.push(0)
"""


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("death", "the sender ended in the middle of the weights"),
        ("error", "the sender gave up: OSError: the weights cannot be read"),
    ],
)
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_the_senders_end_reaches_the_engine(transport, how, message):
    """As an exception, at once; and nothing is left of it in /dev/shm."""
    before = set(os.listdir("/dev/shm"))
    program = SENDER.format(repo=str(REPO), transport=transport, how=how, timeout=3.0 if how == "error" else 60.0)
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    link = json.loads(process.stdout.readline())
    start = time.monotonic()
    names = []
    with pytest.raises(ConnectionError, match=message):
        for name, _ in receive(link):
            names.append(name)
    assert time.monotonic() - start < 10 and "layer.4" not in names
    process.kill()
    process.wait()
    process.stdout.close()
    assert set(os.listdir("/dev/shm")) <= before

"""Weights between real processes: both transports, without Megatron."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch

from megatron_dump.weight_sync import receive
from megatron_dump.weight_sync.contents import Entry
from tests.engine_processes import Collector, assert_equal
from tests.unit.weight_syncs import TRANSPORTS, made_engines, some_tensors, sync_with

REPO = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture
def engines():
    yield from made_engines()


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("checksum", [False, True])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_engines_get_every_byte(engines, transport, checksum, n):
    tensors, receivers = some_tensors(), [engines() for _ in range(n)]
    sync = sync_with(tensors, receivers, transport=transport, checksum=checksum, bucket_mb=2**-4)
    for version in range(3):
        for i, tensor in enumerate(tensors.values()):
            tensor.copy_((tensor.float() + i).to(tensor.dtype))
        sync.push(version)
        for receiver in receivers:
            assert_equal(receiver.call("result").result(10), version, tensors)
    sync.close()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_version_that_is_there_is_not_pushed_again(engines, transport):
    tensors, engine = some_tensors(), engines()
    sync = sync_with(tensors, [engine], transport=transport)
    sync.push(3)
    tensors["layer.0"].add_(1)  # not seen: the version is the same
    sync.push(3)
    assert not np.array_equal(engine.call("result").result(10)[1]["layer.0"][2], tensors["layer.0"].view(torch.uint8))
    engine.restart()
    sync.invalidate(engine)
    sync.push(3)
    assert_equal(engine.call("result").result(10), 3, tensors)
    engine.process.kill()  # a dead one is seen without being told
    engine.process.join()
    sync.push(3)
    assert_equal(engine.call("result").result(10), 3, tensors)
    with pytest.raises(ValueError, match="version 2 is older than 3"):
        sync.push(2)


class Keeper(Collector):
    """Keeps the tensors themselves, as loaders do that wait for a whole layer."""

    def load_weights(self, version, weights):
        self.version, self.weights = version, dict(weights)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_an_engine_may_keep_the_tensors(engines, transport):
    tensors, engine = some_tensors(), engines(Keeper)
    sync = sync_with(tensors, [engine], transport=transport, bucket_mb=2**-5)
    for version in range(2):
        sync.push(version)
        kept = {name: tensor.clone() for name, tensor in tensors.items()}
        for tensor in tensors.values():
            tensor.mul_(2)
        assert_equal(engine.call("result").result(10), version, kept)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_changed_byte_is_found(engines, transport, monkeypatch):
    """What the sender's memory holds changes between its digest and the engine."""
    tensors = some_tensors()

    def late(entry, bucket):
        value = DIGEST(entry, bucket)
        if entry.name == "layer.4":
            entry.view(bucket).flatten()[5] += 1
        return value

    monkeypatch.setattr(Entry, "digest", late)
    engine = engines(Undisturbed)
    sync = sync_with(tensors, [engine], transport=transport, checksum=True, bucket_mb=2**-5)
    with pytest.raises(RuntimeError, match=r"weight_sync.checksum: layer.4 bfloat16\[129, 64\] is not what was sent"):
        sync.push(0)


class Undisturbed(Collector):
    def __init__(self):
        super().__init__()
        Entry.digest = DIGEST


DIGEST = Entry.digest


def test_a_link_that_nobody_serves():
    link = {"transport": "shared_memory", "address": "megatron_dump.weight_sync.none", "receiver": 0, "timeout_s": 5}
    with pytest.raises(ConnectionError, match="nobody sends weights on this link"):
        next(receive(link))
    with pytest.raises(ConnectionError):
        next(
            receive(
                {
                    "transport": "broadcast",
                    "host": "127.0.0.1",
                    "port": 1,
                    "rank": 1,
                    "size": 2,
                    "backend": "gloo",
                    "timeout_s": 1,
                }
            )
        )
    with pytest.raises(ValueError, match="transport='pigeon' is not one of"):
        next(receive({"transport": "pigeon"}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(transport="pigeon"), "weight_sync.transport=pigeon: one of auto, shared_memory, broadcast"),
        (dict(bucket_mb=0), "weight_sync.bucket_mb=0: must be above 0"),
        (dict(dtype="float31"), "'float31' is no torch dtype"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        sync_with({}, [], **options)


def test_nobody_drives_an_engine():
    with pytest.raises(ValueError, match="no rank drives an engine"):
        sync_with(some_tensors(), [])


def test_receiving_needs_no_megatron():
    program = "import sys, megatron_dump.weight_sync; print([m for m in sys.modules if m.split('.')[0] in %s])"
    known = ["megatron", "vllm", "ray", "transformers", "omegaconf"]
    ran = subprocess.run([sys.executable, "-c", program % known], capture_output=True, text=True, check=True, cwd=REPO)
    assert ran.stdout.strip() == "[]"

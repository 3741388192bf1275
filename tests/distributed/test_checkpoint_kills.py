"""SIGKILL while a checkpoint is written: what was complete stays, bit for bit, and what was not is never read."""

from __future__ import annotations

import multiprocessing
import os
import pathlib
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from megatron_dump.actor.checkpoint import Checkpoints
from megatron_dump.config import CheckpointCallbackParams
from tests.distributed.launch import run_ranks
from tests.distributed.test_checkpoints import digest, step
from tests.distributed.tiny import make_actor, write_model

LIVES = 20


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("model"))
    write_model(path)
    return path


def _begin(target: Callable[[], Any]) -> multiprocessing.Process:
    """Run `target` in a process group of its own, which everything that it starts belongs to."""

    def lead() -> None:
        os.setsid()
        target()

    process = multiprocessing.get_context("fork").Process(target=lead)
    process.start()
    return process


def _kill(process: multiprocessing.Process) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.join()


def _wait_for(path: pathlib.Path, process: multiprocessing.Process) -> float:
    """The time.time() that a rank wrote there."""
    while not path.exists():
        assert process.is_alive(), "a rank failed; its traceback is above"
        time.sleep(0.001)
    return float(path.read_text())


def _tell(path: pathlib.Path) -> None:
    path.with_suffix(".tmp").write_text(str(time.time()))
    path.with_suffix(".tmp").rename(path)


def live(model: str, folder: pathlib.Path, number: int, keep: CheckpointCallbackParams) -> None:
    """One life of a rank: resume, compare with what was saved, train, save the next step, wait to be killed."""
    actor = make_actor(model)
    store, hashes = Checkpoints(folder / "checkpoints", actor, keep), folder / "hashes"
    latest = store.latest() or 0
    if latest:
        store.load(latest)
        assert digest(actor) == (hashes / f"{latest}.{actor.parallel.rank}").read_text()
    step(actor, latest)
    (hashes / f"{latest + 1}.{actor.parallel.rank}").write_text(digest(actor))
    dist.barrier()
    if actor.parallel.rank == 0:
        (folder / "resumed").write_text(str(latest))
        _tell(folder / f"begin_{number}")
    store.save(latest + 1, {"number": number})
    seed = 100
    while not store.poll():  # with async_save: training goes on
        step(actor, seed := seed + 1)
    if actor.parallel.rank == 0:
        _tell(folder / f"end_{number}")
    time.sleep(60)


def test_killed_at_random_moments(model, tmp_path, monkeypatch):
    """Twenty lives, each killed at another moment of its save, every second one saving in the background."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "hashes").mkdir()
    rng, window, complete, unfinished = np.random.default_rng(0), {}, 0, 0
    for number in range(LIVES + 2):
        keep = CheckpointCallbackParams(async_save=number % 2 == 1, save_top_k=2)

        def ranks(number=number, keep=keep):
            try:
                run_ranks(live, 2, model, tmp_path, number, keep)
            except Exception as error:
                print(error, file=sys.stderr, flush=True)
                raise

        process = _begin(ranks)
        try:
            begin = _wait_for(tmp_path / f"begin_{number}", process)
            resumed = int((tmp_path / "resumed").read_text())
            assert resumed >= complete  # nothing that was complete is lost
            if number < 2:  # the whole window, of either kind
                window[keep.async_save] = _wait_for(tmp_path / f"end_{number}", process) - begin
            else:  # moments spread over the window, a little beyond its end
                moment = 1.1 * window[keep.async_save] * (number - 2 + rng.random()) / LIVES
                time.sleep(max(0.0, begin + moment - time.time()))
        finally:
            _kill(process)
        unfinished += any((tmp_path / "checkpoints").glob("*.partial"))
        steps = [int(path.name[5:]) for path in (tmp_path / "checkpoints").glob("step_*") if "." not in path.name]
        assert max(steps) in (resumed, resumed + 1)
        complete = max(steps)
    assert unfinished >= LIVES // 4 and complete >= 3  # kills fell before, and after, the rename


def test_killed_before_every_change_of_the_folder(model, tmp_path):
    """A save that also deletes an old checkpoint, killed before its first, second, … fsync, rename and removal."""
    changes = ("fsync", "rename", "replace", "unlink", "rmdir")

    def save(folder: pathlib.Path, fatal: int):
        actor = make_actor(model)
        store = Checkpoints(folder, actor, CheckpointCallbackParams(save_top_k=1))
        if not store.latest():
            store.save(1, {})
        store.load(1)
        step(actor, 0)
        (folder.parent / f"{folder.name}.hash").write_text(digest(actor))
        seen = 0

        def counted(function):
            def call(*args, **kwargs):
                nonlocal seen
                seen += 1
                if seen == fatal:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)

            return call

        for name in changes:
            setattr(os, name, counted(getattr(os, name)))
        store.save(2, {})
        store.wait()
        (folder.parent / f"{folder.name}.count").write_text(str(seen))

    def life(folder: pathlib.Path, fatal: int) -> None:
        process = _begin(lambda: save(folder, fatal))
        process.join()

    def look(n: int):
        actor = make_actor(model)
        found = []
        for fatal in range(1, n + 1):
            folder = tmp_path / f"killed_{fatal}"
            store = Checkpoints(folder, actor)
            latest = store.latest()
            store.load(latest)
            if latest == 2:
                assert digest(actor) == (tmp_path / f"killed_{fatal}.hash").read_text()
            found.append(latest)
            Checkpoints(folder, actor).save(3, {})
            assert not [path for path in folder.iterdir() if "." in path.name]  # cleaned
        return found

    life(tmp_path / "whole", 0)
    assert not (tmp_path / "whole" / "step_1").exists()
    n = int((tmp_path / "whole.count").read_text())
    first = tmp_path / "first"
    run_ranks(lambda: Checkpoints(first, make_actor(model)).save(1, {}), 1)
    for fatal in range(1, n + 1):
        shutil.copytree(first, tmp_path / f"killed_{fatal}")
        life(tmp_path / f"killed_{fatal}", fatal)
    found = run_ranks(look, 1, n)[0]
    published = found.index(2)
    assert found == [1] * published + [2] * (n - published) and 3 <= published < n - 3

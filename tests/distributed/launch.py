"""Run a function on several gloo ranks inside a test: forked processes and real collectives, without a launcher.

`run_ranks(fn, 2, x)` calls `fn(x)` on two ranks, each with its default process group ready (`torch.distributed` knows
the rank), and returns `[result of rank 0, result of rank 1]`. Forking lets `fn` be a closure of the test.
"""

from __future__ import annotations

import datetime
import faulthandler
import multiprocessing
import os
import pickle
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

GROUP_TIMEOUT_S = 60.0  # a collective whose peers never come fails after this
GRACE_S = 5.0  # after the first failure the other ranks get this long before they are killed


class RankFailed(RuntimeError):
    """A rank of `run_ranks` failed; the message holds that rank's traceback."""


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 120.0) -> list[Any]:
    """Call `fn(*args)` on `world_size` forked gloo ranks and return their picklable results in rank order.

    Raises RankFailed with the traceback of the rank that failed first, and TimeoutError when ranks are still running
    after `timeout_s`. No process outlives the call.
    """
    context = multiprocessing.get_context("fork")
    port = _free_port()
    processes, pipes = [], []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank in range(world_size):
                receiver, sender = context.Pipe(duplex=False)
                job = (fn, args, rank, world_size, port, os.path.join(folder, "store"), timeout_s, sender)
                process = context.Process(target=_rank_main, args=job, name=f"rank {rank}")
                process.start()
                sender.close()  # the child holds the only other copy: its death is an end of file here
                processes.append(process)
                pipes.append(receiver)
            return _collect(pipes, time.monotonic() + timeout_s)
        finally:
            for process in processes:
                process.join(0.5)
                if process.is_alive():
                    process.kill()
                    process.join()


def _collect(pipes: Sequence[Connection], deadline: float) -> list[Any]:
    """Read one report per rank: (True, time, result) or (False, time, traceback); stop early after a failure."""
    reports: dict[int, tuple[bool, float, Any]] = {}
    open_pipes = {pipe: rank for rank, pipe in enumerate(pipes)}
    failed = False
    while open_pipes and (remaining := deadline - time.monotonic()) > 0:
        ready = wait(list(open_pipes), timeout=remaining)
        for pipe in ready:
            rank = open_pipes.pop(pipe)
            try:
                reports[rank] = pickle.loads(pipe.recv_bytes())
            except EOFError:
                reports[rank] = (False, 0.0, "the process died without a report")  # 0: a death precedes its echoes
            if not reports[rank][0] and not failed:
                failed, deadline = True, min(deadline, time.monotonic() + GRACE_S)
    if failed:
        # Peers fail too, once the first one's sockets close; the earliest report is the cause.
        _, rank = min((report[1], rank) for rank, report in reports.items() if not report[0])
        raise RankFailed(f"rank {rank} of {len(pipes)} failed:\n{reports[rank][2]}")
    if open_pipes:
        raise TimeoutError(f"ranks {sorted(open_pipes.values())} of {len(pipes)} did not finish in time")
    return [reports[rank][2] for rank in range(len(pipes))]


def _rank_main(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    rank: int,
    world_size: int,
    port: int,
    store: str,
    timeout_s: float,
    sender: Connection,
) -> None:
    # A rank stuck outside a collective prints where and exits, even when the test process itself was killed.
    faulthandler.dump_traceback_later(timeout_s + GRACE_S, exit=True, file=sys.__stderr__)
    # MASTER_* serve code that reads them; the group itself meets in a file, so no port can be taken in between.
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
        GLOO_SOCKET_IFNAME="lo",
    )
    torch.set_num_threads(1)  # a forked OpenMP pool has no threads: a parallel region would wait for ever
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=GROUP_TIMEOUT_S),
        )
        result = fn(*args)
        dist.barrier()  # nobody closes its sockets while a peer is still talking
        # Plain pickle copies by value: tensors do not travel through shared memory.
        message = pickle.dumps((True, time.monotonic(), result))
    except BaseException:  # noqa: BLE001 - reported to, and raised by, the parent
        message = pickle.dumps((False, time.monotonic(), traceback.format_exc()))
        sender.send_bytes(message)
        os._exit(1)  # no clean-up: it could wait for peers
    sender.send_bytes(message)
    sys.stdout.flush()
    os._exit(0)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
